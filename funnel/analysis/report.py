"""Reports on runs: a Markdown table, and a self-contained HTML page (template: report.html).

The page needs no network and no scripts, adapts to narrow screens, and has a light and a dark theme.
"""

import math
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from funnel.analysis.figures import plot_calibration, plot_comparison, plot_loss, plot_metrics, plot_regression
from funnel.analysis.heat_map import MAX_CLASSES, MAX_ORDERED_CLASSES, draw_heat_map
from funnel.analysis.learning_curves import plot_learning_curves
from funnel.analysis.runs import Run, count_repetitions, group_by_settings, is_percentage, to_number, worst_classes
from funnel.errors import FunnelError, error_reason, plural, requires_extra

MAX_MATRIX_CLASSES = 12  # above this, the confusion matrix is a heat map instead of a table
MAX_WORST_CLASSES = 10  # with more classes than in a matrix, the ones that are not behind "all classes"
MAX_RUN_NAMES = 3
COLUMNS = (
    "task", "layout", "new layers", "lr", "epochs", "seeds", "final dev score, %", "best dev score, %", "training, min",
    "MFLOPs (vs. no pooling)", "parameters", "memory, GiB", "runs",
)  # fmt: skip


def table_row(group: Sequence[Run]) -> tuple[str, ...]:
    """The cells of `COLUMNS` for runs that differ only in their seed and fold."""
    first = group[0]
    metric, plan = first.metrics[0], first.settings.get("layout_plan")
    memory = statistics.mean(run.peak_memory for run in group) / 1024
    names = [run.name for run in group]
    return (
        first.task,
        str(first.settings["blocks"]),
        Path(plan).name if plan else str(first.settings["init"]),
        f"{first.settings['lr']:g}",
        first.duration + ("" if all(run.is_finished for run in group) else " (unfinished)"),
        count_repetitions(group),
        f"{metric} {format_scores(metric, [to_number(run.final.get(metric)) for run in group])}",
        format_scores(metric, [to_number(run.best.get(metric)) for run in group]),
        f"{statistics.mean(run.seconds for run in group) / 60:.1f}",
        f"{first.flops / 1e6:.3g} ({first.flops_ratio:.2f})",
        f"{first.n_parameters / 1e6:.3g} M",
        f"{memory:.1f}" if math.isfinite(memory) else "?",
        ", ".join(names[:MAX_RUN_NAMES]) + (", …" if len(names) > MAX_RUN_NAMES else ""),
    )


def format_scores(metric: str, values: Sequence[float]) -> str:
    """Mean, and standard deviation if there are several values; in percent, errors such as rmse as they are."""
    if not all(map(math.isfinite, values)):
        return "not finite"
    if is_percentage(metric):
        return " ± ".join(f"{100 * value:.1f}" for value in _mean_and_deviation(values))
    return " ± ".join(f"{value:.4g}" for value in _mean_and_deviation(values)) + " (absolute)"


def _mean_and_deviation(values: Sequence[float]) -> list[float]:
    """The mean alone for a single value."""
    return [statistics.mean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]


def markdown_table(runs: Sequence[Run]) -> str:
    """A table with one row for each group of runs that differ only in their seed. Pipes in names are escaped."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(table_row(group) for group in group_by_settings(runs))]
    lines = ([" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def check_can_report() -> None:
    """Raises FunnelError if the extra `report`, which `render_page` needs, is not installed."""
    with requires_extra("report", "the report"):
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401


def render_page(runs: Sequence[Run]) -> str:
    """The HTML page.

    Raises:
        FunnelError: the extra `report` is not installed, or a run's files are damaged.
    """
    check_can_report()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    groups = group_by_settings(runs)
    tasks = ", ".join(dict.fromkeys(run.task for run in runs))
    try:
        return environment.get_template("report.html").render(
            title=f"{tasks}: {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}",
            runs=runs,
            plural=plural,
            columns=COLUMNS,
            rows=[table_row(group) for group in groups],
            comparison=plot_comparison(groups),
            learning_curves=plot_learning_curves(groups),
            plot_loss=plot_loss,
            plot_metrics=plot_metrics,
            plot_regression=plot_regression,
            plot_calibration=plot_calibration,
            draw_heat_map=draw_heat_map,
            worst_classes=worst_classes,
            max_matrix_classes=MAX_MATRIX_CLASSES,
            max_heat_map_classes=MAX_CLASSES,
            max_ordered_classes=MAX_ORDERED_CLASSES,
            max_worst_classes=MAX_WORST_CLASSES,
            short_command=short_command,
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError, jinja2.UndefinedError) as error:
        raise FunnelError(f"a run's files are damaged or from another version ({error_reason(error)})") from None


def short_command(command: str) -> str:
    """A run's command without the folders of the interpreter and the script."""
    try:
        program, script, *arguments = shlex.split(command)
    except ValueError:
        return command
    return shlex.join([Path(program).name, Path(script).name, *arguments])

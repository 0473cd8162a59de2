"""A page on one or several runs that can be sent to a colleague, and a Markdown table: `python -m funnel report`.

The page (report.html is its template) stands alone: no network, no scripts, light and dark, wide and narrow screens.
"""

import html
import io
import itertools
import json
import math
import os
import re
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funnel.data.tasks import CUSTOM
from funnel.errors import FunnelError, error_reason
from funnel.io import existing_folder, read_json
from funnel.model import checkpoint
from funnel.model.config import FunnelConfig, parse_blocks
from funnel.model.flops import ModuleCost, count_parameters, module_costs, total_flops
from funnel.training import error_analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"  # in figures; becomes the page's own colour of text
COLORS = ("#3987e5", "#d95926", "#199e70", "#c98500", "#9085e9", "#d55181", "#008300", "#e66767")  # read on white and on black
MOST_CLASSES = 12  # of a confusion matrix; of more classes the most frequent confusions are format_list
SAME = ("seed", "train_texts", "dev_texts", "mean_tokens")  # settings that may differ between runs that are repeated


@dataclass
class Record:
    """What a run's folder says.

    Attributes:
        folder: the run's.
        settings: what it was asked for (run.json).
        command: the exact command.
        lines: metrics.jsonl.
        evaluation: what the best checkpoint gets wrong (`error_analysis.analyze_errors`), or nothing.
        config: of its best checkpoint.
    """

    folder: Path
    settings: dict[str, Any]
    command: str
    lines: list[dict[str, Any]]
    evaluation: dict[str, Any]
    config: FunnelConfig

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def task(self) -> str:
        """The task, or the file of a user's own."""
        name = str(self.settings["task"])
        return Path(str(self.settings.get("data"))).name if name == CUSTOM else name

    @property
    def dev(self) -> list[dict[str, Any]]:
        """Its evaluations on dev."""
        return [line for line in self.lines if line.get("split") == "dev"]

    @property
    def train(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("split") == "train"]

    @property
    def metrics(self) -> list[str]:
        """The task's metrics; the first one chooses the best checkpoint."""
        return [name for name in self.dev[-1] if name not in ("step", "split", "loss")]

    @property
    def best(self) -> dict[str, Any]:
        return max(self.dev, key=lambda line: _number(line.get(self.metrics[0])))

    @property
    def is_done(self) -> bool:
        return bool(self.dev[-1]["step"] >= self.settings["steps"])

    @property
    def seconds(self) -> float:
        """Of training, without evaluations and pauses."""
        rates = [line["examples_per_second"] for line in self.train if line.get("examples_per_second")]
        return float(self.dev[-1]["step"] * self.settings["batch_size"] / statistics.median(rates)) if rates else math.nan

    @property
    def memory(self) -> float:
        """The most MiB at once."""
        return max((_number(line.get("memory_mib")) for line in self.train), default=math.nan)

    @property
    def length(self) -> int:
        """Tokens of a text in the mean."""
        return max(1, round(self.settings.get("mean_tokens") or self.settings["max_length"]))

    @cached_property
    def flops(self) -> int:
        """Of a forward pass over a text of that length."""
        return total_flops(self.config, self.length, self.settings["batch_size"])

    @property
    def parts(self) -> list[ModuleCost]:
        """The blocks."""
        return [part for part in module_costs(self.config, self.length, self.settings["batch_size"]) if part.layers]

    @property
    def flops_share(self) -> float:
        """FLOPs against a network of as many layers that never pools."""
        layers = sum(part.runs for part in self.parts)
        sizes, repeats = parse_blocks(str(layers))
        return self.flops / total_flops(
            self.config.replace(block_sizes=sizes, block_repeats=repeats), self.length, self.settings["batch_size"]
        )

    @property
    def parameters(self) -> int:
        return count_parameters(self.config)

    @property
    def confusions(self) -> list[tuple[int, str, str]]:
        """How often which class was taken for which other one, the most frequent first."""
        labels, matrix = self.evaluation["labels"], self.evaluation["confusion"]
        pairs = [(matrix[i][j], labels[i], labels[j]) for i, j in itertools.permutations(range(len(labels)), 2) if matrix[i][j]]
        return sorted(pairs, key=lambda pair: -pair[0])[:20]


def _number(value: Any) -> float:
    """A measure; minus infinity for one without meaning, which the log has as null."""
    return value if isinstance(value, int | float) and not math.isnan(value) else -math.inf


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The folders of runs: those given, and those in folders that are given.

    Raises:
        FunnelError: a folder is no run and has none.
    """
    found = []
    for path in paths:
        here = [path] if (path / "run.json").is_file() else sorted(p.parent for p in path.glob("*/run.json"))
        if not here:
            raise FunnelError(f"{path}: holds no run (train.py makes one)")
        found += here
    return list(dict.fromkeys(folder.resolve() for folder in found))


def read(folder: Path) -> Record:
    """What a run's folder says.

    Raises:
        FunnelError: a file is missing or damaged, or the run has not been evaluated yet.
    """
    record, best = read_json(folder / "run.json"), existing_folder(folder / "best")
    try:
        lines = [line for line in map(_parsed, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) if line]
        if not any(line.get("split") == "dev" for line in lines):
            raise FunnelError(f"{folder}: has no evaluation yet; let the run get to its first one")
        evaluation = read_json(best / error_analysis.FILE) if (best / error_analysis.FILE).is_file() else {}
        found = Record(
            folder, dict(record["settings"]), str(record["command"]), lines, evaluation, checkpoint.load_config(best)
        )
        summary(found)  # whatever is wrong in these files shows here
        return found
    except OSError as error:
        raise FunnelError(f"{folder}: cannot be read ({error_reason(error)})") from None
    except FunnelError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
        raise FunnelError(f"{folder}: its files are damaged or of another version ({error_reason(error)})") from None


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of the log, or nothing where it was cut off."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and {"step", "split"} <= values.keys() else None


# --- tables -----------------------------------------------------------------------------------------------------------

HEADS = ("task", "layout", "new layers", "lr", "epochs", "seeds", "at the end", "best", "minutes", "MFLOPs", "parameters",
         "GiB", "runs")  # fmt: skip


def grouped(records: Sequence[Record]) -> list[list[Record]]:
    """Runs that differ in nothing but the seed, main_process_first; a run with a seed that is there already is no further seed."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        key = json.dumps({k: v for k, v in record.settings.items() if k not in SAME}, sort_keys=True)
        while any(other.settings["seed"] == record.settings["seed"] for other in groups.get(key, [])):
            key += " again"
        groups.setdefault(key, []).append(record)
    return list(groups.values())


def row(group: list[Record]) -> tuple[str, ...]:
    """The cells of `HEADS` for runs that were repeated with several seeds."""
    first = group[0]
    name = first.metrics[0]
    ends = [_number(record.dev[-1].get(name)) * 100 for record in group]
    gib = statistics.mean(r.memory for r in group) / 1024
    plan = first.settings.get("layout_plan")
    names = [record.name for record in group]
    return (
        first.task,
        str(first.settings["blocks"]),
        Path(plan).name if plan else str(first.settings["init"]),
        f"{first.settings['lr']:g}",
        f"{first.settings['epochs']:g}" + ("" if all(r.is_done for r in group) else " (not all done)"),
        str(len(group)),
        f"{name} {spread(ends)}",
        spread([_number(record.best.get(name)) * 100 for record in group]),
        f"{statistics.mean(r.seconds for r in group) / 60:.1f}",
        f"{first.flops / 1e6:.3g} ({first.flops_share:.2f})",
        f"{first.parameters / 1e6:.3g} M",
        f"{gib:.1f}" if math.isfinite(gib) else "?",
        ", ".join(names[:3]) + (", …" if len(names) > 3 else ""),
    )


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if any(math.isinf(value) for value in values):
        return "not finite"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def markdown(records: Sequence[Record]) -> str:
    """The table, a line a setting."""
    lines = [HEADS, ("---",) * len(HEADS), *(row(group) for group in grouped(records))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(record: Record) -> list[tuple[str, str]]:
    """A run in figures: what each means, and the figure."""
    last, best = record.dev[-1], record.best
    found = [(f"{name}, at the end", _percent(last.get(name))) for name in record.metrics]
    found += [(f"{record.metrics[0]}, best (step {best['step']:,})", _percent(best.get(record.metrics[0])))]
    found += [("minutes of training", f"{record.seconds / 60:.1f}"), ("parameters", f"{record.parameters / 1e6:.3g} M")]
    found += [(f"FLOPs of a text of {record.length} tokens", f"{record.flops / 1e6:.3g} M")]
    found += [("of those without pooling", f"{record.flops_share:.0%}")]
    return found + ([("memory at most", f"{record.memory / 1024:.1f} GiB")] if math.isfinite(record.memory) else [])


def _percent(value: Any) -> str:
    return f"{value * 100:.1f}" if math.isfinite(_number(value)) else "not finite"


# --- figures ----------------------------------------------------------------------------------------------------------


def figure(draw: Callable[["Axes"], None], label: str) -> str:
    """An SVG drawing in the page's colours, that says what it is to those who cannot see it."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {
        **dict.fromkeys(inked, INK),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        "axes.prop_cycle": cycler(color=COLORS),
        "font.family": "sans-serif",
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "funnel",
    }
    with matplotlib.rc_context(style):
        drawing = Figure(figsize=(4.6, 2.7), layout="constrained")
        axis = drawing.subplots()
        draw(axis)
        axis.grid(color=INK, alpha=0.12, linewidth=0.8)
        with io.StringIO() as out:
            drawing.savefig(out, format="svg", transparent=True, metadata={"Date": None})
            text = out.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)  # the page decides
    body = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", body).replace(INK, "currentColor")
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 inherit", body)
    return f'{head} role="img" aria-label="{html.escape(label)}">{body}'


def curves(record: Record) -> list[str]:
    """Loss in training and on dev, and the task's metrics, over the steps."""

    def losses(axis: "Axes") -> None:
        axis.plot(*_points(record.train, "loss"), label="training (running mean)", linewidth=1.5)
        axis.plot(*_points(record.dev, "loss"), "o-", label="dev", markersize=4)
        axis.set(xlabel="step", ylabel="loss")
        axis.legend(frameon=False)

    def metrics(axis: "Axes") -> None:
        for name in record.metrics:
            x, y = _points(record.dev, name)
            axis.plot(x, [100 * value for value in y], "o-", label=name, markersize=4)
        axis.set(xlabel="step", ylabel="on dev, %")
        axis.legend(frameon=False)

    return [figure(losses, "loss over the steps"), figure(metrics, "metrics over the steps")]


def _points(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    kept = [(line["step"], line[name]) for line in lines if math.isfinite(_number(line.get(name)))]
    return [step for step, _ in kept], [value for _, value in kept]


def comparison(groups: Sequence[list[Record]]) -> list[str]:
    """What runs reach against what they cost, minutes and FLOPs: two drawings for each task with several groups."""
    tasks = Counter(group[0].task for group in groups)
    return [drawing for task, count in tasks.items() if count > 1 for drawing in _comparison(groups, task)]


def _comparison(groups: Sequence[list[Record]], task: str) -> list[str]:
    name = next(group[0].metrics[0] for group in groups if group[0].task == task)

    def against(cost: Callable[[Record], float], label: str) -> str:
        def draw(axis: "Axes") -> None:
            for number, group in enumerate(groups):
                if group[0].task != task:
                    continue
                ends = [100 * _number(record.dev[-1].get(name)) for record in group]
                if not all(map(math.isfinite, ends)):
                    continue
                x, y = statistics.mean(cost(record) for record in group), statistics.mean(ends)
                error = statistics.stdev(ends) if len(ends) > 1 else None
                axis.errorbar([x], [y], error, fmt="o", color=COLORS[number % len(COLORS)], capsize=3)
                axis.annotate(str(number + 1), (x, y), textcoords="offset points", xytext=(6, 4))
            axis.set(xlabel=label, ylabel=f"{task}: {name} on dev, %")
            axis.margins(0.15)

        return figure(draw, f"{task}: {name} against {label}")

    return [against(lambda r: r.seconds / 60, "minutes of training"), against(lambda r: r.flops / 1e6, "MFLOPs a text")]


def scores(record: Record) -> str:
    """A regression's predictions against the scores."""

    def draw(axis: "Axes") -> None:
        x, y = zip(*record.evaluation["points"], strict=True)
        axis.plot(x, y, "o", markersize=3, alpha=0.5)
        axis.axline((statistics.mean(x), statistics.mean(x)), slope=1, color=INK, linewidth=0.8)
        axis.set(xlabel="score", ylabel="prediction")

    return figure(draw, "predictions against scores")


# --- the page ---------------------------------------------------------------------------------------------------------


def page(records: Sequence[Record]) -> str:
    """The page as HTML.

    Raises:
        FunnelError: the extra is not installed.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise FunnelError(f"report: needs the extra report ({error.name} is missing): pip install -e '.[report]'") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    groups = grouped(records)
    tasks = ", ".join(dict.fromkeys(record.task for record in records))
    try:
        return environment.get_template("report.html").render(
            title=f"{tasks}: {records[0].name if len(records) == 1 else f'{len(records)} runs'}",
            records=records,
            heads=HEADS,
            rows=[row(group) for group in groups],
            comparison=comparison(groups),
            summary=summary,
            curves=curves,
            scores=scores,
            most_classes=MOST_CLASSES,
            command=lambda record: _without_paths(record.command),
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, jinja2.UndefinedError) as error:
        raise FunnelError(f"report: a run's files are damaged or of another version ({error_reason(error)})") from None


def _without_paths(command: str) -> str:
    """A command with the names of the interpreter and the program alone."""
    try:
        program, script, *arguments = shlex.split(command)
    except ValueError:
        return command
    return shlex.join([Path(program).name, Path(script).name, *arguments])


def report_command(paths: Sequence[Path], out: Path | None) -> None:
    """`python -m funnel report`: writes the page and prints the table.

    Of several runs those that cannot be read (because they were not evaluated yet, say) are left out, which is told.

    Raises:
        FunnelError: no run can be read, or the page cannot be written.
    """
    folders, records = find_runs(paths), []
    for folder in folders:
        try:
            records.append(read(folder))
        except FunnelError as error:
            if folder == folders[-1] and not records:
                raise
            print(f"report: left out: {error}", file=sys.stderr)
    out = out or (folders[0] if len(folders) == 1 else Path(os.path.commonpath([f.parent for f in folders]))) / "report.html"
    text = page(records)
    part = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(out)
    except OSError as error:
        raise FunnelError(f"--out {out}: cannot be written ({error_reason(error)})") from None
    print(f"{markdown(records)}\n\nwrote {os.path.relpath(out) if out.resolve().is_relative_to(Path.cwd()) else out}")

"""The report's figures: SVG drawings in the page's colors."""

import html
import io
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from funnel.analysis.runs import Run, is_percentage, to_number, with_unit
from funnel.errors import plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT_COLOR = "#010203"  # placeholder for the page's text color
# Contrast of at least 3 with both backgrounds of the page; distinguishable with every kind of color blindness.
COLORS = ("#0072b2", "#cf7a00", "#009e73", "#cc3333", "#9419ff", "#7d6080")
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))  # in line widths


def color_of(number: int) -> str:
    """The color of a group of runs, numbered from 1."""
    return COLORS[(number - 1) % len(COLORS)]


def dashes_of(number: int) -> tuple[float, ...]:
    """The dashes of a group's curves. Groups up to 24 differ in color or dashes, neighbors in both."""
    return DASHES[(number - 1 + (number - 1) // len(COLORS)) % len(DASHES)]


def plot_loss(run: Run) -> str:
    """Training loss and dev loss by step."""
    axes = new_axes("step", "loss")
    axes.plot(*finite_points(run.train_log, "loss"), label="training (running mean)", linewidth=1.5)
    axes.plot(*finite_points(run.dev_log, "loss"), "o-", label="dev", markersize=4)
    return to_svg(axes, "loss by step", legend=True)


def plot_metrics(run: Run) -> str:
    """Dev metrics by step, without errors such as rmse."""
    axes = new_axes("step", "dev score, %")
    for name in filter(is_percentage, run.metrics):
        steps, scores = finite_points(run.dev_log, name)
        axes.plot(steps, [100 * score for score in scores], "o-", label=name, markersize=4)
    return to_svg(axes, "dev metrics by step", legend=True)


def plot_comparison(groups: Sequence[list[Run]]) -> list[str]:
    """Final dev score against training time and FLOPs, for each task with several groups of runs.

    Args:
        groups: runs that differ only in their seed; numbered from 1 in the figures.
    """
    counts = Counter(group[0].task for group in groups)
    figures = []
    for task in (task for task, count in counts.items() if count > 1):
        numbered = [(number, group) for number, group in enumerate(groups, 1) if group[0].task == task]
        minutes = [statistics.mean(run.seconds for run in group) / 60 for _, group in numbered]
        mflops = [statistics.mean(run.flops for run in group) / 1e6 for _, group in numbered]
        figures += [
            _plot_scores(numbered, minutes, "training time, minutes"),
            _plot_scores(numbered, mflops, "forward pass, MFLOPs per example"),
        ]
    return figures


def _plot_scores(groups: Sequence[tuple[int, list[Run]]], costs: Sequence[float], label: str) -> str:
    task, metric = groups[0][1][0].task, groups[0][1][0].metrics[0]
    axes = new_axes(label, f"{task}: dev {with_unit(metric)}")
    for (number, group), cost in zip(groups, costs, strict=True):
        scores = [(100 if is_percentage(metric) else 1) * to_number(run.final.get(metric)) for run in group]
        if not all(map(math.isfinite, scores)):
            continue
        mean, deviation = statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else None
        axes.errorbar([cost], [mean], deviation, fmt="o", color=color_of(number), capsize=3)
        axes.annotate(str(number), (cost, mean), textcoords="offset points", xytext=(6, 4), color=TEXT_COLOR)
    axes.margins(0.15)
    return to_svg(axes, f"{task}: {metric} against {label}")


def plot_calibration(calibration: Mapping[str, Any], accuracy: str) -> str:
    """Reliability diagram: the share of right predictions against their probability, above the distribution of probabilities.

    Args:
        calibration: as in `calibrate`.
        accuracy: what the share is called.
    """
    top, bottom = _new_axes_below_each_other(3, 1)
    bins, n = calibration["bins"], max(1, calibration["count"])
    for values in bins:
        low, width, share = values["low"], values["high"] - values["low"], values["accuracy"]
        title = (
            f"title:{low:.2f} to {values['high']:.2f}: {plural(values['count'], 'prediction')}, "
            f"mean probability {values['confidence']:.3f}, {accuracy} {share:.3f}"
        )
        top.bar(low, share, width, align="edge", color=COLORS[0], edgecolor="none", alpha=0.35, gid=title)
        top.plot([values["confidence"]] * 2, _wilson_interval(share, values["count"]), color=TEXT_COLOR, linewidth=0.8)
        bottom.bar(low, 100 * values["count"] / n, width, align="edge", color=TEXT_COLOR, alpha=0.35, gid=title)
    top.plot([0, 1], [0, 1], color=TEXT_COLOR, linewidth=0.8, linestyle="--")
    top.plot(
        [values["confidence"] for values in bins], [values["accuracy"] for values in bins], "o", markersize=4, color=COLORS[0]
    )
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel=accuracy)
    bottom.set(xlabel="probability", ylabel="%")
    return to_svg(top, f"reliability diagram: {accuracy} against probability")


def _wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95% confidence interval of a share (Wilson 1927)."""
    z2 = 1.96**2 / count
    middle, half = (share + z2 / 2) / (1 + z2), math.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    return middle - half, middle + half


def plot_regression(run: Run) -> str:
    """Predictions against labels, with the diagonal."""
    axes = new_axes("label", "prediction")
    labels, predictions = zip(*run.evaluation["points"], strict=True)
    axes.plot(labels, predictions, "o", markersize=3, alpha=0.5)
    axes.axline((statistics.mean(labels), statistics.mean(labels)), slope=1, color=TEXT_COLOR, linewidth=0.8)
    return to_svg(axes, "predictions against labels")


def finite_points(log: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of a logged quantity."""
    points = [(line["step"], line[name]) for line in log if math.isfinite(to_number(line.get(name)))]
    return [step for step, _ in points], [value for _, value in points]


def _style() -> dict[Any, Any]:
    from cycler import cycler

    colored = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(colored, TEXT_COLOR),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        "axes.prop_cycle": cycler(color=COLORS),
        "font.family": "sans-serif",
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "funnel",  # makes the output reproducible
    }


def new_axes(xlabel: str, ylabel: str) -> "Axes":
    """The axes of a new figure in the page's style."""
    (axes,) = _new_axes_below_each_other(1)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return axes


def _new_axes_below_each_other(*heights: float) -> "list[Axes]":
    """The axes of a new figure, with relative heights and a common x-axis."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        column: list[Axes] = list(figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0])
        for axes in column:
            axes.grid(color=TEXT_COLOR, alpha=0.12, linewidth=0.8)
    return column


def to_svg(axes: "Axes", description: str, legend: bool = False) -> str:
    """The figure as an <svg> element that inherits size, font and text color from the page.

    An artist with a gid "title:TEXT" shows the text when pointed at.

    Args:
        description: read by screen readers.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = axes.figure
    assert isinstance(figure, Figure)
    with matplotlib.rc_context(_style()), io.StringIO() as file:
        if legend:
            axes.legend(frameon=False)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        svg = file.getvalue()
    tag, body = svg[svg.index("<svg") :].split(">", 1)
    tag = re.sub(r' (width|height)="[^"]*"', "", tag)
    body = re.sub(r'<g id="title:([^"]*)">', r"<g><title>\1</title>", body)
    body = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", body).replace(TEXT_COLOR, "currentColor")
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 inherit", body)
    return f'{tag} role="img" aria-label="{html.escape(description)}">{body}'

"""The report's figures: SVG drawings in the page's colors."""

import html
import io
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from funnel.analysis.runs import Run, is_percentage, to_number, with_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT_COLOR = "#010203"  # placeholder for the page's text color
COLORS = ("#3987e5", "#d95926", "#199e70", "#c98500", "#9085e9", "#d55181", "#008300", "#e66767")  # readable on white and black


def plot_loss(run: Run) -> str:
    """Training loss and dev loss by step."""
    axes = _new_axes("step", "loss")
    axes.plot(*_points(run.train_log, "loss"), label="training (running mean)", linewidth=1.5)
    axes.plot(*_points(run.dev_log, "loss"), "o-", label="dev", markersize=4)
    return _to_svg(axes, "loss by step", legend=True)


def plot_metrics(run: Run) -> str:
    """Dev metrics by step, without errors such as rmse."""
    axes = _new_axes("step", "dev score, %")
    for name in filter(is_percentage, run.metrics):
        steps, scores = _points(run.dev_log, name)
        axes.plot(steps, [100 * score for score in scores], "o-", label=name, markersize=4)
    return _to_svg(axes, "dev metrics by step", legend=True)


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
    axes = _new_axes(label, f"{task}: dev {with_unit(metric)}")
    for (number, group), cost in zip(groups, costs, strict=True):
        scores = [(100 if is_percentage(metric) else 1) * to_number(run.final.get(metric)) for run in group]
        if not all(map(math.isfinite, scores)):
            continue
        mean, deviation = statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else None
        axes.errorbar([cost], [mean], deviation, fmt="o", color=COLORS[(number - 1) % len(COLORS)], capsize=3)
        axes.annotate(str(number), (cost, mean), textcoords="offset points", xytext=(6, 4), color=TEXT_COLOR)
    axes.margins(0.15)
    return _to_svg(axes, f"{task}: {metric} against {label}")


def plot_regression(run: Run) -> str:
    """Predictions against labels, with the diagonal."""
    axes = _new_axes("label", "prediction")
    labels, predictions = zip(*run.evaluation["points"], strict=True)
    axes.plot(labels, predictions, "o", markersize=3, alpha=0.5)
    axes.axline((statistics.mean(labels), statistics.mean(labels)), slope=1, color=TEXT_COLOR, linewidth=0.8)
    return _to_svg(axes, "predictions against labels")


def _points(log: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
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


def _new_axes(xlabel: str, ylabel: str) -> "Axes":
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style()):
        axes = Figure(figsize=(4.6, 2.7), layout="constrained").subplots()
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(color=TEXT_COLOR, alpha=0.12, linewidth=0.8)
    return axes


def _to_svg(axes: "Axes", description: str, legend: bool = False) -> str:
    """The figure as an <svg> element that inherits size, font and text color from the page.

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
    body = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", body).replace(TEXT_COLOR, "currentColor")
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 inherit", body)
    return f'{tag} role="img" aria-label="{html.escape(description)}">{body}'

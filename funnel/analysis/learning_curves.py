"""Learning curves of several runs on one axis: dev metric and training loss."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from funnel.analysis.figures import TEXT_COLOR, color_of, dashes_of, finite_points, new_axes, to_svg
from funnel.analysis.runs import SEED_DEPENDENT, Run, count_repetitions, is_percentage, with_unit
from funnel.problems.metrics import selection_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_GROUPS = 12  # with a color and a number; beyond it, the ones with the lowest scores are gray
MAX_POINTS = 400  # of a curve
MAX_SETTINGS = 4  # of a group in the legend
NUMBER_GAP = 0.07  # between the numbers at the right of a figure, as a fraction of its height
# Settings that are always shown, that differ between repetitions, or that follow from others.
NOT_COMPARED = frozenset(
    (*SEED_DEPENDENT, *"fold blocks steps stopped_at digests teacher_digest metrics columns labels".split())
)


class Group(NamedTuple):
    """Runs that differ only in their seed and fold.

    Attributes:
        number: in the table and in the figures.
        has_color: whether it is shown in color, with its number.
    """

    number: int
    runs: list[Run]
    has_color: bool


class Quantity(NamedTuple):
    """What a figure shows.

    Attributes:
        split: of the log's lines.
        name: in the log.
        label: of the axis.
        factor: of the values.
        by_examples: whether the x-axis is the number of examples instead of steps.
    """

    split: str
    name: str
    label: str
    factor: float
    by_examples: bool

    def curve(self, run: Run) -> dict[float, float]:
        """The values of a run by step or number of examples."""
        steps, values = finite_points([line for line in run.log if line["split"] == self.split], self.name)
        every = math.ceil(len(steps) / MAX_POINTS) or 1
        scale = run.settings["batch_size"] if self.by_examples else 1
        pairs = list(zip(steps, values, strict=True))[::-every][::-1]  # includes the last one
        return {scale * step: self.factor * value for step, value in pairs}


class LegendEntry(NamedTuple):
    """One group of runs in the legend.

    Attributes:
        dashes: value of SVG's stroke-dasharray, for a line that is two units wide.
        text: the layout and the settings in which the groups differ.
    """

    number: int
    color: str
    dashes: str
    text: str


class LearningCurves(NamedTuple):
    """The curves of one task.

    Attributes:
        figures: dev metric and training loss.
        n_gray: number of groups that are not in the legend.
        has_repetitions: whether a group has several runs.
    """

    task: str
    figures: list[str]
    legend: list[LegendEntry]
    n_gray: int
    has_repetitions: bool


def plot_learning_curves(groups: Sequence[list[Run]]) -> list[LearningCurves]:
    """The curves of each task that has several runs.

    Args:
        groups: runs that differ only in their seed and fold; numbered from 1 in the figures.
    """
    numbered = list(enumerate(groups, 1))
    tasks = dict.fromkeys(group[0].task for group in groups)
    of_tasks = [[(number, runs) for number, runs in numbered if runs[0].task == task] for task in tasks]
    return [_plot_task(members) for members in of_tasks if sum(len(runs) for _, runs in members) > 1]


def _plot_task(members: Sequence[tuple[int, list[Run]]]) -> LearningCurves:
    first = members[0][1][0]
    metric = first.metrics[0]
    percent = 100 if is_percentage(metric) else 1

    def rank(member: tuple[int, list[Run]]) -> float:
        return -statistics.mean(selection_key(run.final, metric)[0] for run in member[1])

    colored = {number for number, _ in sorted(members, key=rank)[:MAX_GROUPS]}
    groups = [Group(number, runs, number in colored) for number, runs in members]
    by_examples = len({run.settings["batch_size"] for group in groups for run in group.runs}) > 1
    score = Quantity("dev", metric, f"dev {with_unit(metric)}", percent, by_examples)
    loss = Quantity("train", "loss", "training loss (running mean)", 1, by_examples)
    legend = [
        LegendEntry(group.number, color_of(group.number), " ".join(f"{2 * d:g}" for d in dashes_of(group.number)), text)
        for group, text in zip(groups, describe_groups([group.runs for group in groups]), strict=True)
        if group.has_color
    ]
    return LearningCurves(
        first.task,
        [_plot(groups, score), _plot(groups, loss)],
        legend,
        len(groups) - len(legend),
        any(len(group.runs) > 1 for group in groups),
    )


def _plot(groups: Sequence[Group], quantity: Quantity) -> str:
    """One curve per group: the mean over its runs; if there are several, also a thin one per run."""
    axes = new_axes("examples" if quantity.by_examples else "step", quantity.label)
    ends = {}
    for group in sorted(groups, key=lambda group: group.has_color):
        curves = [quantity.curve(run) for run in group.runs]
        style: dict[str, Any] = {"color": TEXT_COLOR, "alpha": 0.25}
        if group.has_color:
            style = {"color": color_of(group.number), "linestyle": (0, dashes_of(group.number) or None)}
        if len(curves) > 1:
            for run, curve in zip(group.runs, curves, strict=True):
                thin = {"alpha": 0.6, **style, "linewidth": 0.7}
                axes.plot(list(curve), list(curve.values()), **thin, gid=f"title:{group.number}: {run.name}")
        mean = mean_curve(curves)
        names = ", ".join(run.name for run in group.runs)
        if quantity.split == "dev" and group.has_color:
            style |= {"marker": "o", "markersize": 3}
        axes.plot(list(mean), list(mean.values()), **style, linewidth=1.6, gid=f"title:{group.number}: {names}")
        if mean and group.has_color:
            ends[group.number] = list(mean.items())[-1]
    _number_curves(axes, ends)
    return to_svg(axes, f"{quantity.label} of {len(groups)} groups of runs")


def mean_curve(curves: Sequence[dict[float, float]]) -> dict[float, float]:
    """The mean of curves where all of them have a value."""
    return {x: sum(curve[x] for curve in curves) / len(curves) for x in curves[0] if all(x in curve for curve in curves)}


def _number_curves(axes: "Axes", ends: dict[int, tuple[float, float]]) -> None:
    """Writes the numbers of groups at the right, connected with the ends of their curves."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    order = sorted(ends, key=lambda number: ends[number][1])
    heights = spread([(ends[number][1] - low) / (high - low) for number in order], NUMBER_GAP)
    for number, height in zip(order, heights, strict=True):
        axes.annotate(
            str(number),
            ends[number],
            (1.04, height),
            textcoords="axes fraction",
            verticalalignment="center",
            color=TEXT_COLOR,
            arrowprops={"arrowstyle": "-", "color": color_of(number), "linewidth": 0.6, "shrinkA": 1, "shrinkB": 2},
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Moves increasing heights between 0 and 1 apart, if there is room for all."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    limit = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved


def describe_groups(groups: Sequence[list[Run]]) -> list[str]:
    """The layout of each group, the settings in which groups differ, and the number of seeds or folds."""
    settings = [group[0].settings for group in groups]
    names = dict.fromkeys(name for values in settings for name in values if name not in NOT_COMPARED)
    differing = [name for name in names if len({repr(values.get(name)) for values in settings}) > 1]
    texts = []
    for group, values in zip(groups, settings, strict=True):
        parts = [f"{name.replace('_', ' ')} {_format_setting(values.get(name))}" for name in differing[:MAX_SETTINGS]]
        parts += ["…"] if len(differing) > MAX_SETTINGS else []
        if len(group) > 1:
            has_folds = group[0].repetition[1] is not None
            parts.append(count_repetitions(group) + ("" if has_folds else " seeds"))
        texts.append(", ".join([f"layout {values['blocks']}", *parts]))
    return texts


def _format_setting(value: Any) -> str:
    """Numbers without trailing zeros, paths without folders."""
    if isinstance(value, float):
        return f"{value:g}"
    return Path(value).name or value if isinstance(value, str) else str(value).lower()

"""A confusion matrix of many classes as a heat map: an SVG drawing in the page's colors."""

import html
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from funnel.errors import shorten

MAX_CLASSES = 300  # above this, cells would be too small
MAX_ORDERED_CLASSES = 30  # up to this, classes keep their order and cells show their counts
MAX_TITLES = 1500  # cells that show their count when pointed at: the ones with the largest counts
MAX_NAME_LENGTH = 20  # characters of a label next to an axis
SIZE = 600.0  # of the matrix; the unit of length of the drawing
FONT_SIZE = 9.0
SHADES = 6


class Cell(NamedTuple):
    """A cell whose number is not 0."""

    row: int
    column: int
    number: int
    share: float  # of the row


def draw_heat_map(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> str:
    """The matrix with rows of labels and columns of predictions; if it is large, classes that are confused are adjacent.

    Correct predictions and errors have different colors; their opacity grows with the square root of the share of the row, so
    that rare errors are visible. If labels do not fit next to an axis, every second, third, ... class has one.

    Args:
        matrix: [label, prediction] counts.
    """
    confusion = np.array(matrix)
    is_large = len(labels) > MAX_ORDERED_CLASSES
    order = cluster_order(confusion) if is_large else list(range(len(labels)))
    names, confusion = [labels[i] for i in order], confusion[np.ix_(order, order)]
    totals = confusion.sum(1)
    cells = [Cell(i, j, int(confusion[i, j]), float(confusion[i, j] / totals[i])) for i, j in np.argwhere(confusion).tolist()]
    size = SIZE / len(names)
    margin = 8 + 0.56 * FONT_SIZE * max(len(shorten(name, MAX_NAME_LENGTH)) for name in names)
    width = margin + SIZE + 1
    numbers = "" if is_large else _draw_numbers(cells, size)
    return (
        f'<svg class="heat" viewBox="0 0 {width:.0f} {width + FONT_SIZE:.0f}" role="img" aria-label="confusion matrix">'
        f'<g transform="translate({margin:.1f} {FONT_SIZE:.0f})">'
        f'<rect class="frame" width="{SIZE:.0f}" height="{SIZE:.0f}"/>'
        f'<g transform="scale({size:.5g})">{_draw_cells(cells, names, totals)}</g>{numbers}{_draw_names(names, size)}</g></svg>'
    )


def cluster_order(confusion: np.ndarray) -> list[int]:
    """An order in which classes that are confused with each other are close: that of an average-linkage clustering.

    Two clusters are joined at the ends that are confused most often. Clusters that are never confused stay in the order of
    their first class.

    Args:
        confusion: [label, prediction] counts.
    """
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    similarity = shares + shares.T
    np.fill_diagonal(similarity, 0)
    links = similarity.copy()  # mean similarity of the classes of two clusters
    clusters = {i: [i] for i in range(len(confusion))}
    while links.size and links.max() > 0:
        first, second = sorted(divmod(int(links.argmax()), len(links)))
        a, b = clusters[first], clusters.pop(second)
        links[first] = links[:, first] = (len(a) * links[first] + len(b) * links[second]) / (len(a) + len(b))
        links[second] = links[:, second] = links[first, first] = 0
        options = itertools.product((a, a[::-1]), (b, b[::-1]))
        left, right = max(options, key=lambda pair: similarity[pair[0][-1], pair[1][0]])
        clusters[first] = left + right
    return [i for cluster in clusters.values() for i in cluster]


def _draw_cells(cells: Sequence[Cell], names: Sequence[str], totals: np.ndarray) -> str:
    """Cells of size 1. Those with a title are elements of their own, the others one path per color."""
    titled = set(sorted(cells, key=lambda cell: (cell.row != cell.column, -cell.number))[:MAX_TITLES])
    shades: defaultdict[tuple[bool, int], list[Cell]] = defaultdict(list)
    for cell in cells:
        shades[cell.row == cell.column, min(SHADES, 1 + int(SHADES * cell.share**0.5))].append(cell)
    groups = []
    for (is_right, shade), members in sorted(shades.items()):
        elements, path = [], ""
        for cell in members:
            square = f"M{cell.column} {cell.row}h1v1h-1z"
            if cell not in titled:
                path += square
                continue
            name, predicted = (html.escape(names[i]) for i in (cell.row, cell.column))
            of_total = f"{cell.number:,} of {totals[cell.row]:,}"
            title = f"{name}: {of_total} correct" if is_right else f"{name}, predicted {predicted}: {of_total}"
            elements.append(f'<path d="{square}"><title>{title}</title></path>')
        if path:
            elements.append(f'<path d="{path}"/>')
        color = "right" if is_right else "wrong"
        groups.append(f'<g class="{color}" fill-opacity="{0.15 + 0.65 * shade / SHADES:.2f}">{"".join(elements)}</g>')
    return "".join(groups)


def _draw_numbers(cells: Sequence[Cell], size: float) -> str:
    texts = (
        f'<text x="{(cell.column + 0.5) * size:.1f}" y="{(cell.row + 0.5) * size + FONT_SIZE / 3:.1f}">{cell.number:,}</text>'
        for cell in cells
    )
    return f'<g class="numbers">{"".join(texts)}</g>'


def _draw_names(names: Sequence[str], size: float) -> str:
    """Labels at the left and below, with ticks; only as many as fit."""
    step = int(np.ceil(1.15 * FONT_SIZE / size))
    parts = []
    for i in range(0, len(names), step):
        name, short = html.escape(names[i]), html.escape(shorten(names[i], MAX_NAME_LENGTH))
        middle = (i + 0.5) * size
        text = f'<path class="frame" d="M-3 0h3"/><text x="-5" y="{FONT_SIZE / 3:.0f}"><title>{name}</title>{short}</text>'
        parts.append(f'<g transform="translate(0 {middle:.1f})">{text}</g>')
        parts.append(f'<g transform="translate({middle:.1f} {SIZE:.0f}) rotate(-90)">{text}</g>')
    return f'<g class="names">{"".join(parts)}</g>'

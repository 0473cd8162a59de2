"""Cross-validation: divides rows into folds of which each is the dev set of one run.

The folds are disjoint and cover all rows. Rows that belong together (the windows of an example, the questions about a text,
examples with the same text) are in the same fold, so that no text is in both train and dev.
"""

import re

import numpy as np

from funnel.errors import FunnelError

FOLD = re.compile(r"([1-9]\d{0,5})/([1-9]\d{0,5})")


def parse_fold(text: str) -> tuple[int, int]:
    """ "2/5" -> (2, 5): the second one of five.

    Raises:
        FunnelError: the text has another form or a number is out of range.
    """
    match = FOLD.fullmatch(text)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if count < 2 or number > count:
        raise FunnelError(f"invalid fold {text!r}: expected K/N with K from 1 to N and N at least 2, such as 2/5", "fold")
    return number, count


def join_groups(groups: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Numbers units of rows, from 0: rows of the same group or with the same hash are in the same unit. All arrays are [n]."""
    keys = [np.unique(key, return_inverse=True)[1] for key in (groups, hashes)]
    units = np.arange(len(groups))
    while True:
        joined = units
        for key in keys:
            lowest = np.full(key.max() + 1, len(groups))
            np.minimum.at(lowest, key, joined)
            joined = lowest[key]
        if np.array_equal(joined, units):
            return np.unique(units, return_inverse=True)[1]
        units = joined


def assign_folds(units: np.ndarray, classes: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """The fold of every row, [n], from 0; each fold gets about the same number of rows, and of rows of each class.

    Units are assigned at random, class by class and the larger ones first, to the fold with the fewest rows of the class so
    far, and among these to the smallest one. So if every unit is one row, the folds differ by at most one row, in each class
    and in total.

    Args:
        units: [n], as from `join_groups`, at least `n_folds` different ones. A unit has the class of its first row.
        classes: [n], class numbers.
    """
    _, firsts, sizes = np.unique(units, return_index=True, return_counts=True)
    class_of_unit = classes[firsts]
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.lexsort((-sizes[order], class_of_unit[order]))]  # stable: random among units of a class and size
    folds = np.empty(len(sizes), int)
    totals = [0] * n_folds
    in_class, current = totals, None
    for unit in order:
        if class_of_unit[unit] != current:
            in_class, current = [0] * n_folds, class_of_unit[unit]
        fold = min(range(n_folds), key=lambda k: (in_class[k], totals[k]))
        folds[unit] = fold
        in_class[fold] += sizes[unit]
        totals[fold] += sizes[unit]
    return folds[units]

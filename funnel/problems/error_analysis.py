"""Error analysis on a labeled dataset, whose content depends on the kind of problem: evaluation.json.

A run saves the analysis of dev with its best checkpoint, so that a report needs neither the data nor the model. Common keys:

    examples   number of examples
    mistakes   those with the largest loss, among the wrong ones where predictions are right or wrong, each with `text`
               (decoded from the ids), `label` and `predicted`, and for classes also `probability` (of both)
    classes    `label`, `precision`, `recall`, `f1` and number of `examples` of each class; 0 where undefined
    labels, confusion   names of the classes; [label, prediction] counts
    points     for scores: pairs of label and prediction from evenly spaced rows
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from funnel.data.dataset import Dataset
from funnel.data.tokenizer import FunnelTokenizer

EVALUATION_FILE = "evaluation.json"
MAX_MISTAKES = 20
MAX_TEXT_LENGTH = 600  # characters of a mistake's text
MAX_POINTS = 500  # in the scatter plot of a regression task


def list_mistakes(
    cost: np.ndarray, describe: Callable[[int], dict[str, Any]], dataset: Dataset, tokenizer: FunnelTokenizer
) -> list[dict[str, Any]]:
    """The rows with the highest cost, with their texts.

    Args:
        cost: [n]; -inf for rows that are no mistakes.
        describe: label and prediction of a row.
    """
    order = np.argsort(-cost, kind="stable")[:MAX_MISTAKES]
    worst = [int(row) for row in order if cost[row] > -np.inf]
    texts = [tokenizer.decode(dataset.input_ids(row))[:MAX_TEXT_LENGTH] for row in worst]
    return [{"text": text, **describe(row)} for text, row in zip(texts, worst, strict=True)]


def count_confusions(labels: np.ndarray, predictions: np.ndarray, n_classes: int) -> np.ndarray:
    """The confusion matrix, [label, prediction]."""
    confusion = np.zeros((n_classes, n_classes), dtype=int)
    np.add.at(confusion, (labels, predictions), 1)
    return confusion


def class_scores(names: Sequence[str], correct: np.ndarray, actual: np.ndarray, predicted: np.ndarray) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each class, from counts by class."""
    precision, recall = correct / np.maximum(predicted, 1), correct / np.maximum(actual, 1)
    f1 = 2 * correct / np.maximum(actual + predicted, 1)
    return [
        {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "examples": int(n)}
        for name, p, r, f, n in zip(names, precision, recall, f1, actual, strict=True)
    ]


def single_class_warning(evaluation: Mapping[str, Any]) -> str | None:
    """A warning if a classifier predicts the same class for all examples while their labels differ, else None.

    Args:
        evaluation: from `Problem.analyze`; empty if there is none.
    """
    confusion = np.array(evaluation.get("confusion", []), ndmin=2)  # [label, prediction]
    predicted, actual = np.flatnonzero(confusion.sum(0)), confusion.sum(1)
    if len(predicted) != 1 or np.count_nonzero(actual) == 1:
        return None
    name, share = evaluation["labels"][predicted[0]], actual[predicted[0]] / actual.sum()
    return f"predicts {name!r} for all {actual.sum():,} examples of dev; its accuracy, {share:.1%}, is that class's frequency"

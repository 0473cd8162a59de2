"""Error analysis on a labeled dataset, whose content depends on the kind of problem: evaluation.json.

A run saves the analysis of dev with its best checkpoint, so that a report needs neither the data nor the model. Common keys:

    examples   number of examples
    mistakes   those with the largest loss, among the wrong ones where predictions are right or wrong, each with `text`
               (decoded from the ids), `label` and `predicted`, and for classes also `probability` (of both)
    unit       what a prediction is about, in the singular: "example", "question", "word", or, where each class is predicted
               separately, "decision"
    classes    `label`, `precision`, `recall`, `f1` and number of `examples` of each class; 0 where undefined
    averages   the same for all classes together (micro), and means over the classes (macro, weighted by `examples`)
    calibration   of the probabilities of the predictions, as in `calibrate`; of decisions, those of each class
    labels, confusion   names of the classes; [label, prediction] counts
    points     for scores: pairs of label and prediction from evenly spaced rows

Runs of earlier versions lack `unit`, `averages` and `calibration`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from funnel.data.dataset import Dataset
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import plural
from funnel.problems.calibration import calibrate
from funnel.problems.metrics import ClassCounts

EVALUATION_FILE = "evaluation.json"
MAX_MISTAKES = 20
MAX_TEXT_LENGTH = 600  # characters of a mistake's text
MAX_POINTS = 500  # in the scatter plot of a regression task


class ClassPredictions(NamedTuple):
    """Predictions of one class per example, compared with the labels.

    Attributes:
        predictions: class ids, [n].
        probabilities: of each class, [n, k].
        cost: the loss where a prediction is wrong, else -inf, [n].
        calibration: as in `calibrate`.
    """

    predictions: np.ndarray
    probabilities: np.ndarray
    cost: np.ndarray
    calibration: dict[str, Any]


def compare_predictions(logits: Tensor, labels: np.ndarray) -> ClassPredictions:
    """The most probable class of each example, compared with its label.

    Args:
        logits: [n, k].
        labels: [n].
    """
    predictions, probabilities = logits.argmax(1).numpy(), logits.double().softmax(1).numpy()
    losses = F.cross_entropy(logits.double(), torch.from_numpy(labels).long(), reduction="none").numpy()
    cost = np.where(predictions == labels, -np.inf, np.nan_to_num(losses, nan=np.inf))
    confidence = np.take_along_axis(probabilities, predictions[:, None], 1)[:, 0]
    return ClassPredictions(predictions, probabilities, cost, calibrate(confidence, predictions == labels))


def list_mistakes(
    cost: np.ndarray, describe: Callable[[int], dict[str, Any]], dataset: Dataset, tokenizer: FunnelTokenizer
) -> list[dict[str, Any]]:
    """The rows with the highest cost, with their texts.

    Args:
        cost: [n]; -inf for rows that are not mistakes.
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


def confusion_counts(confusion: np.ndarray) -> ClassCounts:
    """The counts of each class in a confusion matrix, [label, prediction]."""
    return ClassCounts(confusion.diagonal(), confusion.sum(1), confusion.sum(0))


def score_classes(names: Sequence[str], counts: ClassCounts, average_all: bool = False) -> dict[str, Any]:
    """`classes` and `averages` of an error analysis.

    Args:
        average_all: whether the macro average includes classes that occur in neither labels nor predictions, as scikit-learn's
            does for several labels per example, but not for one.
    """
    correct, actual, predicted = counts
    precision, recall = correct / np.maximum(predicted, 1), correct / np.maximum(actual, 1)
    scores = np.stack([precision, recall, 2 * correct / np.maximum(actual + predicted, 1)])
    total, included = int(actual.sum()), np.full(len(names), True) if average_all else actual + predicted > 0
    averages = {
        "micro average": (counts.precision, counts.recall, counts.f1),
        "macro average": scores[:, included].sum(1) / max(1, np.count_nonzero(included)),
        "weighted average": scores @ actual / max(1, total),
    }

    def describe(label: str, values: Iterable[float], examples: int) -> dict[str, Any]:
        p, r, f1 = map(float, values)
        return {"label": label, "precision": p, "recall": r, "f1": f1, "examples": examples}

    return {
        "classes": [describe(name, row, int(n)) for name, row, n in zip(names, scores.T, actual, strict=True)],
        "averages": [describe(name, values, total) for name, values in averages.items()],
    }


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
    count = plural(int(actual.sum()), evaluation.get("unit", "example"))
    return f"predicts {name!r} for all {count} of dev; its accuracy, {share:.1%}, is that class's frequency"

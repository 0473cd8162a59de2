"""Evaluation metrics; they match scikit-learn and SciPy including in degenerate cases.

Predictions and labels are arrays of the same length: label ids from 0, scores, or one indicator per class.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Metric = Callable[[Any, Any], float]  # of predictions and labels


class ClassCounts(NamedTuple):
    """Numbers of labels and predictions by class, [k] each; the properties are scores of all classes together."""

    correct: np.ndarray
    actual: np.ndarray
    predicted: np.ndarray

    @property
    def precision(self) -> float:
        """Share of the predictions that are correct; 0 if there are none."""
        return float(self.correct.sum() / max(1, self.predicted.sum()))

    @property
    def recall(self) -> float:
        """Share of the labels that are predicted; 0 if there are none."""
        return float(self.correct.sum() / max(1, self.actual.sum()))

    @property
    def f1(self) -> float:
        """The harmonic mean of both; 0 if both are 0."""
        return float(2 * self.correct.sum() / max(1, self.predicted.sum() + self.actual.sum()))


LOSS = "loss"  # may be chosen like a metric, but is computed from the logits
LOWER_IS_BETTER = frozenset({LOSS, "rmse"})


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of correct predictions."""
    return float((predictions == labels).mean())


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1, as GLUE defines it; 0 if precision and recall are both 0."""
    return f1_of_class(1, predictions, labels)


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Unweighted mean of F1 over the classes that occur in predictions or labels."""
    return float(np.mean([f1_of_class(c, predictions, labels) for c in np.union1d(predictions, labels)]))


def f1_of_class(label: int, predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of the class with the id `label`; 0 if precision and recall are both 0."""
    true_positives = int(((predictions == label) & (labels == label)).sum())
    predicted_and_actual = int((predictions == label).sum()) + int((labels == label).sum())
    return 2 * true_positives / predicted_and_actual if predicted_and_actual else 0.0


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation coefficient for any number of classes (Gorodkin 2004, equation 8); 0 if either side is constant."""
    classes = np.union1d(predictions, labels)
    predicted = (predictions[:, None] == classes).sum(0, dtype=np.float64)
    actual = (labels[:, None] == classes).sum(0, dtype=np.float64)
    correct, n = float((predictions == labels).sum()), float(len(labels))
    denominator = (n**2 - predicted @ predicted) * (n**2 - actual @ actual)
    return float((correct * n - predicted @ actual) / np.sqrt(denominator)) if denominator else 0.0


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation; NaN if either side is constant or not finite."""
    if not (np.isfinite(predictions).all() and np.isfinite(labels).all()):
        return float("nan")
    if len(labels) < 2 or (predictions == predictions[0]).all() or (labels == labels[0]).all():
        return float("nan")
    x, y = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (predictions, labels))
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    return float(np.clip(x @ y, -1, 1))


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman rank correlation; NaN if either side is constant or contains NaN."""
    if np.isnan(predictions).any() or np.isnan(labels).any():
        return float("nan")
    return pearson(_ranks(predictions), _ranks(labels))


def rmse(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Root mean squared error, in float64: squares of large labels overflow in float32."""
    return float(np.sqrt(np.square(predictions.astype(np.float64) - labels).mean()))


def micro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 over all decisions. [n, k] each; nonzero where a class applies. 0 if precision and recall are both 0."""
    return f1_of_class(1, (predictions != 0).astype(int), (labels != 0).astype(int))


def mean_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Unweighted mean of F1 over all classes. [n, k] each; 0 for a class that is neither predicted nor a label."""
    return float(np.mean([micro_f1(predictions[:, k], labels[:, k]) for k in range(labels.shape[1])]))


def subset_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of examples whose classes are all right. [n, k] each."""
    return float(((predictions != 0) == (labels != 0)).all(1).mean())


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values get their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


CLASSIFICATION: dict[str, Metric] = {"accuracy": accuracy, "f1": f1, "f1 (macro)": macro_f1, "matthews": matthews}
MULTI_LABEL: dict[str, Metric] = {"f1 (micro)": micro_f1, "f1 (macro)": mean_f1, "subset accuracy": subset_accuracy}
REGRESSION: dict[str, Metric] = {"pearson": pearson, "spearman": spearman, "rmse": rmse}


# --- choosing the best evaluation -------------------------------------------------------------------------------------


def selection_key(scores: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """Sorts evaluations from the worst to the best by `metric`, and equal ones by their loss.

    NaN and None are the worst value of the metric, and of the loss.
    """
    return _sortable(scores.get(metric), metric), _sortable(scores.get(LOSS), LOSS)


def _sortable(value: float | None, metric: str) -> float:
    if value is None or math.isnan(value):
        return -math.inf
    return -value if metric in LOWER_IS_BETTER else value

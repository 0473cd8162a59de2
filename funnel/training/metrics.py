"""Evaluation metrics; they match scikit-learn and SciPy in degenerate cases, too.

Predictions and labels are arrays of the same length: label ids from 0, or scores.
"""

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of correct predictions."""
    return float((predictions == labels).mean())


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1; 0 if precision and recall are both 0."""
    return _f1_of_class(1, predictions, labels)


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Unweighted mean of F1 over the classes that occur in predictions or labels."""
    return float(np.mean([_f1_of_class(c, predictions, labels) for c in np.union1d(predictions, labels)]))


def _f1_of_class(label: int, predictions: np.ndarray, labels: np.ndarray) -> float:
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
    """Pearson correlation; NaN if either side is constant."""
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


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values get their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


METRICS = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}

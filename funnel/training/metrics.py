"""How good predictions are, as GLUE reports it.

Labels and predictions are equally long arrays: of label ids from 0 on, or of scores. Values are scikit-learn's and scipy's,
also where a measure has no meaning: Matthews' coefficient of a constant is 0, a correlation with a constant is nan.
"""

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The share of predictions that are right."""
    return float((predictions == labels).mean())


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1: the harmonic mean of precision and recall; 0 where both are 0."""
    return _f1_of(1, predictions, labels)


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean of F1 over the classes that occur in predictions or labels."""
    return float(np.mean([_f1_of(c, predictions, labels) for c in np.union1d(predictions, labels)]))


def _f1_of(label: int, predictions: np.ndarray, labels: np.ndarray) -> float:
    hits = int(((predictions == label) & (labels == label)).sum())
    named = int((predictions == label).sum()) + int((labels == label).sum())
    return 2 * hits / named if named else 0.0


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation coefficient, for any number of classes (Gorodkin 2004, equation 8); 0 for a constant."""
    classes = np.union1d(predictions, labels)
    predicted = (predictions[:, None] == classes).sum(0, dtype=np.float64)
    real = (labels[:, None] == classes).sum(0, dtype=np.float64)
    right, n = float((predictions == labels).sum()), float(len(labels))
    both = (n**2 - predicted @ predicted) * (n**2 - real @ real)
    return float((right * n - predicted @ real) / np.sqrt(both)) if both else 0.0


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation; nan where one side is constant."""
    if len(labels) < 2 or (predictions == predictions[0]).all() or (labels == labels[0]).all():
        return float("nan")
    x, y = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (predictions, labels))
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    return float(np.clip(x @ y, -1, 1))


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's correlation: Pearson's of the ranks; nan where one side is constant or not a number."""
    if np.isnan(predictions).any() or np.isnan(labels).any():
        return float("nan")
    return pearson(_ranks(predictions), _ranks(labels))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 on; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


METRICS = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}

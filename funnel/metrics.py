"""How good predictions are, as GLUE reports it. Labels and predictions are equally long arrays of label ids."""

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The share of predictions that are right."""
    return float((predictions == labels).mean())


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1: the harmonic mean of precision and recall; 0 where both are 0."""
    hits = int(((predictions == 1) & (labels == 1)).sum())
    named = int((predictions == 1).sum()) + int((labels == 1).sum())
    return 2 * hits / named if named else 0.0


METRICS = {"accuracy": accuracy, "f1": f1}

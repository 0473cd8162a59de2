"""Metrics against scikit-learn."""

import numpy as np
import pytest

from funnel.metrics import METRICS

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference")
PEERS = {
    "accuracy": sklearn_metrics.accuracy_score,
    "f1": lambda labels, predictions: sklearn_metrics.f1_score(labels, predictions, zero_division=0),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_scikit_learns(name):
    random = np.random.default_rng(0)
    cases = [(random.integers(0, 2, n), random.integers(0, 2, n)) for n in (1, 2, 7, 100, 999) for _ in range(20)]
    constants = [np.zeros(9, dtype=int), np.ones(9, dtype=int)]
    cases += [(a, b) for a in constants for b in [*constants, random.integers(0, 2, 9)]]
    for predictions, labels in cases:
        assert abs(METRICS[name](predictions, labels) - PEERS[name](labels, predictions)) < 1e-12

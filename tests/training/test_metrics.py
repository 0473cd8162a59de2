"""Metrics compared with scikit-learn and scipy."""

import warnings

import numpy as np
import pytest

from funnel.training.metrics import METRICS

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference")
stats = pytest.importorskip("scipy.stats", reason="scipy is the reference")
REFERENCES = {
    "accuracy": sklearn_metrics.accuracy_score,
    "f1": lambda labels, predictions: sklearn_metrics.f1_score(labels, predictions, zero_division=0),
    "macro_f1": lambda labels, predictions: sklearn_metrics.f1_score(labels, predictions, zero_division=0, average="macro"),
    "matthews": sklearn_metrics.matthews_corrcoef,
    "pearson": lambda labels, predictions: stats.pearsonr(labels, predictions).statistic,
    "spearman": lambda labels, predictions: stats.spearmanr(labels, predictions).statistic,
}


def cases(name):
    """Pairs of predictions and labels, random and degenerate."""
    random = np.random.default_rng(0)
    sizes = [n for n in (2, 3, 7, 100, 999) for _ in range(20)]
    if name in ("pearson", "spearman"):
        yield from ((random.normal(size=n).astype(np.float32), random.uniform(0, 5, n).astype(np.float32)) for n in sizes)
        for n in sizes:  # many ties, and large values that hardly differ
            yield random.integers(0, 3, n).astype(np.float32), random.integers(0, 3, n) + 1e6
        varied, constant = random.normal(size=9), np.full(9, 2.5)
        yield from [(varied, constant), (constant, varied), (constant, constant), (varied, varied), (varied, -varied)]
        return
    for n_classes in (2,) if name == "f1" else (2, 3, 7):
        yield from ((random.integers(0, n_classes, n), random.integers(0, n_classes, n)) for n in [1, *sizes])
        constants = [np.full(9, c) for c in range(n_classes)]
        yield from ((a, b) for a in constants for b in [*constants, random.integers(0, n_classes, 9)])
        yield from ((random.integers(0, n_classes, 9), constant) for constant in constants)


@pytest.mark.parametrize("name", METRICS)
def test_metrics_equal_scikit_learn_and_scipy(name):
    count = 0
    for predictions, labels in cases(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = REFERENCES[name](labels.astype(np.float64), predictions.astype(np.float64))
        actual = METRICS[name](predictions, labels)
        assert actual == pytest.approx(expected, abs=1e-12, nan_ok=True), (predictions, labels)
        count += 1
    assert count > 100


def test_spearman_of_nan_is_nan():
    predictions, labels = np.array([1.0, np.nan, 2.0]), np.array([1.0, 2.0, 3.0])
    assert np.isnan(stats.spearmanr(predictions, labels).statistic)
    assert np.isnan(METRICS["spearman"](predictions, labels))

"""Metrics compared with scikit-learn and scipy; metrics by name; the order of evaluations."""

import math
import warnings

import numpy as np
import pytest
import torch
from conftest import tiny_config

from funnel.data.encoding import encode_texts
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.problems.classification import Classification
from funnel.problems.metrics import CLASSIFICATION, REGRESSION, selection_key
from funnel.training.state import TrainState

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference")
stats = pytest.importorskip("scipy.stats", reason="scipy is the reference")
METRICS = CLASSIFICATION | REGRESSION
REFERENCES = {
    "accuracy": sklearn_metrics.accuracy_score,
    "f1": lambda labels, predictions: sklearn_metrics.f1_score(labels, predictions, zero_division=0),
    "f1 (macro)": lambda labels, predictions: sklearn_metrics.f1_score(labels, predictions, zero_division=0, average="macro"),
    "matthews": sklearn_metrics.matthews_corrcoef,
    "pearson": lambda labels, predictions: stats.pearsonr(labels, predictions).statistic,
    "spearman": lambda labels, predictions: stats.spearmanr(labels, predictions).statistic,
    "rmse": sklearn_metrics.root_mean_squared_error,
}


def cases(name):
    """Pairs of predictions and labels, random and degenerate."""
    random = np.random.default_rng(0)
    sizes = [n for n in (2, 3, 7, 100, 999) for _ in range(20)]
    if name in ("pearson", "spearman", "rmse"):
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


def test_correlations_of_infinite_predictions_are_nan():
    predictions, labels = np.array([1.0, np.inf, 2.0], np.float32), np.array([1.0, 2.0, 3.0], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(METRICS["pearson"](predictions, labels))


# --- metrics by name --------------------------------------------------------------------------------------------------


def test_f1_of_a_named_class_equals_scikit_learn():
    random, names = np.random.default_rng(0), ["a", "macro", "c"]
    predictions, labels = random.integers(0, 3, 50), random.integers(0, 3, 50)
    expected = sklearn_metrics.f1_score(labels, predictions, labels=[2], average=None)[0]
    assert Classification.metric_functions(names)["f1 (c)"](predictions, labels) == pytest.approx(expected)
    macro = sklearn_metrics.f1_score(labels, predictions, average="macro")
    assert Classification.metric_functions(names)["f1 (macro)"](predictions, labels) == pytest.approx(
        macro
    )  # a class has this name, too


def test_an_unknown_metric_is_an_error_that_lists_the_choices():
    problem = Classification(tiny_config(id2label={0: "a"}))
    dataset = encode_texts(["a"], None, FunnelTokenizer.train(["a"]), 8)
    with pytest.raises(FunnelError, match=r"unknown metric 'f1 \(d\)'; choose from accuracy, f1, .*, f1 \(a\), loss$"):
        problem.score(torch.zeros(1, 1), dataset, ["f1 (d)"])


# --- the order of evaluations -----------------------------------------------------------------------------------------

NAN = math.nan


@pytest.mark.parametrize(
    ("metric", "from_worst_to_best"),
    [
        ("accuracy", [(NAN, NAN), (NAN, 0.3), (NAN, 0.2), (0.0, 0.1), (0.9, NAN), (0.9, 0.5), (0.9, 0.4), (1.0, 9.0)]),
        ("rmse", [(NAN, 0.1), (9.0, 0.1), (8.0, 0.3), (8.0, 0.2)]),
        ("loss", [(NAN, NAN), (0.5, 0.5), (0.25, 0.25)]),
    ],
)
def test_ties_and_nan_are_decided_by_the_loss(metric, from_worst_to_best):
    evaluations = [{metric: score, "loss": loss} for score, loss in from_worst_to_best]
    state = TrainState()
    for step, scores in enumerate(evaluations, 1):
        state.step = step
        assert state.record_evaluation(scores, metric)
        assert not state.record_evaluation(scores, metric)  # the first of equal ones is kept
        for worse in evaluations[: step - 1]:
            assert not state.record_evaluation(worse, metric)
        assert state.best["step"] == step
    logged = [{name: None if math.isnan(value) else value for name, value in scores.items()} for scores in evaluations]
    assert sorted(logged, key=lambda line: selection_key(line, metric)) == logged

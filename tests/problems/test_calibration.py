"""Calibration compared with torchmetrics, scikit-learn and hand-computed values."""

import numpy as np
import pytest
import torch
from conftest import tiny_config
from test_multi_label import dataset_of

from funnel.problems.calibration import N_BINS, calibrate
from funnel.problems.error_analysis import compare_predictions
from funnel.problems.multi_label import MultiLabel

metrics = pytest.importorskip("torchmetrics.functional.classification", reason="needs torchmetrics")
calibration_curve = pytest.importorskip("sklearn.calibration").calibration_curve


def cases():
    """Probabilities and outcomes: well calibrated ones, too high ones, few, one, and all in one bin."""
    random = np.random.default_rng(0)
    for n, power in ((2000, 1.0), (2000, 3.0), (20, 1.0), (1, 1.0)):
        probabilities = random.random(n)
        yield probabilities, random.random(n) < probabilities**power
    yield 0.4 + random.random(30) / 1000, random.random(30) < 0.5


@pytest.mark.parametrize(("probabilities", "is_right"), cases())
def test_the_error_equals_torchmetrics(probabilities, is_right):
    expected = metrics.binary_calibration_error(torch.tensor(probabilities), torch.tensor(is_right).int(), N_BINS, "l1")
    assert calibrate(probabilities, is_right)["ece"] == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize(("probabilities", "is_right"), [*cases(), (np.arange(16) / 15, np.arange(16) % 2 == 0)])
def test_bins_equal_those_of_scikit_learn_including_their_limits(probabilities, is_right):
    result = calibrate(probabilities, is_right)
    accuracy, confidence = calibration_curve(is_right, probabilities, n_bins=N_BINS)
    assert [b["accuracy"] for b in result["bins"]] == pytest.approx(list(accuracy))
    assert [b["confidence"] for b in result["bins"]] == pytest.approx(list(confidence))
    assert sum(b["count"] for b in result["bins"]) == result["count"] == len(probabilities)
    for b in result["bins"]:
        assert b["low"] <= b["confidence"] <= b["high"]


def test_the_error_of_classes_is_that_of_the_most_probable_one():
    random = np.random.default_rng(1)
    logits, labels = torch.from_numpy(random.normal(size=(500, 7)) * 3), random.integers(0, 7, 500)
    logits[np.arange(500), labels] += 3
    expected = metrics.multiclass_calibration_error(logits.softmax(1), torch.from_numpy(labels), 7, N_BINS, "l1")
    result = compare_predictions(logits, labels).calibration
    assert result["ece"] == pytest.approx(float(expected), abs=1e-7)  # torchmetrics adds up in float32
    assert result["accuracy"] == pytest.approx(float((logits.argmax(1).numpy() == labels).mean()))


def test_the_error_of_several_labels_pools_the_decisions_of_all_classes():
    random = np.random.default_rng(2)
    labels = (random.random((200, 5)) < 0.2).astype(np.float32)
    logits = torch.from_numpy(random.normal(size=(200, 5)) + 2 * labels).float()
    config = tiny_config(id2label=dict(enumerate("abcde")), problem_type="multi_label_classification")
    analysis = MultiLabel(config).analyze(logits, dataset_of(labels), Decoder())
    target = torch.from_numpy(labels).int().flatten()
    expected = metrics.binary_calibration_error(logits.double().sigmoid().flatten(), target, N_BINS, "l1")
    assert analysis["calibration"]["ece"] == pytest.approx(float(expected), abs=1e-9)
    assert (analysis["unit"], analysis["calibration"]["count"]) == ("decision", 1000)


class Decoder:
    """A tokenizer for rows without texts."""

    def decode(self, ids):
        return ""


def test_a_hand_computed_error():
    result = calibrate(np.array([0.9, 0.91, 0.92, 0.5]), np.array([True, True, False, False]))
    assert result["ece"] == pytest.approx((abs(0.9 + 0.91 + 0.92 - 2) + 0.5) / 4)
    assert [b["count"] for b in result["bins"]] == [1, 3]
    assert (result["confidence"], result["accuracy"]) == (pytest.approx(3.23 / 4), 0.5)


def test_equal_probabilities_have_the_error_of_one_bin():
    for probability, bounds in ((0.0, (0, 1 / 15)), (0.5, (7 / 15, 8 / 15)), (1.0, (14 / 15, 1))):
        result = calibrate(np.full(4, probability), np.array([True, False, False, False]))
        assert result["ece"] == pytest.approx(abs(probability - 0.25))
        assert [(b["low"], b["high"]) for b in result["bins"]] == [pytest.approx(bounds)]


def test_values_that_are_not_finite_are_left_out():
    result = calibrate(np.array([np.nan, 0.5, np.inf]), np.array([True, True, False]))
    assert (result["count"], result["ece"]) == (1, 0.5)
    empty = calibrate(np.array([np.nan]), np.array([True]))
    assert empty == {"ece": 0, "count": 0, "confidence": 0, "accuracy": 0, "bins": []}

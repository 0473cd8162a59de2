"""Error analysis compared with scikit-learn and with hand-computed values."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_config
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from funnel.data.encoding import encode_texts
from funnel.data.tokenizer import FunnelTokenizer
from funnel.problems.error_analysis import score_classes, single_class_warning
from funnel.problems.metrics import ClassCounts
from funnel.problems.registry import problem_of

TEXTS = ["a good film", "a bad film", "no film", "good", "bad", ""]
REGRESSION = tiny_config(id2label={0: "score"}, problem_type="regression")


@pytest.fixture(scope="module")
def tokenizer():
    return FunnelTokenizer.train(TEXTS * 5)


def make_dataset(tokenizer, labels, pairs=None):
    dataset = encode_texts(TEXTS, pairs, tokenizer, 32)
    return replace(dataset, rows=dataset.rows._replace(labels=np.array(labels)))


def analyze(logits, dataset, config, tokenizer):
    return problem_of("FunnelForSequenceClassification", config).analyze(logits, dataset, tokenizer)


def classifier_config(names):
    return tiny_config(id2label=dict(enumerate(names)))


def test_confusion_matrix_and_mistakes_in_order_of_loss(tokenizer):
    labels = [0, 1, 2, 1, 0, 2]
    logits = torch.tensor([[3.0, 0, 0], [9, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [5, 5, 0]])
    results = analyze(logits, make_dataset(tokenizer, labels), classifier_config(["bad", "good", "none"]), tokenizer)
    assert results["confusion"] == confusion_matrix(labels, logits.argmax(1)).tolist()
    assert [mistake["text"] for mistake in results["mistakes"]] == ["a bad film", "", "good", "bad"]
    worst = results["mistakes"][0]
    assert (worst["label"], worst["predicted"]) == ("good", "bad")
    assert worst["probability"] == pytest.approx(logits.softmax(1)[1, [1, 0]].tolist())
    assert results["examples"] == 6


def test_regression_lists_the_largest_differences_first(tokenizer):
    dataset = make_dataset(tokenizer, np.array([1, 2, 3, 4, 5, 0], dtype=np.float32))
    logits = torch.tensor([[1.0], [5], [3], [2], [5], [0]])
    results = analyze(logits, dataset, REGRESSION, tokenizer)
    assert [mistake["text"] for mistake in results["mistakes"]][:2] == ["a bad film", "good"]
    assert results["points"][1] == [2.0, 5.0]
    assert "confusion" not in results


def test_texts_of_a_pair_are_separated(tokenizer):
    logits = torch.tensor([[1.0, 0]] * 6)
    dataset = make_dataset(tokenizer, [1] * 6, pairs=["no film"] * 6)
    results = analyze(logits, dataset, classifier_config(["no", "yes"]), tokenizer)
    assert results["mistakes"][0]["text"] == "a good film | no film"


def test_correct_predictions_are_not_mistakes_and_nan_is_the_worst_mistake(tokenizer):
    logits = torch.tensor([[1.0, 0]] * 6)
    config = classifier_config(["no", "yes"])
    assert analyze(logits, make_dataset(tokenizer, [0] * 6), config, tokenizer)["mistakes"] == []
    logits[3] = float("nan")
    results = analyze(logits, make_dataset(tokenizer, [1, 0, 0, 1, 0, 0]), config, tokenizer)
    assert results["mistakes"][0]["text"] == "good"


def test_scores_of_each_class_equal_scikit_learn(tokenizer):
    labels, predictions = [0, 0, 1, 1, 1, 3], [0, 1, 1, 1, 0, 2]  # class 2 does not occur, class 3 is never predicted
    logits = torch.nn.functional.one_hot(torch.tensor(predictions), 4).float()
    config = classifier_config(["a", "b", "c", "d"])
    classes = analyze(logits, make_dataset(tokenizer, labels), config, tokenizer)["classes"]
    expected = precision_recall_fscore_support(labels, predictions, labels=range(4), zero_division=0)
    actual = zip(*([row[name] for name in ("precision", "recall", "f1", "examples")] for row in classes), strict=True)
    assert [row["label"] for row in classes] == ["a", "b", "c", "d"]
    for column, values in zip(expected, actual, strict=True):
        assert list(values) == pytest.approx(list(column))


@pytest.mark.parametrize(
    ("labels", "predictions"),
    [([0, 0, 1, 1, 1, 3], [0, 1, 1, 1, 0, 2]), ([1] * 6, [1] * 6), ([1] * 6, [2] * 6), ([0, 1, 2, 0, 1, 2], [0] * 6)],
)
def test_averages_equal_scikit_learn(labels, predictions, tokenizer):
    logits = torch.nn.functional.one_hot(torch.tensor(predictions), 5).float()  # class 4 does not occur
    analysis = analyze(logits, make_dataset(tokenizer, labels), classifier_config("abcde"), tokenizer)
    for row, average in zip(analysis["averages"], ("micro", "macro", "weighted"), strict=True):
        expected = precision_recall_fscore_support(labels, predictions, average=average, zero_division=0)
        assert row["label"] == f"{average} average"
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx(expected[:3])
        assert row["examples"] == 6


def test_averages_of_several_labels_equal_scikit_learn():
    random = np.random.default_rng(0)
    labels, predictions = random.random((40, 4)) < 0.4, random.random((40, 4)) < 0.3
    labels[:, 3] = predictions[:, 3] = False
    counts = ClassCounts((labels & predictions).sum(0), labels.sum(0), predictions.sum(0))
    for row, average in zip(
        score_classes("abcd", counts, average_all=True)["averages"], ("micro", "macro", "weighted"), strict=True
    ):
        expected = precision_recall_fscore_support(labels, predictions, average=average, zero_division=0)
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx(expected[:3])


def test_a_single_predicted_class_gives_a_warning(tokenizer):
    def warning(predictions, labels):
        logits = torch.nn.functional.one_hot(torch.tensor(predictions), 2).float()
        evaluation = analyze(logits, make_dataset(tokenizer, labels), classifier_config(["no", "yes"]), tokenizer)
        return single_class_warning(evaluation)

    message = warning([1] * 6, [0, 1, 1, 1, 0, 1])
    assert "predicts 'yes' for all 6 examples" in message
    assert "66.7%" in message
    assert warning([1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1]) is None
    assert warning([1] * 6, [1] * 6) is None
    assert warning([1] * 6, [0] * 6) is None  # dev has only one class
    assert single_class_warning({}) is None
    assert single_class_warning({"points": [[1.0, 1.0]]}) is None

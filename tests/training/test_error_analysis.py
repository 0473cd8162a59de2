"""What a model gets wrong, against scikit-learn and by hand."""

import numpy as np
import pytest
import torch
from conftest import tiny_config
from sklearn.metrics import confusion_matrix

from funnel.data.dataset import Dataset
from funnel.data.tokenizer import FunnelTokenizer
from funnel.training import error_analysis

TEXTS = ["a good film", "a bad film", "no film", "good", "bad", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return FunnelTokenizer.train(TEXTS * 5)


def dataset(tokenizer, labels, pairs=None):
    made = Dataset.of(TEXTS, pairs, tokenizer, 32)
    made.labels[:] = labels
    return made


def classifier(names):
    return tiny_config(id2label=dict(enumerate(names)))


def test_confusion_matrix_and_costliest_mistakes(tokenizer):
    labels = [0, 1, 2, 1, 0, 2]
    logits = torch.tensor([[3.0, 0, 0], [9, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [5, 5, 0]])
    found = error_analysis.analyze_errors(logits, dataset(tokenizer, labels), classifier(["bad", "good", "none"]), tokenizer)
    assert found["confusion"] == confusion_matrix(labels, logits.argmax(1)).tolist()
    assert [row["text"] for row in found["mistakes"]] == ["a bad film", "", "good", "bad"]
    first = found["mistakes"][0]
    assert (first["label"], first["predicted"]) == ("good", "bad")
    assert first["probability"] == pytest.approx(logits.softmax(1)[1, [1, 0]].tolist())
    assert found["texts"] == 6


def test_a_regressions_largest_differences_come_first(tokenizer):
    data = dataset(tokenizer, [0] * 6)
    data.labels = np.array([1, 2, 3, 4, 5, 0], dtype=np.float32)
    logits = torch.tensor([[1.0], [5], [3], [2], [5], [0]])
    found = error_analysis.analyze_errors(
        logits, data, tiny_config(id2label={0: "score"}, problem_type="regression"), tokenizer
    )
    assert [row["text"] for row in found["mistakes"]][:2] == ["a bad film", "good"]
    assert found["points"][1] == [2.0, 5.0]
    assert "confusion" not in found


def test_the_texts_of_a_pair_are_told_apart(tokenizer):
    logits = torch.tensor([[1.0, 0]] * 6)
    data = dataset(tokenizer, [1] * 6, pairs=["no film"] * 6)
    found = error_analysis.analyze_errors(logits, data, classifier(["no", "yes"]), tokenizer)
    assert found["mistakes"][0]["text"] == "a good film | no film"


def test_no_mistake_is_no_mistake_and_nan_is_one(tokenizer):
    logits = torch.tensor([[1.0, 0]] * 6)
    config = classifier(["no", "yes"])
    assert error_analysis.analyze_errors(logits, dataset(tokenizer, [0] * 6), config, tokenizer)["mistakes"] == []
    logits[3] = float("nan")
    found = error_analysis.analyze_errors(logits, dataset(tokenizer, [1, 0, 0, 1, 0, 0]), config, tokenizer)
    assert found["mistakes"][0]["text"] == "good"

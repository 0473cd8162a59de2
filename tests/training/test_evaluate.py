"""Evaluation: order of predictions, several ranks, interruption, loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import review_sentences, tiny_config

from funnel.data.batches import Shard
from funnel.data.encoding import TextEncoder, encode_examples
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import StoppedBySignal
from funnel.model.heads import FunnelForSequenceClassification
from funnel.problems.classification import Classification
from funnel.problems.regression import Regression
from funnel.training import evaluate
from funnel.training.evaluate import Pass, predict

PROBLEM = Classification(tiny_config())
REGRESSION = tiny_config(id2label={0: "score"}, problem_type="regression")


@pytest.fixture(scope="module")
def dataset():
    examples = review_sentences(150)
    return encode_examples(examples, TextEncoder({"0": 0, "1": 1}), FunnelTokenizer.train(examples.texts), 30)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FunnelForSequenceClassification(tiny_config(vocab_size=999))


def test_logits_are_in_the_order_of_the_dataset(model, dataset):
    model.train()
    logits = predict(model, PROBLEM, dataset)
    assert model.training
    model.eval()
    for row in (0, 1, 77, 149):
        with torch.no_grad():
            expected = model(**dataset.batch(np.array([row])).inputs)
        torch.testing.assert_close(logits[row : row + 1], expected)


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_ranks_compute_disjoint_parts(world_size, model, dataset, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 2)
    expected = predict(model, PROBLEM, dataset)
    shards = [Shard(rank, world_size) for rank in range(world_size)]
    parts = [predict(model, PROBLEM, dataset, Pass(shard)) for shard in shards]
    torch.testing.assert_close(sum(parts), expected, rtol=0, atol=0)


def test_an_interrupted_evaluation_leaves_the_model_in_training_mode(model, dataset):
    def stop():
        raise StoppedBySignal(15)

    with pytest.raises(StoppedBySignal):
        predict(model.train(), PROBLEM, dataset, Pass(poll=stop))
    assert model.training


def with_labels(dataset, labels):
    return replace(dataset, rows=dataset.rows._replace(labels=labels))


def test_the_loss_of_standardized_labels_does_not_depend_on_their_scale():
    scores, labels = torch.tensor([[1.0], [2.5]]), torch.tensor([1.5, 2.0])
    expected = Regression(REGRESSION).loss(scores, labels)
    assert expected.item() == pytest.approx(0.25)
    for scale in (1e-20, 1e30):
        scaled = (scores * scale).requires_grad_()
        loss = Regression(REGRESSION.replace(label_std=scale)).loss(scaled, labels * scale)
        assert loss.item() == pytest.approx(expected.item())
        loss.backward()
        assert torch.allclose(scaled.grad * scale, torch.tensor([[-0.5], [0.5]]))


def test_regression_loss_and_rmse_are_in_the_units_of_the_labels(dataset):
    labels = np.full(150, 1e30, np.float32)
    scores = Regression(REGRESSION).score(torch.full((150, 1), 3e30), with_labels(dataset, labels), ("rmse",))
    assert scores == {"loss": pytest.approx(4e60), "rmse": pytest.approx(2e30)}  # overflows in float32


def test_a_metric_of_one_class_is_computed_by_name(dataset):
    labels = np.arange(150, dtype=np.int32) % 3
    logits = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 3).float()
    problem = Classification(tiny_config(id2label={0: "a", 1: "b", 2: "c"}))
    scores = problem.score(logits, with_labels(dataset, labels), ("loss", "f1 (b)", "accuracy"))
    assert list(scores) == ["loss", "f1 (b)", "accuracy"]
    assert scores["f1 (b)"] == scores["accuracy"] == 1

"""Evaluation: order of predictions, several ranks, interruption, the single-class warning."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_config

from funnel.data import demo
from funnel.data.dataset import Shard, encode_examples
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import StoppedBySignal
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training import evaluate
from funnel.training.evaluate import predict_logits, single_class_warning
from funnel.training.state import is_better


@pytest.fixture(scope="module")
def dataset():
    examples, _ = demo.examples(train=150, dev=10)
    return encode_examples(examples, {"0": 0, "1": 1}, FunnelTokenizer.train(examples.texts), 30)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FunnelForSequenceClassification(tiny_config(vocab_size=999))


def test_logits_are_in_the_order_of_the_dataset(model, dataset):
    model.train()
    logits = predict_logits(model, dataset)
    assert model.training
    model.eval()
    for row in (0, 1, 77, 149):
        with torch.no_grad():
            expected = model(**dataset.batch(np.array([row])).inputs)
        torch.testing.assert_close(logits[row : row + 1], expected)


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_ranks_compute_disjoint_parts(world_size, model, dataset, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 2)
    expected = predict_logits(model, dataset)
    shards = [Shard(rank, world_size) for rank in range(world_size)]
    parts = [predict_logits(model, dataset, shard) for shard in shards]
    torch.testing.assert_close(sum(parts), expected, rtol=0, atol=0)


def test_an_interrupted_evaluation_leaves_the_model_in_training_mode(model, dataset):
    def stop():
        raise StoppedBySignal(15)

    with pytest.raises(StoppedBySignal):
        predict_logits(model.train(), dataset, poll=stop)
    assert model.training


def logits_for(predictions):
    return torch.nn.functional.one_hot(torch.tensor(predictions), 2).float()


def test_a_single_predicted_class_gives_a_warning():
    labels = np.array([0, 1, 1, 1])
    warning = single_class_warning(logits_for([1, 1, 1, 1]), labels, ["no", "yes"])
    assert "predicts 'yes' for all 4 examples" in warning
    assert "75.0%" in warning
    assert single_class_warning(logits_for([1, 0, 1, 1]), labels, ["no", "yes"]) is None
    assert single_class_warning(logits_for([1, 1]), np.array([1, 1]), ["no", "yes"]) is None


def test_a_metric_must_exceed_the_best_to_be_better():
    assert is_better(0.1, None)
    assert is_better(math.nan, None)
    assert is_better(0.2, 0.1)
    assert is_better(0.1, math.nan)
    assert not is_better(0.1, 0.1)
    assert not is_better(math.nan, 0.1)
    assert not is_better(math.nan, math.nan)

"""What the loop is made of: groups, schedule, seeds, prediction, what to say of numbers that are not finite."""

import math

import numpy as np
import pytest
import torch
from conftest import padded_batch, tiny_config

from funnel.data import demo
from funnel.data.dataset import Batch, encode
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, StoppedBySignal
from funnel.model.config import FunnelConfig
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training import optim as training

CPU = torch.device("cpu")


def test_only_matrices_decay():
    model = FunnelForSequenceClassification(tiny_config())
    decayed, plain = (group["params"] for group in training.param_groups(model, 0.01))
    by_id = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed) + len(plain) == len(by_id)
    decayed_names = {by_id[id(p)] for p in decayed}
    for name in by_id.values():
        is_matrix = name.endswith(("weight", "r_kernel", "seg_embed")) and "layer_norm" not in name
        assert (name in decayed_names) == is_matrix, name


def test_the_learning_rate_rises_and_falls_in_straight_lines():
    factor = training.linear_warmup_decay(total=100, warmup=0.1)
    values = [factor(step) for step in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == values[9] == pytest.approx(1.0)
    rises, falls = np.diff(values[:10]), np.diff(values[10:])
    np.testing.assert_allclose(rises, rises[0])
    np.testing.assert_allclose(falls, falls[0])
    assert factor(100) == pytest.approx(0.0)
    assert all(0 < training.linear_warmup_decay(1, w)(0) <= 1 for w in (0, 0.1, 0.9))


@pytest.fixture(scope="module")
def dataset():
    examples = demo.examples(train=150, dev=10)[0]
    return encode(examples, {"0": 0, "1": 1}, FunnelTokenizer.train(examples.texts), 30)


def test_predictions_come_in_the_order_of_the_dataset(dataset):
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config(vocab_size=999))
    model.train()
    found = training.predict(model, dataset, CPU, "fp32", batch_size=16)
    assert model.training
    model.eval()
    for row in (0, 1, 77, 149):
        batch = dataset.batch(np.array([row]))
        with torch.no_grad():
            expected = model(batch.input_ids, batch.attention_mask, batch.token_type_ids)
        torch.testing.assert_close(found[row : row + 1], expected)


def test_one_class_is_said_in_words():
    config, labels = FunnelConfig(id2label={0: "no", 1: "yes"}), np.array([0, 1, 1, 1])
    text = training.one_class_warning(np.array([1, 1, 1, 1]), labels, config)
    assert "one class only, 'yes'" in text
    assert "75.0%" in text
    assert training.one_class_warning(np.array([1, 0, 1, 1]), labels, config) is None
    assert training.one_class_warning(np.array([1, 1]), np.array([1, 1]), config) is None


def test_a_device_that_is_not_there_is_an_error():
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(FunnelError, match=missing):
        training.choose_device(missing)


def test_bf16_is_for_wide_models():
    assert training.choose_dtype(None, CPU, 128) == "fp32"
    assert training.choose_dtype("bf16", CPU, 128) == "bf16"


def test_every_step_and_process_has_its_own_random_numbers():
    seeds = {training.step_seed(seed, step, process) for seed in range(3) for step in range(50) for process in range(4)}
    assert len(seeds) == 600
    training.seed_step(1, 7)
    first = torch.rand(3)
    torch.rand(5)
    training.seed_step(1, 7)
    assert torch.equal(torch.rand(3), first)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FunnelForSequenceClassification(tiny_config(vocab_size=999))


def a_batch():
    ids, mask, types = padded_batch([5, 7])
    return Batch(ids, mask, types, torch.tensor([0, 1]))


def test_the_norm_is_of_all_gradients(model):
    batch = a_batch()
    training.loss_function(model(*batch[:3]), batch.labels).mul(100).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm().item()
    assert training.clip_gradients(model, 0.5) == pytest.approx(expected, rel=1e-5)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm().item()
    assert clipped == pytest.approx(0.5, rel=1e-4)


def test_the_first_layer_that_is_not_finite_is_named(model):
    model.encoder.layers(1)[0].ffn.linear_1.weight.data[0, 0] = math.inf
    assert "encoder.blocks.1.0.ffn.linear_1" in training.find_nonfinite(model, a_batch(), math.nan)


def test_or_the_last_parameter_whose_gradient_is_not(model):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    names = [name for name, _ in model.named_parameters()]
    dict(model.named_parameters())[names[3]].grad[0] = math.nan
    dict(model.named_parameters())[names[7]].grad[0] = math.inf
    said = training.find_nonfinite(model, a_batch(), 0.5)
    assert names[7] in said
    assert "2 parameters" in said


def test_processes_share_an_evaluation(model, dataset):
    whole = training.predict(model, dataset, CPU, "fp32", batch_size=2)
    for size in (2, 3, 4, 7):
        parts = [training.predict(model, dataset, CPU, "fp32", batch_size=2, share=(rank, size)) for rank in range(size)]
        torch.testing.assert_close(sum(parts), whole, rtol=0, atol=0)


def test_an_evaluation_can_be_broken_off(model, dataset):
    def check():
        raise StoppedBySignal(15)

    with pytest.raises(StoppedBySignal):
        training.predict(model.train(), dataset, CPU, "fp32", check=check)
    assert model.training

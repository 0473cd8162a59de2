"""Parameter groups, learning-rate schedule and gradient clipping."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import padded_batch, tiny_config
from torch import nn

from funnel.model.heads import FunnelForSequenceClassification, FunnelForTokenClassification
from funnel.training.distributed import Distributed
from funnel.training.optim import LinearWarmupDecay, build_adamw, clip_grad_norm, layer_lr_scales, param_groups


def test_weight_decay_applies_only_to_matrices():
    model = FunnelForSequenceClassification(tiny_config(distance_buckets=8))
    decayed, not_decayed = (group["params"] for group in param_groups(model, 0.01))
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed) + len(not_decayed) == len(names)
    decayed_names = {names[id(p)] for p in decayed}
    for name in names.values():
        is_matrix = name.endswith(("weight", "r_kernel", "seg_embed"))
        is_matrix &= "layer_norm" not in name and name != "encoder.distance_bias.weight"
        assert (name in decayed_names) == is_matrix, name


# --- layer-wise learning-rate decay -----------------------------------------------------------------------------------

# Blocks 1,2,1 and two decoder layers: six layers. Exponents as in ELECTRA's `_get_layer_lrs` with n_layers = 6.
EXPONENTS = {
    "embeddings.word_embeddings.weight": 8,
    "embeddings.layer_norm.bias": 8,
    "encoder.distance_bias.weight": 8,
    "encoder.blocks.0.0.attention.q_head.weight": 7,
    "encoder.blocks.0.0.attention.r_kernel": 7,
    "encoder.blocks.1.0.attention.r_w_bias": 6,
    "encoder.blocks.1.1.ffn.layer_norm.weight": 5,
    "encoder.blocks.2.0.attention.seg_embed": 4,
    "decoder.layers.0.ffn.linear_1.weight": 3,
    "decoder.layers.1.attention.post_proj.bias": 2,
    "classifier.weight": 0,
    "classifier.bias": 0,
}


def make_deep_model():
    torch.manual_seed(0)
    return FunnelForTokenClassification(tiny_config(distance_buckets=8, num_decoder_layers=2))


def test_rates_decay_from_the_head_to_the_embeddings():
    scales = layer_lr_scales(make_deep_model(), 0.8)
    assert {name: scales[name] for name in EXPONENTS} == pytest.approx({name: 0.8**n for name, n in EXPONENTS.items()})
    assert scales.keys() == dict(make_deep_model().named_parameters()).keys()


def test_a_classifier_counts_the_layers_of_the_encoder():
    scales = layer_lr_scales(FunnelForSequenceClassification(tiny_config(blocks="2,1x3")), 0.5)
    expected = {"embeddings.layer_norm.weight": 5, "encoder.blocks.0.1.attention.q_head.weight": 3,
                "encoder.blocks.1.0.attention.q_head.weight": 2, "classifier.linear_hidden.weight": 0}  # fmt: skip
    assert {name: scales[name] for name in expected} == {name: 0.5**n for name, n in expected.items()}


@pytest.mark.parametrize("capture_on", [None, torch.device("cpu")])
def test_every_group_has_its_own_share_of_the_rate(capture_on):
    model = make_deep_model()
    optimizer = build_adamw(param_groups(model, 0.01, 0.8), 1e-3, capture_on)
    linear = LinearWarmupDecay(optimizer, 1e-3, range(10), 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for peak, step in ((1e-3, None), (1e-3 * 5 / 9, 5)):
        if step is not None:
            linear.set(step)
        rates = {names[id(p)]: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        assert {n: rates[n] for n in EXPONENTS} == pytest.approx({n: peak * 0.8**e for n, e in EXPONENTS.items()}, rel=1e-6)
        assert linear.lr == pytest.approx(peak, rel=1e-6)


def test_weight_decay_is_the_same_with_layer_decay():
    model = make_deep_model()
    plain, layered = (
        {id(p): group["weight_decay"] for group in param_groups(model, 0.01, decay) for p in group["params"]}
        for decay in (1.0, 0.8)
    )
    assert plain == layered
    assert len(param_groups(model, 0.01, 0.8)) == 2 * 8  # six layers, embeddings and head


def test_without_layer_decay_there_are_two_groups_without_factors():
    assert [group.keys() for group in param_groups(make_deep_model(), 0.01)] == [{"params", "weight_decay"}] * 2


def test_the_first_update_is_proportional_to_the_rate():
    model = make_deep_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_adamw(param_groups(model, 0.0, 0.5), 1e-3)
    model(*padded_batch([5, 7])).square().sum().backward()
    optimizer.step()
    for name, exponent in EXPONENTS.items():  # Adam's first step moves every weight by the learning rate
        moved = (model.get_parameter(name) - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-3 * 0.5**exponent, rel=0.02), name


def schedule(total_steps, warmup, lr=1.0):
    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters())
    return LinearWarmupDecay(optimizer, lr, range(total_steps), warmup)


def test_learning_rate_rises_and_falls_linearly():
    linear = schedule(total_steps=100, warmup=0.1)
    values = [linear.at(step) for step in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == values[9] == pytest.approx(1.0)
    rises, falls = np.diff(values[:10]), np.diff(values[10:])
    np.testing.assert_allclose(rises, rises[0])
    np.testing.assert_allclose(falls, falls[0])
    assert linear.at(100) == pytest.approx(0.0)


def test_a_schedule_of_added_steps_starts_at_the_first_of_them():
    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters())
    with_warmup, without = (LinearWarmupDecay(optimizer, 1.0, range(100, 200), warmup) for warmup in (0.1, 0))
    whole = schedule(total_steps=100, warmup=0.1)
    assert [with_warmup.at(100 + step) for step in range(100)] == [whole.at(step) for step in range(100)]
    assert without.at(100) == 1.0
    assert without.at(199) == pytest.approx(1 / 99)


@pytest.mark.parametrize("warmup", [0, 0.1, 0.9])
def test_a_single_step_has_a_positive_learning_rate(warmup):
    assert 0 < schedule(total_steps=1, warmup=warmup).at(0) <= 1


def test_set_changes_all_parameter_groups():
    model = FunnelForSequenceClassification(tiny_config())
    optimizer = torch.optim.AdamW(param_groups(model, 0.01))
    linear = LinearWarmupDecay(optimizer, 0.5, range(10), 0.2)
    linear.set(0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert linear.lr == 0.25


def test_clipping_uses_the_norm_over_all_gradients():
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config())
    F.cross_entropy(model(*padded_batch([5, 7])), torch.tensor([0, 1])).mul(100).backward()

    def global_norm():
        return torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm().item()

    expected = global_norm()
    assert float(clip_grad_norm(model, 0.5)) == pytest.approx(expected, rel=1e-5)
    assert global_norm() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_a_fused_optimizer_that_clips_takes_the_same_step_as_one_after_clipping(max_norm):
    weights = []
    for is_fused in (True, False):
        torch.manual_seed(0)
        model = FunnelForSequenceClassification(tiny_config())
        optimizer = torch.optim.AdamW(param_groups(model, 0.01), lr=0.01, eps=1.0, fused=True)  # eps: no sign descent
        for scale in (100, 1):
            F.cross_entropy(model(*padded_batch([5, 7])), torch.tensor([0, 1])).mul(scale).backward()
            norm = clip_grad_norm(model, max_norm, optimizer if is_fused else None)
            assert scale == 1 or float(norm) > 0.5
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


def test_a_step_without_clipping_after_one_with_clipping_is_not_scaled():
    model = FunnelForSequenceClassification(tiny_config())
    optimizer = build_adamw(param_groups(model, 0.01), 0.01)
    F.cross_entropy(model(*padded_batch([5, 7])), torch.tensor([0, 1])).backward()
    clip_grad_norm(model, 1e-3, optimizer)
    assert float(optimizer.grad_scale) > 1
    optimizer.step()
    assert optimizer.grad_scale is None


# --- optimizers whose steps a CUDA graph may contain ------------------------------------------------------------------

CPU = torch.device("cpu")  # torch's implementation for CPUs accepts the same settings


def train_a_few_steps(model, optimizer, steps=range(3)):
    linear = LinearWarmupDecay(optimizer, 0.01, range(10), 0.5)
    for step in steps:
        linear.set(step)
        F.cross_entropy(model(*padded_batch([5, 7])), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()


def make_model_and_optimizer(capture_on, layer_decay=1.0):
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config())
    return model, build_adamw(param_groups(model, 0.01, layer_decay), 0.01, capture_on)


def assert_equal_weights(model, other):
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-4)  # a hundredth of the updates


def test_a_tensor_learning_rate_is_filled_in_place():
    _, optimizer = make_model_and_optimizer(CPU)
    rates = [group["lr"] for group in optimizer.param_groups]
    LinearWarmupDecay(optimizer, 0.5, range(10), 0.2).set(0)
    assert all(group["lr"] is rate and float(rate) == 0.25 for group, rate in zip(optimizer.param_groups, rates, strict=True))
    assert all(group["capturable"] for group in optimizer.param_groups)


def test_a_tensor_learning_rate_gives_the_same_updates():
    (model, optimizer), (expected, reference) = make_model_and_optimizer(CPU), make_model_and_optimizer(None)
    train_a_few_steps(model, optimizer)
    train_a_few_steps(expected, reference)
    assert_equal_weights(model, expected)


@pytest.mark.parametrize("layer_decay", [1.0, 0.8])
@pytest.mark.parametrize("saved_on", [CPU, None])
@pytest.mark.parametrize("loaded_on", [CPU, None])
def test_restoring_a_state_keeps_the_kind_of_learning_rate(saved_on, loaded_on, layer_decay):
    dist, (source, saved) = Distributed(CPU), make_model_and_optimizer(saved_on, layer_decay)
    train_a_few_steps(source, saved)
    model, optimizer = make_model_and_optimizer(loaded_on, layer_decay)
    before = [group["lr"] for group in optimizer.param_groups]
    dist.load_optimizer_state(model, optimizer, copy.deepcopy(dist.optimizer_state(source, saved)))
    for group, rate in zip(optimizer.param_groups, before, strict=True):
        assert group["lr"] is rate
        assert float(rate) == pytest.approx(0.01 * group.get("lr_scale", 1.0))
        assert group["capturable"] == (loaded_on is not None)
    model.load_state_dict(source.state_dict())
    train_a_few_steps(model, optimizer, steps=range(3, 5))
    train_a_few_steps(source, saved, steps=range(3, 5))
    assert_equal_weights(model, source)

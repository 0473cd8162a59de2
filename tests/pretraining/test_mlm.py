"""Masked language modeling: the loss from full logits, positions that count, micro-batches, training."""

import numpy as np
import pytest
import torch
from conftest import POSITIONS, tiny_config
from objective_inputs import LENGTHS, MASKED, gradients, make_inputs, randomize
from scipy.special import log_softmax

from funnel.model.heads import FunnelForMaskedLM
from funnel.pretraining.mlm import MaskedLanguageModel


def make_objective(**changes) -> MaskedLanguageModel:
    torch.manual_seed(0)
    objective = MaskedLanguageModel(FunnelForMaskedLM(tiny_config(**changes)))
    randomize(objective, 0.05)
    return objective


@pytest.mark.parametrize("changes", [*POSITIONS, {"lm_head_transform": True}, {"embedding_size": 6}], ids=str)
def test_loss_and_accuracy_are_those_of_the_full_logits(changes):
    objective = make_objective(**changes).double().eval()
    inputs = make_inputs(LENGTHS, MASKED)
    # The most likely token of one masked position becomes its label, so that the accuracy is not 0.
    full = objective.model(*(inputs[name] for name in ("masked_ids", "attention_mask", "token_type_ids"))).detach().numpy()
    inputs["labels"][2, 1] = int(full[2, inputs["positions"][2, 1]].argmax())
    losses, correct = [], []
    for row, count in enumerate(MASKED):
        for column in range(count):
            logits = full[row, inputs["positions"][row, column]]
            label = int(inputs["labels"][row, column])
            losses.append(-log_softmax(logits)[label])
            correct.append(logits.argmax() == label)
    loss, accuracy = objective(**inputs).tolist()
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert accuracy == pytest.approx(np.mean(correct), rel=1e-6)
    assert accuracy > 0


def test_padding_of_the_positions_does_not_count():
    objective = make_objective()
    inputs = make_inputs(LENGTHS, MASKED)
    expected = objective(**inputs)
    is_padding = inputs["position_weights"] == 0
    changed = {**inputs, "labels": torch.where(is_padding, 17, inputs["labels"])}
    assert torch.equal(objective(**changed), expected)


def test_gradients_of_micro_batches_add_up_to_those_of_the_batch():
    objective = make_objective().double()
    inputs = make_inputs(LENGTHS, MASKED)
    inputs = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    values = objective(**inputs)
    expected = gradients(objective, values[0])
    parts = [objective(**{name: tensor[rows] for name, tensor in inputs.items()}) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), values, rtol=1e-6, atol=1e-9)
    summed = gradients(objective, sum(part[0] for part in parts))
    for name, gradient in expected.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_computed_in_float32(dtype):
    objective = make_objective(lm_head_transform=True)
    inputs = make_inputs(LENGTHS, MASKED)
    with torch.autocast("cpu", dtype):
        values = objective(**inputs)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[0], objective(**inputs)[0], rtol=0.02, atol=0)


def test_only_the_loss_has_a_gradient():
    objective = make_objective()
    assert not any(gradient.any() for gradient in gradients(objective, objective(**make_inputs(LENGTHS, MASKED))[1]).values())


@pytest.mark.parametrize("transform", [False, True])
def test_the_loss_of_a_repeated_batch_falls(transform):
    objective = make_objective(lm_head_transform=transform)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
    inputs = make_inputs([12] * 8, [2] * 8)
    losses = []
    for _ in range(50):
        values = objective(**inputs)
        values[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(values[0].detach()))
    assert losses[-1] < losses[0] / 3

"""Batches for the tests of objectives, built by hand from the contract in funnel/pretraining/objective.py."""

import torch
from conftest import padded_batch
from torch import Tensor, nn

MASK = 4
LENGTHS, MASKED = [13, 7, 9, 4], [3, 1, 2, 0]  # tokens and masked tokens of each text


def make_inputs(lengths: list[int], masked: list[int], seed: int = 0) -> dict[str, Tensor]:
    """The arguments of an objective for random texts.

    Args:
        lengths: tokens per text.
        masked: masked tokens per text, never [CLS]; rows with fewer than the largest number are padded with position 0.
    """
    ids, mask, types = padded_batch(lengths, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    positions = torch.zeros(len(lengths), max(masked), dtype=torch.long)
    is_used = torch.zeros(positions.shape)
    for row, (length, count) in enumerate(zip(lengths, masked, strict=True)):
        positions[row, :count] = (torch.randperm(length - 1, generator=generator)[:count] + 1).sort().values
        is_used[row, :count] = 1
    masked_ids = ids.clone()
    for row, count in enumerate(masked):
        masked_ids[row, positions[row, :count]] = MASK
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": types,
        "token_weights": mask / mask.sum(),
        "masked_ids": masked_ids,
        "positions": positions,
        "position_weights": is_used / is_used.sum(),
        "uniforms": torch.rand(positions.shape, generator=generator),
        "labels": ids.gather(1, positions),
    }


def randomize(module: nn.Module, scale: float = 0.3, seed: int = 0) -> None:
    """Adds noise to all weights, so that no bias is 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def gradients(module: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter; 0 where there is none."""
    parameters = dict(module.named_parameters())
    values = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, values, strict=True))

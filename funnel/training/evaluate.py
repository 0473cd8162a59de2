"""Loss, predictions and metrics on a dataset."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnel.data.batches import WHOLE, Shard
from funnel.data.dataset import Dataset
from funnel.data.device_batches import padded_length
from funnel.errors import FunnelError, StoppedBySignal, plural
from funnel.problems.base import Problem
from funnel.training.device import autocast
from funnel.training.state import TrainComponents

BATCH_SIZE = 64
DEV = "dev"  # the set on which decision thresholds are tuned


class Pass(NamedTuple):
    """How to go through a dataset.

    Attributes:
        shard: compute only this rank's batches; the results of the others are zeros.
        poll: called before each batch; may raise to abort.
    """

    shard: Shard = WHOLE
    poll: Callable[[], None] = lambda: None


WHOLE_SET = Pass()


class Evaluation(NamedTuple):
    """The result on one dataset.

    Attributes:
        results: what the problem keeps of the model's outputs, [n, ...], float32 on the CPU.
        scores: loss and metrics by name.
    """

    results: Tensor
    scores: dict[str, float]


def evaluate(
    components: TrainComponents, datasets: Mapping[str, Dataset], metrics: tuple[str, ...], poll: Callable[[], None]
) -> dict[str, Evaluation] | None:
    """Evaluates the model on several datasets, split across the ranks; every rank gets all results.

    Args:
        datasets: "dev" first; its best decision threshold is used for all.
        poll: called before each batch; raises StoppedBySignal to stop.

    Returns:
        Results by dataset name; None if stopped.
    """
    evaluations, problem = {}, components.problem
    assert problem is not None, "pretraining has its own evaluation"
    how = Pass(components.dist.shard, poll)
    for name, dataset in datasets.items():
        try:
            with autocast(components.dist.device, components.dtype):
                results = predict(components.model, problem, dataset, how)
        except StoppedBySignal:
            return None
        results = components.dist.sum(results)
        if name == DEV:
            problem.tune(results, dataset)
        evaluations[name] = Evaluation(results, problem.score(results, dataset, metrics))
    return evaluations


def check_finite(results: Tensor, dataset: str, dtype: str) -> None:
    """Raises FunnelError if outputs are not finite, as when activations overflow in fp16.

    Args:
        results: [n, ...].
        dataset: its name, for the message.
        dtype: the dtype of matrix products.
    """
    count = int((~results.isfinite()).flatten(1).any(dim=1).sum())
    if count:
        advice = {"fp16": "dtype bf16 or fp32", "bf16": "dtype fp32 or a lower learning rate"}
        raise FunnelError(
            f"the logits of {plural(count, 'example')} of {dataset} are not finite in {dtype}; "
            f"use {advice.get(dtype, 'an earlier checkpoint, or train with a lower learning rate')}",
            "dtype" if dtype in advice else None,
        )


@torch.no_grad()
def predict(model: nn.Module, problem: Problem, dataset: Dataset, how: Pass = WHOLE_SET) -> Tensor:
    """What the problem keeps of the model's outputs for all rows in the dataset's order, [n, ...], float32 on the CPU.

    It is copied from the device once, at the end.

    Call it under `autocast`, so that the weights are cast once and cached for all batches.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    batches = list(dataset.evaluation_batches(BATCH_SIZE))
    rank, world_size = how.shard
    rounds = math.ceil(len(batches) / world_size)
    outputs: list[Tensor] = []
    try:
        for number in range(rank, rounds * world_size, world_size):
            how.poll()
            rows = batches[min(number, len(batches) - 1)]  # FSDP needs the same number of forward passes on every rank
            width = padded_length(dataset.longest, int(dataset.lengths[rows].max()), device)
            batch = dataset.batch(rows, width).to(device)
            outputs.append(pad_tokens(problem.collect(model(**batch.inputs), batch.labels), width, dataset.longest))
    finally:
        model.train(was_training)
    computed = torch.cat(outputs).cpu()  # a dataset has at least one row
    results = computed.new_zeros(len(dataset), *computed.shape[1:])
    rows = np.concatenate([np.empty(0, int), *batches[rank::world_size]])  # without the repetitions of the last batch
    results[torch.from_numpy(rows)] = computed[: len(rows)]
    return results


def pad_tokens(results: Tensor, width: int, longest: int) -> Tensor:
    """Pads the values of tokens with zeros, [b, width, m] -> [b, longest, m]; other results stay as they are."""
    if results.dim() < 3 or results.shape[1] != width:
        return results
    return F.pad(results, (0, 0, 0, longest - width))

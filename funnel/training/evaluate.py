"""Loss, predictions and metrics on a dataset."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from funnel.data.batches import WHOLE, Shard
from funnel.data.dataset import Dataset
from funnel.data.device_batches import padded_length
from funnel.errors import FunnelError, StoppedBySignal, plural
from funnel.training.device import autocast
from funnel.training.loss import loss_function
from funnel.training.metrics import LOSS, get_metric, rmse
from funnel.training.state import TrainComponents

BATCH_SIZE = 64


class Evaluation(NamedTuple):
    """The result on one dataset.

    Attributes:
        logits: [n_examples, n_outputs], float32 on the CPU.
        scores: loss and metrics by name.
    """

    logits: Tensor
    scores: dict[str, float]


def evaluate(
    components: TrainComponents, datasets: Mapping[str, Dataset], metrics: tuple[str, ...], poll: Callable[[], None]
) -> dict[str, Evaluation] | None:
    """Evaluates the model on several datasets, split across the ranks; every rank gets all results.

    Args:
        poll: called before each batch; raises StoppedBySignal to stop.

    Returns:
        Results by dataset name; None if stopped.
    """
    results = {}
    label_names = list(components.model.config.id2label.values())
    for name, dataset in datasets.items():
        try:
            with autocast(components.dist.device, components.dtype):
                logits = predict_logits(components.model, dataset, components.dist.shard, poll)
        except StoppedBySignal:
            return None
        logits = components.dist.sum(logits)
        results[name] = Evaluation(logits, compute_metrics(logits, dataset, metrics, label_names))
    return results


def check_finite_logits(logits: Tensor, dataset: str, dtype: str) -> None:
    """Raises FunnelError if logits are not finite, as when activations overflow in fp16.

    Args:
        logits: [n_examples, n_outputs].
        dataset: its name, for the message.
        dtype: the dtype of matrix products.
    """
    count = int((~logits.isfinite()).any(dim=1).sum())
    if count:
        advice = {"fp16": "dtype bf16 or fp32", "bf16": "dtype fp32 or a lower learning rate"}
        raise FunnelError(
            f"the logits of {plural(count, 'example')} of {dataset} are not finite in {dtype}; "
            f"use {advice.get(dtype, 'an earlier checkpoint, or train with a lower learning rate')}",
            "dtype" if dtype in advice else None,
        )


@torch.no_grad()
def predict_logits(model: nn.Module, dataset: Dataset, shard: Shard = WHOLE, poll: Callable[[], None] = lambda: None) -> Tensor:
    """Logits of all examples in the dataset's order, [n_examples, n_outputs], float32 on the CPU.

    They are copied from the device once, at the end.

    Call it under `autocast`, so that the weights are cast once and cached for all batches.

    Args:
        shard: compute only this rank's batches; the logits of the others are zeros.
        poll: called before each batch; may raise to abort.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    batches = list(dataset.evaluation_batches(BATCH_SIZE))
    rank, world_size = shard
    rounds = math.ceil(len(batches) / world_size)
    outputs: list[Tensor] = []
    try:
        for number in range(rank, rounds * world_size, world_size):
            poll()
            rows = batches[min(number, len(batches) - 1)]  # FSDP needs the same number of forward passes on every rank
            batch = dataset.batch(rows, padded_length(dataset.longest, int(dataset.lengths[rows].max()), device))
            outputs.append(model(**batch.to(device).inputs).float())
    finally:
        model.train(was_training)
    computed = torch.cat(outputs).cpu()  # a dataset has at least one example
    logits = computed.new_zeros(len(dataset), computed.shape[1])
    rows = np.concatenate([np.empty(0, int), *batches[rank::world_size]])  # without the repetitions of the last batch
    logits[torch.from_numpy(rows)] = computed[: len(rows)]
    return logits


def compute_metrics(
    logits: Tensor, dataset: Dataset, metrics: Sequence[str], label_names: Sequence[str] = ()
) -> dict[str, float]:
    """Loss and metrics by name; a regression's loss is the mean squared error in the labels' units.

    Args:
        logits: [n_examples, n_outputs].
        metrics: names as in `get_metric`.
        label_names: names of the classes, for metrics of a single class.

    Raises:
        FunnelError: a metric is unknown.
    """
    predictions = predictions_of(logits, dataset)
    if is_regression(dataset):
        loss = rmse(predictions, dataset.labels) ** 2
    else:
        loss = float(loss_function(logits, torch.from_numpy(dataset.labels).long()))
    functions = {name: get_metric(name, label_names) for name in metrics}
    return {LOSS: loss} | {name: compute(predictions, dataset.labels) for name, compute in functions.items() if compute}


def predictions_of(logits: Tensor, dataset: Dataset) -> np.ndarray:
    """Predicted label ids, or scores if the labels are scores. logits [n_examples, n_outputs]."""
    return logits[:, 0].numpy() if is_regression(dataset) else logits.argmax(1).numpy()


def is_regression(dataset: Dataset) -> bool:
    """Whether the labels are scores rather than label ids."""
    return dataset.labels.dtype == np.float32

"""Loss, predictions and metrics on a dataset."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnel.data.dataset import WHOLE, Dataset, Shard
from funnel.errors import StoppedBySignal
from funnel.training.device import autocast
from funnel.training.metrics import METRICS
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


def loss_function(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy for label ids, mean squared error for float labels. logits [b, n_outputs], labels [b]."""
    if labels.is_floating_point():
        return F.mse_loss(logits.float().squeeze(1), labels)
    return F.cross_entropy(logits.float(), labels)


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
    for name, dataset in datasets.items():
        try:
            with autocast(components.dist.device, components.dtype):
                logits = predict_logits(components.model, dataset, components.dist.shard, poll)
        except StoppedBySignal:
            return None
        logits = components.dist.sum(logits)
        results[name] = Evaluation(logits, compute_metrics(logits, dataset, metrics))
    return results


@torch.no_grad()
def predict_logits(model: nn.Module, dataset: Dataset, shard: Shard = WHOLE, poll: Callable[[], None] = lambda: None) -> Tensor:
    """Logits of all examples in the dataset's order, [n_examples, n_outputs], float32 on the CPU.

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
    logits: Tensor | None = None
    try:
        for number in range(rank, rounds * world_size, world_size):
            poll()
            rows = batches[min(number, len(batches) - 1)]  # FSDP needs the same number of forward passes on every rank
            output = model(**dataset.batch(rows).to(device).inputs).float().cpu()
            if logits is None:
                logits = output.new_zeros(len(dataset), output.shape[1])
            if number < len(batches):
                logits[torch.from_numpy(rows)] = output
    finally:
        model.train(was_training)
    assert logits is not None  # a dataset has at least one example
    return logits


def compute_metrics(logits: Tensor, dataset: Dataset, metrics: tuple[str, ...]) -> dict[str, float]:
    """Loss and metrics by name. logits [n_examples, n_outputs]."""
    labels = torch.from_numpy(dataset.labels)
    if not labels.is_floating_point():
        labels = labels.long()
    predictions = predictions_of(logits, dataset)
    scores = {"loss": float(loss_function(logits, labels))}
    return scores | {name: METRICS[name](predictions, dataset.labels) for name in metrics}


def predictions_of(logits: Tensor, dataset: Dataset) -> np.ndarray:
    """Predicted label ids, or scores if the labels are scores. logits [n_examples, n_outputs]."""
    is_regression = dataset.labels.dtype == np.float32
    return logits[:, 0].numpy() if is_regression else logits.argmax(1).numpy()


def single_class_warning(logits: Tensor, labels: np.ndarray, label_names: Sequence[str]) -> str | None:
    """A warning if a classifier predicts the same class for all examples while their labels differ, else None."""
    predictions = logits.argmax(1).numpy()
    if len(np.unique(predictions)) > 1 or len(np.unique(labels)) == 1:
        return None
    frequency = float((labels == predictions[0]).mean())
    return (
        f"the model predicts {label_names[int(predictions[0])]!r} for all {len(labels):,} examples; its accuracy, "
        f"{frequency:.1%}, is that class's frequency. It has not learned the task: try a lower learning rate or more epochs"
    )

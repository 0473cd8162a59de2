"""Batches: padded tensors, and the order of rows in training.

The order is a function of the seed and the step, so that a resumed run sees the same batches, with any number of processes.

Shapes: b examples, l tokens of the longest example in a batch, n rows of a dataset.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SORT_WINDOW = 64  # batches; rows are sorted by length within a window


class Shard(NamedTuple):
    """One rank's part of the data."""

    rank: int = 0
    world_size: int = 1


WHOLE = Shard()


@dataclass(frozen=True, eq=False)
class Batch:
    """A padded batch: the whole global batch, one rank's rows of it, or a micro-batch.

    Attributes:
        inputs: the model's keyword arguments, as in `model(**batch.inputs)`: input_ids, attention_mask and token_type_ids,
            [b, l] or, for c choices, [b, c, l], int64; pretraining adds others. The first dimension of each is b.
        labels: as in `funnel.data.dataset.Rows`, label ids and positions as int64; [b, l] if tokens have labels; in
            pretraining, [b, m] token ids.
        weight: factor for the batch's mean loss. The sum over micro-batches and the mean over ranks (DDP averages
            gradients) of weight * mean loss is the mean loss over the global batch. 0 if the rank has no row.
        n_examples: number of rows of the global batch; default: those of this batch.
        world_size: number of ranks that share the global batch.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    weight: float = 1.0
    n_examples: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.n_examples == 0:
            object.__setattr__(self, "n_examples", len(self.labels))

    @property
    def input_ids(self) -> Tensor:
        """[b, l], token ids."""
        return self.inputs["input_ids"]

    @property
    def attention_mask(self) -> Tensor:
        """[b, l], 1 where a token is real."""
        return self.inputs["attention_mask"]

    @property
    def token_type_ids(self) -> Tensor:
        """[b, l], 2 for [CLS], the tokenizer's `second_type` for the second text, 0 elsewhere."""
        return self.inputs["token_type_ids"]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The model's inputs and the labels."""
        return {**self.inputs, "labels": self.labels}

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """The shapes of all tensors."""
        return tuple(tensor.shape for tensor in self.tensors.values())

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Applies a function to every tensor."""
        inputs = {name: function(tensor) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, labels=function(self.labels))

    def to(self, device: torch.device | str) -> "Batch":
        """Copies the tensors to a device; the copy from CPU to GPU is asynchronous."""
        is_upload = torch.device(device).type == "cuda" and self.labels.device.type == "cpu"
        batch = self.map(Tensor.pin_memory) if is_upload else self
        return batch.map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, n: int) -> list["Batch"]:
        """Splits the batch into `n` micro-batches whose sizes differ by at most one row.

        There are fewer if a rank has fewer rows; all ranks return the same number. The padded length stays.
        """
        n = min(n, max(1, self.n_examples // self.world_size))
        micro_batches = []
        for *inputs, labels in zip(*(tensor.tensor_split(n) for tensor in self.tensors.values()), strict=True):
            weight = self.weight * len(labels) / len(self.labels)
            micro_batches.append(
                replace(self, inputs=dict(zip(self.inputs, inputs, strict=True)), labels=labels, weight=weight)
            )
        return micro_batches


def text_batch(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, labels: Tensor) -> Batch:
    """A batch of texts; shapes as in `Batch`."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
    return Batch(inputs, labels)


class BatchRows(NamedTuple):
    """One rank's rows of a global batch.

    Attributes:
        rows: [b], row numbers.
        length: length of the longest example of the global batch.
        weight, n_examples, world_size: as in `Batch`.
    """

    rows: np.ndarray
    length: int
    weight: float
    n_examples: int
    world_size: int

    def complete(self, batch: Batch) -> Batch:
        """The batch with these rows, its weight and sizes set."""
        return replace(batch, weight=self.weight, n_examples=self.n_examples, world_size=self.world_size)


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch as arrays of row numbers: shuffled, with rows of similar length in a batch.

    An epoch contains every row once; its order depends on `seed` and `epoch` only. Rows are shuffled, sorted by length
    within windows of `SORT_WINDOW` batches and cut into batches; then the batches are shuffled.

    Args:
        lengths: [n], number of tokens of each row.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    window = SORT_WINDOW * batch_size
    batches: list[np.ndarray] = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def global_batches(lengths: np.ndarray, batch_size: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Yields the row numbers of one batch per step, indefinitely: those of `epoch_batches`, epoch after epoch.

    Args:
        lengths: [n], number of tokens of each row.
        start: the first step.
    """
    epoch, offset = divmod(start, math.ceil(len(lengths) / batch_size))
    while True:
        yield from epoch_batches(lengths, batch_size, seed, epoch)[offset:]
        epoch, offset = epoch + 1, 0


def rows_of_rank(index: np.ndarray, lengths: np.ndarray, shard: Shard) -> BatchRows:
    """One rank's rows of a global batch. A rank without a row gets the first row, with weight 0.

    Args:
        index: row numbers of the global batch.
        lengths: [n], number of tokens of each row of the dataset.
    """
    rows = np.array_split(index, shard.world_size)[shard.rank]
    weight = len(rows) * shard.world_size / len(index)
    return BatchRows(rows if len(rows) else index[:1], int(lengths[index].max()), weight, len(index), shard.world_size)

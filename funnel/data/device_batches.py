"""Training batches on their device, made without waiting for it.

On a CPU, these are the batches of `Dataset`. On CUDA, batches are padded to one of a few lengths, so that few shapes occur,
and gathered on the device from a copy of the dataset; if that would take too much memory, a background thread assembles
them.

Shapes: b rows, l tokens of a padded batch, n rows of a dataset, t tokens of all texts, c choices.
"""

import queue
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from funnel.data.batches import WHOLE, Batch, BatchRows, Shard, text_batch
from funnel.data.dataset import IGNORED, Dataset

MIN_STEP = 8  # between padded lengths
MAX_MEMORY_SHARE = 1 / 8  # of the free memory of a device, for a dataset
QUEUE_SIZE = 4  # batches assembled ahead by the background thread


def padded_length(longest: int, length: int, device: torch.device) -> int:
    """The padded length of a batch whose longest text has `length` tokens.

    On CUDA, a multiple of an eighth of the next power of two, of `MIN_STEP` at least: 12 lengths up to 128 tokens, 20 up to
    512. Never more than `longest`, the longest text of the dataset, which fits the model's table of positions. Elsewhere,
    `length`.
    """
    if device.type != "cuda":
        return length
    step = max(MIN_STEP, 2 ** ((length - 1).bit_length() - 3))
    return min(-(-length // step) * step, longest)


class DeviceDataset:
    """A copy of a dataset on a device, from which batches are gathered; only row numbers are copied per batch."""

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        starts, lengths, pair_starts, labels, *_ = dataset.rows
        self.device, self.pad_id = device, dataset.pad_id
        self.token_ids = torch.from_numpy(dataset.token_ids.astype(np.int32)).to(device)  # [t]
        self.token_labels = None
        if dataset.token_labels is not None:
            self.token_labels = torch.from_numpy(np.array(dataset.token_labels)).to(device)  # [t]
        # [n, 1] each, or [n, c, 1], to be compared with columns
        self.starts, self.lengths, self.pair_starts = (
            torch.from_numpy(array.astype(np.int64)).to(device).unsqueeze(-1) for array in (starts, lengths, pair_starts)
        )
        self.labels = torch.from_numpy(labels.astype(np.int64) if labels.dtype == np.int32 else labels).to(device)  # [n, ...]

    @staticmethod
    def size(dataset: Dataset) -> int:
        """Memory on the device, in bytes."""
        per_token = 4 if dataset.token_labels is None else 8
        return per_token * len(dataset.token_ids) + 3 * 8 * dataset.rows.lengths.size + 8 * dataset.labels.size

    def batch(self, rows: np.ndarray, length: int) -> Batch:
        """The same as `Dataset.batch`, on the device."""
        index = upload(torch.from_numpy(rows), self.device)
        column = torch.arange(length, device=self.device)
        is_token = column < self.lengths[index]  # [b, l], or [b, c, l]
        position = (self.starts[index] + column).masked_fill_(~is_token, 0)
        ids = self.token_ids[position].long().masked_fill_(~is_token, self.pad_id)
        types = ((column >= self.pair_starts[index]) & is_token).long()
        types[..., 0].fill_(2)  # [CLS]
        labels = self.labels[index]
        if self.token_labels is not None:
            labels = self.token_labels[position].long().masked_fill_(~is_token, IGNORED)
        return text_batch(ids, is_token.long(), types, labels)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to a device, without waiting if it is a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class TrainingBatches:
    """Yields a dataset's training batches on a device: the rows of `Dataset.batch_rows`."""

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        self.dataset, self.device = dataset, device
        self._on_device: DeviceDataset | None = None
        if device.type == "cuda" and DeviceDataset.size(dataset) <= MAX_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
            self._on_device = DeviceDataset(dataset, device)

    def __call__(self, batch_size: int, seed: int, *, start: int = 0, shard: Shard = WHOLE) -> Iterator[Batch]:
        """Yields one batch per step, indefinitely. The arguments are those of `Dataset.batches`."""
        parts = self.dataset.batch_rows(batch_size, seed, start=start, shard=shard)
        if self._on_device is not None:
            return self._make_batches(parts, self._on_device)
        return move_batches(self._make_batches(parts, self.dataset), self.device)

    def _make_batches(self, parts: Iterator[BatchRows], source: Dataset | DeviceDataset) -> Iterator[Batch]:
        for part in parts:
            yield part.complete(source.batch(part.rows, padded_length(self.dataset.longest, part.length, self.device)))


def move_batches(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yields batches on a device; for CUDA, a background thread assembles them."""
    if device.type == "cuda":
        batches = prefetch(_pin_batches(batches, device))
    return (batch.to(device) for batch in batches)


def _pin_batches(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copies batches to pinned memory, from which they are copied to the GPU without waiting."""
    if device.index is not None:
        torch.cuda.set_device(device)  # of the thread that runs this
    for batch in batches:
        yield batch.map(Tensor.pin_memory)


def prefetch(batches: Iterator[Batch], size: int = QUEUE_SIZE) -> Iterator[Batch]:
    """Yields the batches of an iterator that a background thread runs up to `size` batches ahead.

    The thread starts at the first batch and ends with this iterator: when it is exhausted, closed or no longer referenced.
    An exception in the thread is raised here.
    """
    results: queue.Queue[Batch | BaseException | None] = queue.Queue(size)
    stopped = threading.Event()

    def run() -> None:
        end: BaseException | None = None
        try:
            for batch in batches:
                results.put(batch)
                if stopped.is_set():
                    return
        except BaseException as error:
            end = error
        results.put(end)

    thread = threading.Thread(target=run, name="batches", daemon=True)
    thread.start()
    try:
        while (item := results.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        while not results.empty():  # the thread may be waiting for a free slot; it puts one more item at most
            results.get_nowait()
        thread.join()

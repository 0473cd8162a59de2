"""Encoded examples, served as padded batches.

A row is what a model reads at once: a text, a pair of texts, a window of a long text, or the c choices of a question.

Shapes: n rows of a dataset, t tokens of all rows, b rows of a batch, l tokens of the longest one, k classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from funnel.data.batches import WHOLE, Batch, BatchRows, Shard, epoch_batches, global_batches, rows_of_rank, text_batch
from funnel.data.files import Source
from funnel.data.folds import assign_folds, join_groups
from funnel.errors import FunnelError, plural

IGNORED = -100  # label of a token without one; the value that PyTorch's cross-entropy ignores


class Truncation(NamedTuple):
    """How much text `max_length` cut off.

    Attributes:
        texts: number of truncated examples.
        tokens_lost: number of tokens cut off.
        tokens: number of tokens before truncation, of all examples.
        longest: length of the longest example before truncation.
    """

    texts: int = 0
    tokens_lost: int = 0
    tokens: int = 0
    longest: int = 0

    def __str__(self) -> str:
        share = self.tokens_lost / max(1, self.tokens)
        return f"{plural(self.texts, 'text')} truncated, losing {share:.1%} of all tokens (longest text: {self.longest:,})"

    def merge(self, other: "Truncation") -> "Truncation":
        """Combines the truncation of two sets of examples."""
        return Truncation(
            self.texts + other.texts,
            self.tokens_lost + other.tokens_lost,
            self.tokens + other.tokens,
            max(self.longest, other.longest),
        )


class Rows(NamedTuple):
    """One entry per row.

    Attributes:
        starts: position of the first token in the flat array of token ids, [n]; [n, c] for the choices of questions.
        lengths: number of tokens; of the same shape.
        pair_starts: offset of the second text's first token; the length if there is no second text; of the same shape.
        labels: int32 label ids [n] or positions [n, 2]; float32 scores [n], or one indicator per class [n, k]. -1 or nan
            without a label.
        hashes: [n], uint64, equal for equal texts; of questions with choices, for equal contexts.
        examples: [n], the number of the example of which a row is a window; None if every example is one row.
        groups: [n], equal for rows that `Dataset.split` must not separate; None for `examples`.
    """

    starts: np.ndarray
    lengths: np.ndarray
    pair_starts: np.ndarray
    labels: np.ndarray
    hashes: np.ndarray
    examples: np.ndarray | None = None
    groups: np.ndarray | None = None

    def take(self, index: np.ndarray) -> "Rows":
        """The entries of some rows."""
        return Rows(*(None if array is None else array[index] for array in self))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Encoded examples; made by the functions of `funnel.data.encoding`.

    Attributes:
        token_ids: [t], the token ids of all rows, concatenated.
        rows: where each row is in `token_ids`, and its label.
        pad_id: the padding token's id.
        truncation: how much text was cut off.
        token_labels: [t], label id of every token, `IGNORED` for tokens without one; None unless tokens have labels.
        offsets: [t, 2], first character of every token in the example's text and the one after its last; -1 for special
            tokens. None unless a problem needs them.
        source: the examples; None for texts encoded in memory.
        digest: checksum of the source's content; "" for texts encoded in memory.
        warnings: suspected problems with the texts, one line each.
    """

    token_ids: np.ndarray
    rows: Rows
    pad_id: int
    truncation: Truncation
    token_labels: np.ndarray | None = None
    offsets: np.ndarray | None = None
    source: Source | None = None
    digest: str = ""
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def longest(self) -> int:
        """Number of tokens of the longest row."""
        return int(self.lengths.max())

    @cached_property
    def examples(self) -> list[Any]:
        """The examples of the source, read once; none for texts encoded in memory."""
        return [] if self.source is None else list(self.source.rows())

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each row, [n]; of the longest choice of a question."""
        return self.rows.lengths if self.rows.lengths.ndim == 1 else self.rows.lengths.max(1)

    @property
    def unit(self) -> str:
        """What a row is, for messages."""
        if self.rows.lengths.ndim == 2:
            return "question"
        return "example" if self.rows.examples is None else "window"

    @property
    def labels(self) -> np.ndarray:
        """As in `Rows`."""
        return self.rows.labels

    @property
    def hashes(self) -> np.ndarray:
        """Hashes of the texts, [n]."""
        return self.rows.hashes

    def subset(self, index: np.ndarray) -> "Dataset":
        """The rows with these numbers, in the given order; shares the token ids."""
        return replace(self, rows=self.rows.take(index))

    def input_ids(self, row: int, choice: int = 0) -> list[int]:
        """The token ids of one row, or of one of its choices, without padding."""
        start, length = (np.atleast_1d(array[row])[choice] for array in (self.rows.starts, self.rows.lengths))
        return [int(i) for i in self.token_ids[start : start + length]]

    def batch(self, index: np.ndarray, width: int | None = None) -> Batch:
        """Collects the rows with these numbers into a batch.

        Args:
            width: the padded length; default: the length of the longest of these rows.
        """
        width = width or int(self.lengths[index].max())
        rows = self.rows.take(index)
        shape = rows.lengths.shape  # [b] or [b, c]
        ids = np.full((rows.lengths.size, width), self.pad_id, dtype=np.int64)
        types = np.zeros_like(ids)
        mask = np.zeros_like(ids)
        token_labels = None if self.token_labels is None else np.full_like(ids, IGNORED)
        where = zip(rows.starts.flat, rows.lengths.flat, rows.pair_starts.flat, strict=True)
        for i, (start, length, pair_start) in enumerate(where):
            ids[i, :length] = self.token_ids[start : start + length]
            types[i, pair_start:length] = 1
            mask[i, :length] = 1
            if self.token_labels is not None and token_labels is not None:
                token_labels[i, :length] = self.token_labels[start : start + length]
        types[:, 0] = 2  # [CLS]
        labels = rows.labels if token_labels is None else token_labels
        labels = labels.astype(np.int64) if labels.dtype == np.int32 else labels
        ids, mask, types = (array.reshape(*shape, width) for array in (ids, mask, types))
        return text_batch(*(torch.from_numpy(array) for array in (ids, mask, types, labels)))

    def batches(self, batch_size: int, seed: int, *, start: int = 0, shard: Shard = WHOLE) -> Iterator[Batch]:
        """Yields one training batch per step, indefinitely: the rows of `batch_rows`, padded to the global batch's length."""
        for part in self.batch_rows(batch_size, seed, start=start, shard=shard):
            yield part.complete(self.batch(part.rows, part.length))

    def batch_rows(self, batch_size: int, seed: int, *, start: int = 0, shard: Shard = WHOLE) -> Iterator[BatchRows]:
        """Yields this rank's row numbers, one batch per step, indefinitely; see `batches.global_batches`."""
        for index in global_batches(self.lengths, batch_size, seed, start):
            yield rows_of_rank(index, self.lengths, shard)

    def training_batches(self, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """The batches of one epoch as arrays of row numbers; see `batches.epoch_batches`."""
        return epoch_batches(self.lengths, batch_size, seed, epoch)

    def evaluation_batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yields batches of row numbers, longest texts first, so that out-of-memory errors occur at once."""
        order = np.argsort(-self.lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]

    def split(self, share: float, seed: int) -> tuple["Dataset", "Dataset"]:
        """Splits at random into two datasets; the second gets `share` of the examples, stratified by class.

        The windows of an example stay together, and so do groups of examples, such as the questions about a text; the share is
        then that of the groups. Where a class's share is not a whole number, the classes that lose most by
        rounding down get one more. A class with a single example stays in the first dataset.

        Args:
            share: between 0 and 1, exclusive.

        Raises:
            FunnelError: one of the two would be empty.
        """
        random = np.random.default_rng(seed)
        examples = self._groups
        classes = [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)] if self._has_classes else []
        groups = [random.permutation(group) for group in classes or [np.unique(examples)]]
        exact = np.array([len(group) * share for group in groups])
        counts = np.floor(exact).astype(int)
        missing = round(sum(map(len, groups)) * share) - int(counts.sum())
        if missing > 0:
            counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
        chosen = [group[: min(count, len(group) - 1)] for group, count in zip(groups, counts, strict=True)]
        second = np.flatnonzero(np.isin(examples, np.concatenate(chosen)))
        if not 0 < len(second) < len(self):
            message = f"dev_share {share:g} of {len(self)} examples leaves train or dev empty"
            message += "; a class with a single text stays in train, so use a larger share or a separate dev file"
            raise FunnelError(message, "dev_share")
        return self.subset(np.setdiff1d(np.arange(len(self)), second)), self.subset(second)

    def split_fold(self, number: int, count: int, seed: int) -> tuple["Dataset", "Dataset"]:
        """Splits at random for cross-validation; the second dataset is fold `number` (from 1) of `count`.

        The folds are disjoint and cover all examples. They are stratified by class; in a multi-label dataset by combination of
        classes. The windows of an example, groups of examples, and examples with the same text stay together.

        Raises:
            FunnelError: there are fewer groups than folds.
        """
        units = join_groups(self._groups, self.hashes)
        n_units = int(units.max()) + 1
        if n_units < count:
            raise FunnelError(f"fold {number}/{count}: the data has only {n_units} different texts; use fewer folds", "fold")
        classes = np.zeros(len(self), int)
        if self._has_classes:
            classes = self.labels
        elif self.labels.ndim == 2 and self.labels.dtype == np.float32:  # multi-label
            classes = np.unique(self.labels, axis=0, return_inverse=True)[1].reshape(-1)
        is_second = assign_folds(units, classes, count, seed) == number - 1
        return self.subset(np.flatnonzero(~is_second)), self.subset(np.flatnonzero(is_second))

    @property
    def _groups(self) -> np.ndarray:
        """Which rows must stay together in a split: those with equal numbers, [n]."""
        for groups in (self.rows.groups, self.rows.examples):
            if groups is not None:
                return groups
        has_choices = self.rows.lengths.ndim == 2
        return np.unique(self.hashes, return_inverse=True)[1] if has_choices else np.arange(len(self))

    @property
    def _has_classes(self) -> bool:
        """Whether every row has one label, which is a class."""
        is_class = self.labels.ndim == 1 and self.labels.dtype == np.int32
        return is_class and self.token_labels is None and self.rows.lengths.ndim == 1

"""Reading files of examples, encoding them, and batching the result by length.

Shapes: b texts, l tokens of the longest text in a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from funnel.errors import FunnelError
from funnel.tokenizer import FunnelTokenizer


class Examples(NamedTuple):
    """Texts as they stand in the file: `pairs` holds the second texts, or is None; `labels` are ids."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[int]


class Batch(NamedTuple):
    """One batch, padded to its longest text.

    Attributes:
        input_ids, attention_mask, token_type_ids: [b, l], int64.
        labels: [b], int64.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device; to a GPU without waiting for it."""
        pinned = (tensor.pin_memory() if device.type == "cuda" else tensor for tensor in self)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in pinned))


def read_tsv(path: Path, text_columns: Sequence[str], label_column: str, labels: Mapping[str, int]) -> Examples:
    """Reads a tab-separated file as GLUE writes them: a line of column names, no quoting.

    Args:
        text_columns: names of one or two columns.
        labels: ids of the labels as they stand in the file.

    Raises:
        FunnelError: the file is missing or empty, a column is missing, a row has too many or too few fields, or its
            label is unknown; the message has the line's number.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        raise FunnelError(f"{path}: no such file; --data takes a folder that has it") from None
    except OSError as error:
        raise FunnelError(f"{path}: cannot be read ({error.strerror})") from None
    if lines[-1] == b"":
        lines.pop()
    if len(lines) < 2:
        raise FunnelError(f"{path}: empty; it takes a line of column names and a line an example")
    rows = (_fields(path, number, line) for number, line in enumerate(lines, 1))
    names = next(rows)
    if missing := [c for c in (*text_columns, label_column) if c not in names]:
        raise FunnelError(f"{path}, line 1: no column {missing[0]!r}; it has {', '.join(names)}")
    text_at = [names.index(c) for c in text_columns]
    label_at = names.index(label_column)
    texts: list[list[str]] = [[] for _ in text_columns]
    ids = []
    for number, fields in enumerate(rows, 2):
        if len(fields) != len(names):
            raise FunnelError(f"{path}, line {number}: {len(fields)} fields, but line 1 names {len(names)} columns")
        if fields[label_at] not in labels:
            raise FunnelError(f"{path}, line {number}: label {fields[label_at]!r} is none of {', '.join(labels)}")
        for column, at in zip(texts, text_at, strict=True):
            column.append(fields[at])
        ids.append(labels[fields[label_at]])
    return Examples(texts[0], texts[1] if len(texts) > 1 else None, ids)


def _fields(path: Path, number: int, line: bytes) -> list[str]:
    try:
        return line.removesuffix(b"\r").decode("utf-8").split("\t")
    except UnicodeDecodeError as error:
        raise FunnelError(f"{path}, line {number}: not UTF-8 text (byte {error.start} of the line)") from None


class Dataset:
    """Encoded examples, all ids in one flat array: what it holds in memory is the ids and little else.

    Args:
        examples: texts and labels.
        tokenizer: encodes them.
        max_length: tokens at most, special ones counted in; the rest of a longer text is cut.

    Attributes:
        cut: how many texts were too long.
    """

    def __init__(self, examples: Examples, tokenizer: FunnelTokenizer, max_length: int) -> None:
        ids, types, lengths = [], [], []
        self.cut = 0
        step = 4096  # encoded and packed piece by piece: Python lists of ids are many times larger than the arrays
        for start in range(0, len(examples.texts), step):
            pairs = None if examples.pairs is None else examples.pairs[start : start + step]
            encoded = tokenizer.encode(examples.texts[start : start + step], pairs, max_length)
            lengths += [len(e.input_ids) for e in encoded]
            ids.append(np.concatenate([np.array(e.input_ids, dtype=np.int32) for e in encoded]))
            types.append(np.concatenate([np.array(e.token_type_ids, dtype=np.int8) for e in encoded]))
            self.cut += sum(e.cut for e in encoded)
        self.lengths = np.array(lengths)
        self.labels = np.array(examples.labels)
        self.pad_id = tokenizer.pad_id
        self._ids, self._types = np.concatenate(ids), np.concatenate(types)
        self._starts = np.concatenate([[0], self.lengths.cumsum()])

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, index: np.ndarray) -> Batch:
        """Collects rows into a padded batch, [b, l] with l the longest row's length."""
        width = int(self.lengths[index].max())
        ids = np.full((len(index), width), self.pad_id, dtype=np.int64)
        types = np.zeros((len(index), width), dtype=np.int64)
        mask = np.zeros((len(index), width), dtype=np.int64)
        for row, i in enumerate(index):
            start, end = self._starts[i], self._starts[i + 1]
            ids[row, : end - start] = self._ids[start:end]
            types[row, : end - start] = self._types[start:end]
            mask[row, : end - start] = 1
        return Batch(*(torch.from_numpy(array) for array in (ids, mask, types, self.labels[index])))

    def training_batches(self, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """The batches of one epoch, as rows: shuffled, with texts of about one length together.

        Every epoch has every row once. The order depends on `seed` and `epoch` alone, so that a resumed run goes on
        with the same batches. Rows are shuffled, sorted by length within stretches of 64 batches, cut into batches, and
        the batches shuffled.
        """
        random = np.random.default_rng([seed, epoch])
        order = random.permutation(len(self))
        stretch = 64 * batch_size
        batches: list[np.ndarray] = []
        for start in range(0, len(order), stretch):
            rows = order[start : start + stretch]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        return [batches[i] for i in random.permutation(len(batches))]

    def evaluation_batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """All rows, longest texts first, so that a batch too large for the memory fails at once."""
        order = np.argsort(-self.lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]

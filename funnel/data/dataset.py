"""Encodes examples once, caches them on disk, and serves them as padded batches.

The cache stores token ids as one flat array (two bytes per id if the vocabulary allows) that is memory-mapped, so that
several processes share it and memory use does not grow with the dataset. A cache entry is reused if the content of the
file, the tokenizer, the maximum length and the labels are the same.

Shapes: b examples, l tokens of the longest example in a batch, n examples in a dataset.
"""

import hashlib
import itertools
import json
import math
import shutil
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from funnel.data.batches import WHOLE, Batch, BatchRows, Shard, epoch_batches, global_batches, rows_of_rank, text_batch
from funnel.data.checks import TextChecks, hash_texts
from funnel.data.files import Example, ExampleFile, InMemoryExamples, normalize_label, parse_score
from funnel.data.tokenizer import Encoding, FunnelTokenizer
from funnel.errors import FunnelError, format_list, plural
from funnel.io import cache_dir, read_json, write_cache_entry, write_json

CHUNK_SIZE = 1024  # examples per call of the tokenizer, which processes them in parallel
CACHE_VERSION = 3


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
    """One entry per example, each array [n].

    Attributes:
        starts: position of the first token in the flat array of token ids.
        lengths: number of tokens.
        pair_starts: offset of the second text's first token; the length if there is no second text.
        labels: int32 label ids, or float32 scores; -1 or nan without a label.
        hashes: uint64, equal for equal texts.
    """

    starts: np.ndarray
    lengths: np.ndarray
    pair_starts: np.ndarray
    labels: np.ndarray
    hashes: np.ndarray

    def take(self, index: np.ndarray) -> "Rows":
        """The entries of some examples."""
        return Rows(*(array[index] for array in self))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Encoded examples; made by `encode_examples` or `Dataset.from_texts`.

    Attributes:
        token_ids: the token ids of all examples, concatenated.
        rows: where each example is in `token_ids`, and its label.
        pad_id: the padding token's id.
        truncation: how much text was cut off.
        digest: checksum of the source's content; "" for texts encoded in memory.
        warnings: suspected problems with the texts, one line each.
    """

    token_ids: np.ndarray
    rows: Rows
    pad_id: int
    truncation: Truncation
    digest: str = ""
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_texts(
        cls, texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: FunnelTokenizer, max_length: int
    ) -> "Dataset":
        """Encodes unlabeled texts, or pairs of texts, in memory."""
        encodings = tokenizer.encode(texts, pairs, max_length)
        rows = _make_rows(encodings, np.full(len(texts), -1, dtype=np.int32), np.zeros(len(texts), np.uint64))
        truncation = _measure_truncation(encodings)
        return cls(_flatten(encodings, np.int32), rows, tokenizer.pad_id, truncation)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def longest(self) -> int:
        """Number of tokens of the longest example."""
        return int(self.lengths.max())

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, [n]."""
        return self.rows.lengths

    @property
    def labels(self) -> np.ndarray:
        """Label ids (int32) or scores (float32), [n]."""
        return self.rows.labels

    @property
    def hashes(self) -> np.ndarray:
        """Hashes of the texts, [n]."""
        return self.rows.hashes

    def subset(self, index: np.ndarray) -> "Dataset":
        """The examples with these row numbers, in the given order; shares the token ids."""
        return replace(self, rows=self.rows.take(index))

    def input_ids(self, row: int) -> list[int]:
        """The token ids of one example, without padding."""
        start = self.rows.starts[row]
        ids: list[int] = self.token_ids[start : start + self.lengths[row]].tolist()
        return ids

    def batch(self, index: np.ndarray, width: int | None = None) -> Batch:
        """Collects the examples with these row numbers into a batch.

        Args:
            width: the padded length; default: the length of the longest of these examples.
        """
        width = width or int(self.lengths[index].max())
        ids = np.full((len(index), width), self.pad_id, dtype=np.int64)
        types = np.zeros((len(index), width), dtype=np.int64)
        mask = np.zeros((len(index), width), dtype=np.int64)
        starts, lengths, pair_starts, labels, _ = self.rows.take(index)
        for i, (start, length, pair_start) in enumerate(zip(starts, lengths, pair_starts, strict=True)):
            ids[i, :length] = self.token_ids[start : start + length]
            types[i, pair_start:length] = 1
            mask[i, :length] = 1
        types[:, 0] = 2  # [CLS]
        labels = labels.astype(np.int64) if labels.dtype == np.int32 else labels
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
        """Splits at random into two datasets; the second gets `share` of the rows, stratified by class.

        Where a class's share is not a whole number of rows, the classes that lose most by rounding down get one more. A
        class with a single row stays in the first dataset.

        Args:
            share: between 0 and 1, exclusive.

        Raises:
            FunnelError: one of the two would be empty.
        """
        random = np.random.default_rng(seed)
        is_regression = self.labels.dtype == np.float32
        classes = [] if is_regression else [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)]
        groups = [random.permutation(group) for group in classes or [np.arange(len(self))]]
        exact = np.array([len(group) * share for group in groups])
        counts = np.floor(exact).astype(int)
        missing = round(len(self) * share) - int(counts.sum())
        if missing > 0:
            counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
        chosen = [group[: min(count, len(group) - 1)] for group, count in zip(groups, counts, strict=True)]
        second = np.sort(np.concatenate(chosen))
        if not 0 < len(second) < len(self):
            message = f"dev_share {share:g} of {len(self)} examples leaves train or dev empty"
            message += "; a class with a single text stays in train, so use a larger share or a separate dev file"
            raise FunnelError(message, "dev_share")
        return self.subset(np.setdiff1d(np.arange(len(self)), second)), self.subset(second)


# --- encoding and cache -----------------------------------------------------------------------------------------------


def encode_examples(
    source: ExampleFile | InMemoryExamples, label_ids: Mapping[str, int] | None, tokenizer: FunnelTokenizer, max_length: int
) -> Dataset:
    """Reads and encodes examples, or opens the result of an earlier call in the cache.

    Safe to call from several processes at once.

    Args:
        label_ids: label ids by the label as written in the file; None for regression, where labels are parsed as numbers.
        max_length: maximum number of tokens, including the special ones; longer texts are truncated.

    Raises:
        FunnelError: the source is malformed, has an unknown or non-numeric label, or changed while it was read.
    """
    job = _EncodingJob(source, label_ids, tokenizer, max_length)
    digest = source.digest()
    folder = cache_dir() / "encoded" / job.cache_key(digest)
    try:
        return _open(folder, tokenizer.pad_id, digest)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):  # missing or damaged
        shutil.rmtree(folder, ignore_errors=True)

    def write(temporary: Path) -> None:
        job.write(temporary)
        if source.digest() != digest:
            raise FunnelError(f"{getattr(source, 'path', 'examples')}: changed while being read; try again")

    folder, is_cached = write_cache_entry(folder, write)
    dataset = _open(folder, tokenizer.pad_id, digest)
    if not is_cached:
        weakref.finalize(dataset.token_ids, shutil.rmtree, folder, ignore_errors=True)
    return dataset


@dataclass(frozen=True)
class _EncodingJob:
    """What to encode, and how; the arguments of `encode_examples`."""

    source: ExampleFile | InMemoryExamples
    label_ids: Mapping[str, int] | None
    tokenizer: FunnelTokenizer
    max_length: int

    def cache_key(self, digest: str) -> str:
        """The name of the cache entry."""
        labels = None if self.label_ids is None else sorted(self.label_ids.items())
        key = [CACHE_VERSION, digest, self.tokenizer.tokenizer.to_str(), self.max_length, labels]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]

    def write(self, folder: Path) -> None:
        """Encodes the source chunk by chunk into the files of a folder."""
        dtype = np.uint16 if self.tokenizer.vocab_size <= 2**16 else np.int32
        label_dtype = np.float32 if self.label_ids is None else np.int32
        chunks: list[Rows] = []
        truncation, checks = Truncation(), TextChecks(self.tokenizer)
        examples = self.source.rows()
        with (folder / "ids.bin").open("wb") as file:
            while chunk := list(itertools.islice(examples, CHUNK_SIZE)):
                texts = [example.text for example in chunk]
                pairs = None if chunk[0].pair is None else [example.pair or "" for example in chunk]
                encodings = self.tokenizer.encode(texts, pairs, self.max_length)
                ids = _flatten(encodings, dtype)
                file.write(ids.tobytes())
                labels = np.array([self._label(example) for example in chunk], label_dtype)
                chunks.append(_make_rows(encodings, labels, hash_texts(texts, pairs)))
                checks.update(chunk, ids, chunks[-1].starts)
                truncation = truncation.merge(_measure_truncation(encodings))
        rows = Rows(*(np.concatenate(arrays) for arrays in zip(*chunks, strict=True)))
        rows = rows._replace(starts=_starts(rows.lengths))
        np.savez(folder / "rows.npz", allow_pickle=False, **rows._asdict())
        about = {"dtype": np.dtype(dtype).name, "truncation": list(truncation), "warnings": checks.warnings()}
        write_json(folder / "about.json", about)

    def _label(self, example: Example) -> float:
        """An example's label id or score; -1 or nan without a label."""
        if example.label is None:
            return math.nan if self.label_ids is None else -1
        if self.label_ids is not None:
            if example.label not in self.label_ids:
                raise self.source.error(example.line, _unknown_label(example.label, self.label_ids))
            return self.label_ids[example.label]
        score = parse_score(example.label)
        if score is None:
            raise self.source.error(example.line, f"label {example.label!r} is not a finite float32")
        return score


def _unknown_label(label: str, known: Iterable[str]) -> str:
    """The message for a label that the training set does not have."""
    similar = next((other for other in known if normalize_label(other) == normalize_label(label)), None)
    hint = f"; only case, spaces or number format differ from {similar!r}" if similar is not None else ""
    return f"unknown label {label!r}; the labels are {format_list(known)}{hint}"


def _open(folder: Path, pad_id: int, digest: str) -> Dataset:
    """Opens a cache entry. Raises one of several exceptions if it is missing or damaged."""
    about = read_json(folder / "about.json")
    token_ids = np.memmap(folder / "ids.bin", dtype=about["dtype"], mode="r")
    with np.load(folder / "rows.npz") as arrays:
        rows = Rows(**arrays)
    if int(rows.starts[-1]) + int(rows.lengths[-1]) != len(token_ids):
        raise ValueError(f"{folder}: damaged")
    return Dataset(token_ids, rows, pad_id, Truncation(*about["truncation"]), digest, tuple(about["warnings"]))


def _make_rows(encodings: Sequence[Encoding], labels: np.ndarray, hashes: np.ndarray) -> Rows:
    """The rows of encoded examples whose token ids are concatenated."""
    lengths = np.array([len(encoding.input_ids) for encoding in encodings], dtype=np.int32)
    pair_starts = [e.token_type_ids.index(1) if e.token_type_ids[-1] == 1 else len(e.input_ids) for e in encodings]
    return Rows(_starts(lengths), lengths, np.array(pair_starts, dtype=np.int32), labels, hashes)


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], lengths[:-1].cumsum(dtype=np.int64)])


def _flatten(encodings: Iterable[Encoding], dtype: type) -> np.ndarray:
    return np.concatenate([np.array(encoding.input_ids, dtype=dtype) for encoding in encodings])


def _measure_truncation(encodings: Sequence[Encoding]) -> Truncation:
    lost = [encoding.full_length - len(encoding.input_ids) for encoding in encodings]
    lengths = [encoding.full_length for encoding in encodings]
    return Truncation(sum(map(bool, lost)), sum(lost), sum(lengths), max(lengths))

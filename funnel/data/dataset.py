"""Examples as ids: encoded once, kept on disk, and batched by length.

Encoded examples lie in a cache folder as flat arrays, two bytes an id where the vocabulary allows, and are mapped into
memory: what is needed of them is read when it is needed, and several processes share it. A cached file is used again
if the content of the text file, the tokenizer, the maximal length and the labels are the same.

Shapes: b texts, l tokens of the longest text in a batch.
"""

import hashlib
import itertools
import json
import math
import shutil
import tempfile
import warnings
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from funnel.data.files import Example, ExampleFile
from funnel.data.tokenizer import Encoding, FunnelTokenizer
from funnel.errors import FunnelError, error_reason, format_list
from funnel.io import cache_dir, read_json, write_json

CHUNK = 1024  # rows that are encoded at a time: the tokenizer works on them in parallel
VERSION = 1  # of the cached files
LARGEST_SCORE = float(np.finfo(np.float32).max)


class Batch(NamedTuple):
    """One batch, padded to its longest text.

    Attributes:
        input_ids, attention_mask, token_type_ids: [b, l], int64.
        labels: [b], int64 label ids, or float32 scores.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device; to a GPU without waiting for it."""
        pinned = (tensor.pin_memory() if device.type == "cuda" else tensor for tensor in self)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in pinned))


class InMemoryExamples(NamedTuple):
    """Examples that are no file: texts, their second texts or None, and labels as a file would have them."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[str]

    def rows(self) -> Iterator[Example]:
        pairs: Iterable[str | None] = self.pairs if self.pairs is not None else itertools.repeat(None, len(self.texts))
        for number, (text, pair, label) in enumerate(zip(self.texts, pairs, self.labels, strict=True), 1):
            yield Example(text, pair, label, number)

    def iter_texts(self) -> Iterator[str]:
        yield from itertools.chain(self.texts, self.pairs or [])

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()

    def error(self, line: int | str, message: str) -> FunnelError:
        return FunnelError(f"example {line}: {message}")


class Cut(NamedTuple):
    """What did not fit: how many texts were cut, how many of all tokens that lost, and how long the longest text is."""

    texts: int
    lost: int
    tokens: int
    longest: int

    def __str__(self) -> str:
        share = self.lost / max(1, self.tokens)
        return f"{self.texts:,} texts are longer and were cut, which lost {share:.1%} of all tokens (longest: {self.longest:,})"


class Dataset:
    """Encoded examples. `encode` makes one.

    Attributes:
        lengths: [n], tokens of each example.
        labels: [n], int32 label ids, or float32 scores.
        cut: what did not fit.
        digest: checksum of the source's content, where it has one.
    """

    def __init__(self, ids: np.ndarray, rows: Mapping[str, np.ndarray], cut: Cut, pad_id: int, digest: str = "") -> None:
        self._ids = ids
        self._starts, self._seconds = rows["starts"], rows["seconds"]
        self.lengths, self.labels = rows["lengths"], rows["labels"]
        self.cut = cut
        self.pad_id = pad_id
        self.digest = digest

    @classmethod
    def of(cls, texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: FunnelTokenizer, max_length: int) -> "Dataset":
        """Encodes texts without labels, in memory."""
        encoded = tokenizer.encode(texts, pairs, max_length)
        rows = _rows(encoded, pairs is not None) | {"labels": np.full(len(texts), -1, dtype=np.int32)}
        rows["starts"] = np.concatenate([[0], rows["lengths"][:-1].cumsum(dtype=np.int64)])
        cut = _cut(encoded, texts, pairs, tokenizer)
        return cls(_ids(encoded, np.int32), rows, cut, tokenizer.pad_id)

    def __len__(self) -> int:
        return len(self.lengths)

    def subset(self, index: np.ndarray) -> "Dataset":
        """Some of the rows, in the order given; the ids are shared."""
        rows = {"starts": self._starts, "seconds": self._seconds, "lengths": self.lengths, "labels": self.labels}
        return Dataset(self._ids, {name: array[index] for name, array in rows.items()}, self.cut, self.pad_id, self.digest)

    def ids(self, row: int) -> list[int]:
        """The ids of one example."""
        found: list[int] = self._ids[self._starts[row] : self._starts[row] + self.lengths[row]].tolist()
        return found

    def batch(self, index: np.ndarray, width: int | None = None) -> Batch:
        """Collects rows into a padded batch, [b, l] with l the width, or else the longest row's length."""
        width = width or int(self.lengths[index].max())
        ids = np.full((len(index), width), self.pad_id, dtype=np.int64)
        types = np.zeros((len(index), width), dtype=np.int64)
        mask = np.zeros((len(index), width), dtype=np.int64)
        for row, i in enumerate(index):
            start, length = self._starts[i], self.lengths[i]
            ids[row, :length] = self._ids[start : start + length]
            types[row, self._seconds[i] : length] = 1
            mask[row, :length] = 1
        types[:, 0] = 2
        labels = self.labels[index]
        labels = labels.astype(np.int64) if labels.dtype == np.int32 else labels
        return Batch(*(torch.from_numpy(array) for array in (ids, mask, types, labels)))

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
        """The batches of all steps from number `start` on, epoch after epoch, without an end."""
        epoch, offset = divmod(start, -(-len(self) // batch_size))
        while True:
            yield from self.training_batches(batch_size, seed, epoch)[offset:]
            epoch, offset = epoch + 1, 0

    def training_batches(self, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """The batches of one epoch, as rows: shuffled, with texts of about one length main_process_first.

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

    def split(self, share: float, seed: int) -> tuple["Dataset", "Dataset"]:
        """Two datasets, the second with `share` of the rows, and about as many of every class.

        Of classes whose share is a fraction of a row, those get one more that lose most by rounding down. A class of one
        row stays in the first.

        Raises:
            FunnelError: one of them would be empty, or the share is none.
        """
        if not 0 < share < 1:
            raise FunnelError(f"--dev-share {share}: it takes a share of the texts, above 0 and below 1")
        random = np.random.default_rng(seed)
        is_score = self.labels.dtype == np.float32
        groups = [np.arange(len(self))] if is_score else [np.flatnonzero(self.labels == c) for c in np.unique(self.labels)]
        groups = [random.permutation(group) for group in groups]
        wanted = np.array([len(group) * share for group in groups])
        counts = np.floor(wanted).astype(int)
        missing = round(len(self) * share) - int(counts.sum())
        if missing > 0:
            counts[np.argsort(counts - wanted, kind="stable")[:missing]] += 1
        chosen = np.sort(np.concatenate([group[: min(n, len(group) - 1)] for group, n in zip(groups, counts, strict=True)]))
        if not 0 < len(chosen) < len(self):
            raise FunnelError(
                f"--dev-share {share:g} of {len(self)} examples leaves train or dev empty; name a file with --dev"
            )
        return self.subset(np.setdiff1d(np.arange(len(self)), chosen)), self.subset(chosen)


def encode(
    source: ExampleFile | InMemoryExamples, labels: Mapping[str, int] | None, tokenizer: FunnelTokenizer, max_length: int
) -> Dataset:
    """Reads and encodes examples, or takes what an earlier call left in the cache.

    Args:
        source: where the examples are.
        labels: ids by what stands in the file; None for scores, which become numbers. Rows without a label get -1 (nan).
        tokenizer: encodes them.
        max_length: tokens at most, special ones counted in; the rest of a longer text is cut.

    Raises:
        FunnelError: the source has a mistake, a label is unknown or no number, or the file changed while it was read.
    """
    digest = source.digest()
    key = [VERSION, digest, tokenizer.tokenizer.to_str(), max_length, labels and sorted(labels.items())]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    folder = cache_dir() / "encoded" / name
    if (folder / "rows.npz").is_file():
        try:
            return _open(folder, tokenizer.pad_id, digest)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, FunnelError):  # damaged: it is made again
            shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part, is_kept = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=folder.parent)), True
    except OSError as error:
        warnings.warn(f"{folder.parent}: cannot be written ({error_reason(error)}); encoded anew in every run", stacklevel=2)
        part, is_kept = Path(tempfile.mkdtemp(prefix="funnel-")), False
    try:
        _write(part, source, labels, tokenizer, max_length)
        if source.digest() != digest:
            assert isinstance(source, ExampleFile)
            raise FunnelError(f"{source.path}: changed while it was read; start again")
        if is_kept:
            try:
                part.replace(folder)
            except OSError:  # another process was faster
                shutil.rmtree(part, ignore_errors=True)
            return _open(folder, tokenizer.pad_id, digest)
        dataset = _open(part, tokenizer.pad_id, digest)
        weakref.finalize(dataset, shutil.rmtree, part, ignore_errors=True)
        return dataset
    except OSError as error:
        raise FunnelError(
            f"{part}: cannot be written ({error_reason(error)}); $FUNNEL_CACHE names another folder for encoded texts"
        ) from None
    finally:
        if is_kept:
            shutil.rmtree(part, ignore_errors=True)


def _write(
    folder: Path,
    source: ExampleFile | InMemoryExamples,
    labels: Mapping[str, int] | None,
    tokenizer: FunnelTokenizer,
    max_length: int,
) -> None:
    """Encodes a source piece by piece into the files of a folder."""
    kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    parts: dict[str, list[np.ndarray]] = {"lengths": [], "seconds": [], "labels": []}
    cut = Cut(0, 0, 0, 0)
    rows = source.rows()
    with (folder / "ids.bin").open("wb") as file:
        while chunk := list(itertools.islice(rows, CHUNK)):
            texts = [row.text for row in chunk]
            pairs = None if chunk[0].pair is None else [row.pair or "" for row in chunk]
            encoded = tokenizer.encode(texts, pairs, max_length)
            file.write(_ids(encoded, kind).tobytes())
            found = _rows(encoded, pairs is not None)
            found["labels"] = np.array(
                [_label(row, labels, source) for row in chunk], np.float32 if labels is None else np.int32
            )
            for name, array in found.items():
                parts[name].append(array)
            more = _cut(encoded, texts, pairs, tokenizer)
            cut = Cut(cut.texts + more.texts, cut.lost + more.lost, cut.tokens + more.tokens, max(cut.longest, more.longest))
    arrays = {name: np.concatenate(pieces) for name, pieces in parts.items()}
    arrays["starts"] = np.concatenate([[0], arrays["lengths"][:-1].cumsum(dtype=np.int64)])
    np.savez(folder / "rows.npz", allow_pickle=False, **arrays)
    write_json(folder / "about.json", {"ids": np.dtype(kind).name, "cut": list(cut)})


def _cut(encoded: Sequence[Encoding], texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: FunnelTokenizer) -> Cut:
    """What of some texts did not fit."""
    rows = [i for i, e in enumerate(encoded) if e.cut]
    whole = tokenizer.encode([texts[i] for i in rows], pairs and [pairs[i] for i in rows], 2**31 - 1) if rows else []
    lost = sum(len(e.input_ids) for e in whole) - sum(len(encoded[i].input_ids) for i in rows)
    tokens = sum(len(e.input_ids) for e in encoded) + lost
    return Cut(len(rows), lost, tokens, max(len(e.input_ids) for e in [*encoded, *whole]))


def _ids(encoded: Sequence[Encoding], kind: type) -> np.ndarray:
    return np.concatenate([np.array(e.input_ids, dtype=kind) for e in encoded])


def _rows(encoded: Sequence[Encoding], are_pairs: bool) -> dict[str, np.ndarray]:
    """Lengths, and where the second texts begin: at the first token of type 1."""
    lengths = np.array([len(e.input_ids) for e in encoded], dtype=np.int32)
    seconds = [e.token_type_ids.index(1) for e in encoded] if are_pairs else lengths
    return {"lengths": lengths, "seconds": np.array(seconds, dtype=np.int32)}


def _open(folder: Path, pad_id: int, digest: str) -> Dataset:
    about = read_json(folder / "about.json")
    ids = np.memmap(folder / "ids.bin", dtype=about["ids"], mode="r")
    with np.load(folder / "rows.npz") as file:
        rows = dict(file)
    if int(rows["starts"][-1]) + int(rows["lengths"][-1]) != len(ids):
        raise FunnelError(f"{folder}: damaged")
    return Dataset(ids, rows, Cut(*about["cut"]), pad_id, digest)


def to_score(written: str) -> float | None:
    """The number that a label is; None if it is none, or is not finite in float32."""
    if "_" in written or not written.isascii():  # Python would take "2020_01", other programs do not
        return None
    try:
        score = float(written)
    except ValueError:
        return None
    return score if abs(score) <= LARGEST_SCORE else None


def _label(row: Example, labels: Mapping[str, int] | None, source: ExampleFile | InMemoryExamples) -> float:
    """A row's label id or score."""
    if labels is None:
        if row.label is None:
            return math.nan
        score = to_score(row.label)
        if score is None:
            raise source.error(row.line, f"label {row.label!r} is no number that float32 holds")
        return score
    if row.label is None:
        return -1
    if row.label not in labels:
        raise source.error(row.line, f"label {row.label!r} is none of {format_list(labels)}")
    return labels[row.label]

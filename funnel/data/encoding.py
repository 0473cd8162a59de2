"""Encodes examples once and caches the result on disk.

The cache stores token ids as one flat array (two bytes per id if the vocabulary allows) that is memory-mapped, so that several
processes share it and memory use does not grow with the dataset. A cache entry is reused if the content of the source, the
tokenizer, the maximum length and the encoder's settings are the same.

An encoder turns examples into rows of token ids: `TextEncoder` for texts and pairs of texts; the other kinds of problems have
their own.
"""

import itertools
import math
import shutil
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from funnel.data.checks import TextChecks, hash_texts
from funnel.data.dataset import Dataset, Rows, Truncation
from funnel.data.files import Example, Source, normalize_label, parse_score
from funnel.data.tokenizer import Encoding, FunnelTokenizer
from funnel.errors import FunnelError, format_list
from funnel.io import cache_dir, json_digest, read_json, write_cache_entry, write_json

CHUNK_SIZE = 1024  # examples per call of the tokenizer, which processes them in parallel
CACHE_VERSION = 4
FLAT_ARRAYS = ("token_labels", "offsets")  # one entry per token, beside the ids


class EncodedRows(NamedTuple):
    """Encoded examples; their token ids are concatenated.

    Attributes:
        token_ids: [t].
        rows: starts, lengths and labels of each row. `starts` begins with 0.
        truncation: how much text was cut off.
        token_labels, offsets: as in `Dataset`.
    """

    token_ids: np.ndarray
    rows: Rows
    truncation: Truncation
    token_labels: np.ndarray | None = None
    offsets: np.ndarray | None = None


class Encoder(Protocol):
    """Turns examples into rows of token ids."""

    def settings(self) -> Any:
        """What the result depends on besides the examples, the tokenizer and the maximum length; as for `json.dumps`."""

    def encode(self, source: Source, examples: Sequence[Any], tokenizer: FunnelTokenizer, max_length: int) -> EncodedRows:
        """Encodes some examples.

        Args:
            source: of the examples, for error messages.
            max_length: maximum number of tokens of a row, including the special ones.

        Raises:
            FunnelError: a label is missing or invalid, or a text cannot be encoded.
        """


@dataclass(frozen=True)
class TextEncoder:
    """Encodes texts, or pairs of texts, with one label each; longer texts are truncated.

    Attributes:
        label_ids: label ids by the label as written in the source; None if labels are scores.
        multi_label: whether an example has any number of labels (`Example.labels`) instead of exactly one.
    """

    label_ids: Mapping[str, int] | None
    multi_label: bool = False

    def settings(self) -> Any:
        labels = None if self.label_ids is None else sorted(self.label_ids.items())
        return ["texts", labels, self.multi_label]

    def encode(self, source: Source, examples: Sequence[Example], tokenizer: FunnelTokenizer, max_length: int) -> EncodedRows:
        texts = [example.text for example in examples]
        pairs = None if examples[0].pair is None else [example.pair or "" for example in examples]
        encodings = tokenizer.encode(texts, pairs, max_length)
        rows = text_rows(encodings, self._labels(source, examples), hash_texts(texts, pairs))
        return EncodedRows(flatten_ids(encodings), rows, measure_truncation(encodings))

    def _labels(self, source: Source, examples: Sequence[Example]) -> np.ndarray:
        """Label ids [n], scores [n], or one indicator per class [n, k]; -1 or nan without a label."""
        if self.label_ids is None:
            return np.array([_score(source, example) for example in examples], np.float32)
        if not self.multi_label:
            return np.array([_label_id(source, example, self.label_ids) for example in examples], np.int32)
        labels = np.zeros((len(examples), len(self.label_ids)), np.float32)
        for i, example in enumerate(examples):
            if example.label is None:
                labels[i] = math.nan
            for label in example.labels:
                labels[i, _label_id(source, example._replace(label=label), self.label_ids)] = 1
        return labels


def _label_id(source: Source, example: Example, label_ids: Mapping[str, int]) -> int:
    """An example's label id; -1 without a label."""
    if example.label is None:
        return -1
    if example.label not in label_ids:
        raise source.error(example.line, unknown_label(example.label, label_ids))
    return label_ids[example.label]


def _score(source: Source, example: Example) -> float:
    """An example's score; nan without a label."""
    if example.label is None:
        return math.nan
    score = parse_score(example.label)
    if score is None:
        raise source.error(example.line, f"label {example.label!r} is not a finite float32")
    return score


def unknown_label(label: str, known: Iterable[str]) -> str:
    """The message for a label that the training set does not have."""
    similar = next((other for other in known if normalize_label(other) == normalize_label(label)), None)
    hint = f"; only case, spaces or number format differ from {similar!r}" if similar is not None else ""
    return f"unknown label {label!r}; the labels are {format_list(known)}{hint}"


# --- pieces of an encoder ---------------------------------------------------------------------------------------------


def text_rows(encodings: Sequence[Encoding], labels: np.ndarray, hashes: np.ndarray) -> Rows:
    """The rows of encoded texts whose token ids are concatenated."""
    lengths = np.array([len(encoding.input_ids) for encoding in encodings], dtype=np.int32)
    pair_starts = [e.token_type_ids.index(1) if e.token_type_ids[-1] == 1 else len(e.input_ids) for e in encodings]
    return Rows(row_starts(lengths), lengths, np.array(pair_starts, dtype=np.int32), labels, hashes)


def row_starts(lengths: np.ndarray) -> np.ndarray:
    """Positions of the first tokens of rows with these lengths; of the same shape, int64."""
    ends = lengths.reshape(-1).cumsum(dtype=np.int64)
    return np.concatenate([[0], ends[:-1]]).reshape(lengths.shape)


def flatten_ids(encodings: Iterable[Encoding]) -> np.ndarray:
    """All token ids, concatenated."""
    return np.concatenate([np.array(encoding.input_ids, dtype=np.int32) for encoding in encodings])


def measure_truncation(encodings: Sequence[Encoding]) -> Truncation:
    """How much of some texts was cut off."""
    lost = [encoding.full_length - len(encoding.input_ids) for encoding in encodings]
    lengths = [encoding.full_length for encoding in encodings]
    return Truncation(sum(map(bool, lost)), sum(lost), sum(lengths), max(lengths))


def encode_texts(texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: FunnelTokenizer, max_length: int) -> Dataset:
    """Encodes unlabeled texts, or pairs of texts, in memory."""
    encodings = tokenizer.encode(texts, pairs, max_length)
    rows = text_rows(encodings, np.full(len(texts), -1, dtype=np.int32), np.zeros(len(texts), np.uint64))
    return Dataset(flatten_ids(encodings), rows, tokenizer.pad_id, measure_truncation(encodings))


# --- cache ------------------------------------------------------------------------------------------------------------


def encode_examples(source: Source, encoder: Encoder, tokenizer: FunnelTokenizer, max_length: int) -> Dataset:
    """Reads and encodes examples, or opens the result of an earlier call in the cache.

    Safe to call from several processes at once.

    Args:
        max_length: maximum number of tokens of a row, including the special ones.

    Raises:
        FunnelError: the source is malformed, has an invalid label, or changed while it was read.
    """
    digest = source.digest()
    key = [CACHE_VERSION, digest, tokenizer.tokenizer.to_str(), max_length, encoder.settings()]
    folder = cache_dir() / "encoded" / json_digest(key)[:32]
    try:
        return replace(_open(folder, tokenizer.pad_id, digest), source=source)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):  # missing or damaged
        shutil.rmtree(folder, ignore_errors=True)

    def write(temporary: Path) -> None:
        chunks = _encode_chunks(source, encoder, tokenizer, max_length)
        _write(temporary, chunks, np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
        if source.digest() != digest:
            raise FunnelError(f"{getattr(source, 'path', 'examples')}: changed while being read; try again")

    folder, is_cached = write_cache_entry(folder, write)
    dataset = _open(folder, tokenizer.pad_id, digest)
    if not is_cached:
        weakref.finalize(dataset.token_ids, shutil.rmtree, folder, ignore_errors=True)
    return replace(dataset, source=source)


def encode_in_memory(source: Source, encoder: Encoder, tokenizer: FunnelTokenizer, max_length: int) -> Dataset:
    """Encodes examples without the cache; arguments and errors as in `encode_examples`."""
    chunks = [chunk for chunk, _ in _encode_chunks(source, encoder, tokenizer, max_length)]
    rows, truncation = _join_rows(chunks)
    flat = {name: [getattr(chunk, name) for chunk in chunks] for name in ("token_ids", *FLAT_ARRAYS)}
    joined = {name: None if arrays[0] is None else np.concatenate(arrays) for name, arrays in flat.items()}
    token_ids, token_labels, offsets = (joined[name] for name in ("token_ids", *FLAT_ARRAYS))
    assert token_ids is not None, "every encoder returns token ids"
    return Dataset(token_ids, rows, tokenizer.pad_id, truncation, token_labels, offsets, source)


def _encode_chunks(
    source: Source, encoder: Encoder, tokenizer: FunnelTokenizer, max_length: int
) -> Iterator[tuple[EncodedRows, list[str]]]:
    """Yields encoded rows, with the warnings about the texts so far."""
    checks = TextChecks(tokenizer)
    examples = source.rows()
    while chunk := list(itertools.islice(examples, CHUNK_SIZE)):
        encoded = encoder.encode(source, chunk, tokenizer, max_length)
        if isinstance(chunk[0], Example):
            checks.update(chunk, encoded.token_ids, encoded.rows.starts)
        yield encoded, checks.warnings()


def _join_rows(chunks: Sequence[EncodedRows]) -> tuple[Rows, Truncation]:
    """The rows of all chunks, as positions in the concatenation of their token ids, and how much text was cut off."""
    truncation, n_examples, examples = Truncation(), 0, []
    for chunk in chunks:
        truncation = truncation.merge(chunk.truncation)
        if chunk.rows.examples is not None:
            examples.append(chunk.rows.examples + n_examples)
            n_examples += int(chunk.rows.examples[-1]) + 1
    lengths, pair_starts, labels, hashes = (np.concatenate([chunk.rows[field] for chunk in chunks]) for field in range(1, 5))
    rows = Rows(row_starts(lengths), lengths, pair_starts, labels, hashes, np.concatenate(examples) if examples else None)
    groups = [chunk.rows.groups for chunk in chunks if chunk.rows.groups is not None]
    rows = rows._replace(groups=np.concatenate(groups) if groups else None)
    return rows, truncation


def _write(folder: Path, chunks: Iterable[tuple[EncodedRows, list[str]]], dtype: type) -> None:
    """Writes a cache entry chunk by chunk."""
    rows: list[EncodedRows] = []
    warnings: list[str] = []
    dtypes: dict[str, str] = {}
    for chunk, so_far in chunks:
        warnings = so_far
        for name in ("token_ids", *FLAT_ARRAYS):
            array = getattr(chunk, name)
            if array is not None:
                array = array.astype(dtype) if name == "token_ids" else array
                dtypes[name] = array.dtype.name
                with (folder / f"{name}.bin").open("ab") as file:
                    file.write(array.tobytes())
        empty = np.empty(0, np.int32)
        rows.append(chunk._replace(token_ids=empty, token_labels=None, offsets=None))
    joined, truncation = _join_rows(rows)
    np.savez(folder / "rows.npz", allow_pickle=False, **{k: v for k, v in joined._asdict().items() if v is not None})
    write_json(folder / "about.json", {"dtypes": dtypes, "truncation": list(truncation), "warnings": warnings})


def _open(folder: Path, pad_id: int, digest: str) -> Dataset:
    """Opens a cache entry. Raises one of several exceptions if it is missing or damaged."""
    about = read_json(folder / "about.json")
    flat: dict[str, np.ndarray] = {
        name: np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r") for name, dtype in about["dtypes"].items()
    }
    with np.load(folder / "rows.npz") as arrays:
        rows = Rows(**arrays)
    n_tokens = int(rows.starts.reshape(-1)[-1]) + int(rows.lengths.reshape(-1)[-1])
    if "offsets" in flat:
        flat["offsets"] = flat["offsets"].reshape(-1, 2)
    if any(len(array) != n_tokens for array in flat.values()):
        raise ValueError(f"{folder}: damaged")
    token_ids, token_labels, offsets = flat["token_ids"], flat.get("token_labels"), flat.get("offsets")
    dataset = Dataset(token_ids, rows, pad_id, Truncation(*about["truncation"]), token_labels, offsets)
    return replace(dataset, digest=digest, warnings=tuple(about["warnings"]))

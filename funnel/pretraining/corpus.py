"""Text files, tokenized once into memory-mapped token ids.

A file is plain text, in which empty lines separate documents, or jsonl, with one document per line; both may be compressed
with gzip or xz. A corpus is stored in the cache and reused if the content of the files, the tokenizer and the text column are
the same. Encoding takes the same memory for a corpus of any size; training needs about 20 bytes per sequence.
"""

import contextlib
import itertools
import os
import shutil
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from funnel.data.files import is_utf8
from funnel.data.formats import read_lines, read_objects
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, format_list
from funnel.io import cache_dir, json_digest, read_json, sha256, write_cache_entry, write_json

CORPUS_VERSION = 1
CHUNK_DOCUMENTS = 1024  # per call of the tokenizer, which encodes them in parallel
CHUNK_CHARACTERS = 2**20
MAX_CHARACTERS = 2**18  # plain-text documents longer than this are split between lines, to bound memory
SHARD_TOKENS = 2**27  # per file; a shard ends with a document
MAX_UNKNOWN_SHARE = 0.01
COMPRESSED = (".gz", ".xz")
NOT_TEXT = (".csv", ".tsv", ".json", ".parquet", ".xlsx", ".zip", ".bz2", ".zst", ".7z", ".tar", ".tgz")
EXPECTED = "expected plain text (an empty line between documents) or .jsonl files, which may be compressed (.gz, .xz)"


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents as token ids, without special tokens; made by `prepare_corpus`.

    Attributes:
        shards: the token ids of consecutive documents, each array one-dimensional and memory-mapped; uint16, or uint32 for
            vocabularies of more than 65,536 tokens.
        lengths: [documents], int32, number of tokens of each document.
        digest: checksum of the files' contents and of how they are read.
        n_unknown: number of unknown tokens.
    """

    shards: tuple[np.ndarray, ...]
    lengths: np.ndarray
    digest: str
    n_unknown: int = 0
    shard_starts: np.ndarray = field(init=False)  # [shards], position of the first token of each shard in the corpus

    def __post_init__(self) -> None:
        sizes = np.array([len(shard) for shard in self.shards], np.int64)
        object.__setattr__(self, "shard_starts", sizes.cumsum() - sizes)

    @property
    def n_documents(self) -> int:
        """Number of documents, empty ones included."""
        return len(self.lengths)

    @cached_property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return sum(len(shard) for shard in self.shards)

    @property
    def unknown_share(self) -> float:
        """Share of the tokens that are unknown."""
        return self.n_unknown / self.n_tokens

    def starts(self) -> np.ndarray:
        """The position of each document's first token in the corpus. [documents], int64."""
        ends = self.lengths.cumsum(dtype=np.int64)
        return ends - self.lengths

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Some tokens of one document. [length]

        Args:
            start: position of the first token in the corpus.
        """
        shard = int(self.shard_starts.searchsorted(start, side="right")) - 1
        offset = start - int(self.shard_starts[shard])
        return self.shards[shard][offset : offset + length]


def prepare_corpus(files: Sequence[Path], tokenizer: FunnelTokenizer, text_column: str = "text") -> Corpus:
    """Tokenizes files, or opens the result of an earlier call in the cache.

    Safe to call from several processes at once. Warns if many tokens are unknown.

    Args:
        files: plain text or .jsonl, each also with .gz or .xz.
        text_column: the field with the text, in .jsonl files.

    Raises:
        FunnelError: a file is missing, damaged, not UTF-8 or of another format, or it changed while it was read; the files
            contain no text; the disk is full.
    """
    job = _Job(tuple(map(Path, files)), tokenizer, text_column)
    for path in job.files:
        check_corpus_file(path)
    before = job.file_states()
    digest = corpus_digest(job.files, text_column)
    folder = cache_dir() / "corpus" / job.cache_key(digest)

    def write(temporary: Path) -> None:
        job.write(temporary)
        for path, old, new in zip(job.files, before, job.file_states(), strict=True):
            if old != new:
                raise FunnelError(f"{path}: changed while being read; try again")

    try:
        corpus = _open(folder, digest)
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        shutil.rmtree(folder, ignore_errors=True)
        folder, is_cached = write_cache_entry(folder, write)
        corpus = _open(folder, digest)
        if not is_cached:
            weakref.finalize(corpus, shutil.rmtree, folder, ignore_errors=True)
    if corpus.unknown_share > MAX_UNKNOWN_SHARE:
        message = f"{corpus.unknown_share:.1%} of the corpus' tokens are unknown; use a tokenizer trained on similar text"
        warnings.warn(message, stacklevel=2)
    return corpus


def check_corpus_file(path: Path) -> None:
    """Checks that a file exists and that its name does not indicate an unsupported format.

    Raises:
        FunnelError: it is missing, a folder, or of an unsupported format.
    """
    if not os.path.exists(path):
        raise FunnelError(f"corpus {path}: no such file", "corpus")
    if os.path.isdir(path):
        raise FunnelError(f"corpus {path}: expected a file, found a folder; name the files in it", "corpus")
    if path.suffix.lower() in NOT_TEXT or _uncompressed_suffix(path) in NOT_TEXT:
        raise FunnelError(f"corpus {path}: unsupported format; {EXPECTED}", "corpus")


def read_documents(path: Path, text_column: str = "text") -> Iterator[str]:
    """Yields the documents of a file, holding one in memory at a time.

    In plain text, documents of more than `MAX_CHARACTERS` characters are split between lines.

    Raises:
        FunnelError: the file cannot be read or is malformed; the message names the line.
    """
    if _is_jsonl(path):
        return _read_jsonl(path, text_column)
    return _read_plain_text(path)


def train_tokenizer(files: Sequence[Path], text_column: str, vocab_size: int) -> FunnelTokenizer:
    """Trains a WordPiece vocabulary on the texts of a corpus, or reads it from the cache.

    Raises:
        FunnelError: as `prepare_corpus` and `FunnelTokenizer.train_wordpiece`.
    """
    for path in files:
        check_corpus_file(path)
    key = [CORPUS_VERSION, corpus_digest(files, text_column), vocab_size]
    folder = cache_dir() / "vocabularies" / json_digest(key)[:32]
    with contextlib.suppress(FunnelError, OSError):  # missing or damaged
        return FunnelTokenizer.load(folder)
    shutil.rmtree(folder, ignore_errors=True)
    texts = read_corpus(files, text_column)
    first = next(texts, None)
    if first is None:
        raise no_text(files)
    tokenizer = FunnelTokenizer.train_wordpiece(itertools.chain([first], texts), vocab_size)
    folder, is_cached = write_cache_entry(folder, tokenizer.save)
    if not is_cached:
        shutil.rmtree(folder, ignore_errors=True)
    return tokenizer


def corpus_digest(files: Sequence[Path], text_column: str) -> str:
    """A checksum of the files' contents and of how they are read.

    Raises:
        FunnelError: a file cannot be read, or two files have the same content.
    """
    checksums = [sha256(path) for path in files]
    if len(set(checksums)) < len(checksums):
        raise FunnelError("corpus: two files have the same content; name each file once", "corpus")
    formats = [(_is_jsonl(path) and text_column, path.suffix.lower() in COMPRESSED) for path in files]
    parts = [(*how, checksum) for how, checksum in zip(formats, checksums, strict=True)]
    return json_digest(parts)


def read_corpus(files: Sequence[Path], text_column: str) -> Iterator[str]:
    """Yields the documents of all files; see `read_documents`."""
    for path in files:
        yield from read_documents(path, text_column)


def no_text(files: Sequence[Path]) -> FunnelError:
    """The error for files without any text."""
    return FunnelError(f"corpus {format_list(map(str, files), 3)}: no text; {EXPECTED}", "corpus")


def _read_jsonl(path: Path, text_column: str) -> Iterator[str]:
    for number, values in read_objects(path, ()):
        place = f"{path}, line {number}"
        if text_column not in values:
            message = f"{place}: no field {text_column!r}; set text_column to one of the fields, {format_list(values)}"
            raise FunnelError(message, "text_column")
        text = values[text_column]
        if not isinstance(text, str):
            raise FunnelError(f"{place}: {text_column!r} has type {type(text).__name__}; expected a string")
        if not is_utf8(text):
            raise FunnelError(f"{place}: {text_column!r} contains a lone surrogate, which is not a valid character")
        yield text


def _read_plain_text(path: Path) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for line in read_lines(path):
        line = line.rstrip("\r\n")
        is_blank = not line.strip()
        if lines and (is_blank or size + len(line) > MAX_CHARACTERS):
            yield "\n".join(lines)
            lines, size = [], 0
        if not is_blank:
            lines.append(line)
            size += len(line) + 1
    if lines:
        yield "\n".join(lines)


def _uncompressed_suffix(path: Path) -> str:
    """ ".jsonl" for a.jsonl, a.jsonl.gz and a.jsonl.xz."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def _is_jsonl(path: Path) -> bool:
    return _uncompressed_suffix(path) == ".jsonl"


# --- encoding and cache -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What to encode, and how; the arguments of `prepare_corpus`."""

    files: tuple[Path, ...]
    tokenizer: FunnelTokenizer
    text_column: str

    def file_states(self) -> list[tuple[int, int]]:
        """Size and modification time of each file."""
        return [(state.st_size, state.st_mtime_ns) for state in map(os.stat, self.files)]

    def cache_key(self, digest: str) -> str:
        """The name of the cache entry."""
        key = [CORPUS_VERSION, digest, self.tokenizer.tokenizer.to_str()]
        return json_digest(key)[:32]

    def write(self, folder: Path) -> None:
        """Encodes the documents chunk by chunk into the files of a folder."""
        dtype = np.uint16 if self.tokenizer.vocab_size <= 2**16 else np.uint32
        unknown = self.tokenizer.ids.get("unk", -1)
        n_unknown, shards = 0, _ShardWriter(folder)
        progress = tqdm(desc="tokenizing", unit="document", unit_scale=True, disable=None, dynamic_ncols=True, delay=1)
        with (folder / "lengths.bin").open("wb") as lengths_file, shards, progress:
            for texts in _chunks(read_corpus(self.files, self.text_column)):
                documents = [np.array(ids, dtype) for ids in self.tokenizer.encode_plain(texts)]
                lengths_file.write(np.array([len(ids) for ids in documents], np.int32).tobytes())
                n_unknown += sum(int(np.count_nonzero(ids == unknown)) for ids in documents)
                for ids in documents:
                    shards.write(ids)
                progress.update(len(documents))
        if sum(shards.sizes) == 0:
            raise no_text(self.files)
        about = {"dtype": np.dtype(dtype).name, "shards": shards.sizes, "n_unknown": n_unknown}
        write_json(folder / "about.json", about)


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    """Groups documents for the tokenizer."""
    chunk: list[str] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if len(chunk) == CHUNK_DOCUMENTS or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _ShardWriter:
    """Writes documents to files of about `SHARD_TOKENS` tokens.

    Attributes:
        sizes: number of tokens of each file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes: list[int] = []
        self.file: BinaryIO | None = None

    def write(self, ids: np.ndarray) -> None:
        """Appends a document."""
        if len(ids) == 0:  # a shard must not consist of empty documents: empty files cannot be mapped
            return
        if self.file is None or self.sizes[-1] >= SHARD_TOKENS:
            self.close()
            self.file = _shard_path(self.folder, len(self.sizes)).open("wb")
            self.sizes.append(0)
        self.file.write(ids.tobytes())
        self.sizes[-1] += len(ids)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"tokens-{number:04d}.bin"


def _open(folder: Path, digest: str) -> Corpus:
    """Opens a cache entry. Raises one of several exceptions if it is missing or damaged."""
    about = read_json(folder / "about.json")
    paths = [_shard_path(folder, i) for i in range(len(about["shards"]))]
    shards = tuple(np.asarray(np.memmap(path, about["dtype"], "r")) for path in paths)  # a plain array is faster to slice
    corpus = Corpus(shards, np.memmap(folder / "lengths.bin", np.int32, "r"), digest, about["n_unknown"])
    if [len(shard) for shard in shards] != about["shards"] or int(corpus.lengths.sum(dtype=np.int64)) != corpus.n_tokens:
        raise ValueError(f"{folder}: damaged")
    return corpus

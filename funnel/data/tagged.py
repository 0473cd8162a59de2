"""Reads sentences with a tag for every word: column files, as in CoNLL's shared tasks, and jsonl, json and parquet files.

    column files    one word per line, in the first column, and its tag in the last one; columns are separated by tabs or, if
                    the first line has no tab, by spaces. A blank line ends a sentence. Lines that begin with -DOCSTART- end a
                    sentence, too, and are skipped.
    other files     one object per sentence with a list of strings `tokens` and a list of strings `tags` of the same length.
                    A sentence without words is kept, so that predictions are in the order of the file.

A byte-order mark, CRLF line endings and repeated blank lines are accepted. Everything else raises an error with file and line:
bytes that are not UTF-8, NUL bytes, rows with another number of columns than the first one, empty words and tags.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from funnel.data.files import Column, is_utf8
from funnel.data.formats import OLD_MAC_LINE_ENDINGS, ROW_NAMES, file_format, read_lines, read_objects
from funnel.errors import FunnelError, format_list, plural
from funnel.io import json_digest, sha256

DOCUMENT_START = "-DOCSTART-"
WORDS, TAGS = "tokens", "tags"  # names of the fields in jsonl, json and parquet files
EXPECTED_COLUMNS = "expected a word and its tag, separated by a tab or spaces"


class TaggedSentence(NamedTuple):
    """One sentence.

    Attributes:
        words: not empty, but may contain spaces.
        tags: one per word; None if the source has none.
        lines: where each word is, for error messages: the number of a line, or of a json item or parquet row.
    """

    words: list[str]
    tags: list[str] | None
    lines: Sequence[int]

    @property
    def text(self) -> str:
        """The words, separated by spaces."""
        return " ".join(self.words)

    @property
    def pair(self) -> None:
        """None: there is no second text."""
        return None


@dataclass(frozen=True)
class TaggedFile:
    """A file of sentences, and which of its columns to read.

    Attributes:
        path: a jsonl, json or parquet file; all others are column files.
        word_column, tag_column: names or, in column files, numbers from 0, or from -1 for the last one. None for the default.
        labeled: whether tags are read.
    """

    path: Path
    word_column: Column | None = None
    tag_column: Column | None = None
    labeled: bool = True

    @property
    def has_columns(self) -> bool:
        """Whether it is a column file."""
        return is_column_file(self.path)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The column of the words, and that of the tags if they are read."""
        words, tags = (0, -1) if self.has_columns else (WORDS, TAGS)
        chosen = words if self.word_column is None else self.word_column, tags if self.tag_column is None else self.tag_column
        return chosen if self.labeled else chosen[:1]

    @property
    def text_columns(self) -> tuple[Column, ...]:
        """None: a text consists of words."""
        return ()

    @property
    def description(self) -> str:
        """What is read, in one line."""
        last = {-1: "the last column"} if self.has_columns else {}
        names = [last.get(column, f"column {column!r}") if isinstance(column, int) else repr(column) for column in self.columns]
        return f"{self.path.name}: words in {names[0]}" + (f", tags in {names[1]}" if self.labeled else "")

    def in_folder(self, folder: Path) -> "TaggedFile":
        """The same file with its path taken relative to `folder`."""
        return replace(self, path=folder / self.path)

    def rows(self) -> Iterator[TaggedSentence]:
        """Reads the sentences in order, holding one in memory at a time (json: all).

        Raises:
            FunnelError: the file has no words, is unreadable or malformed; the message names file and line.
        """
        is_empty = True
        for sentence in self._read_columns() if self.has_columns else self._read_objects():
            is_empty &= not sentence.words
            yield sentence
        if is_empty:
            raise FunnelError(f"{self.path}: empty; expected at least one word")

    def iter_texts(self) -> Iterator[str]:
        """Yields the text of every sentence."""
        for sentence in self.rows():
            yield sentence.text

    def digest(self) -> str:
        """A checksum of the content and of the options for reading it."""
        options = [*self.columns, self.has_columns, file_format(self.path), sha256(self.path)]
        return json_digest(options)

    def error(self, line: int | str, message: str, parameter: str | None = None) -> FunnelError:
        """An error located at a line; `parameter` as in `FunnelError`."""
        name = ROW_NAMES.get(file_format(self.path), "line")
        return FunnelError(f"{self.path}, {name} {line}: {message}", parameter)

    # --- column files -------------------------------------------------------------------------------------------------

    def _read_columns(self) -> Iterator[TaggedSentence]:
        words: list[str] = []
        tags: list[str] = []
        lines: list[int] = []
        separator, first_line, width = "", 0, 0
        for number, line in enumerate(read_lines(self.path), 1):
            line = line.rstrip("\r\n")
            is_boundary = not line.strip(" \t") or line.split(maxsplit=1)[0] == DOCUMENT_START
            if is_boundary and words:
                yield TaggedSentence(words, tags if self.labeled else None, lines)
                words, tags, lines = [], [], []
            if is_boundary:
                continue
            separator = separator or ("\t" if "\t" in line else " ")
            fields = [field.strip(" ") for field in line.split(separator)]
            fields = fields if separator == "\t" else [field for field in fields if field]
            first_line, width = first_line or number, width or len(fields)
            if len(fields) != width:
                found = f"{plural(len(fields), 'column')}, but line {first_line} has {width}"
                raise self.error(number, f"{found}, separated by {'spaces' if separator == ' ' else 'tabs'}")
            word, *tag = self._select(number, fields)
            words.append(word)
            tags += tag
            lines.append(number)
        if words:
            yield TaggedSentence(words, tags if self.labeled else None, lines)

    def _select(self, number: int, fields: list[str]) -> list[str]:
        """The word and, if they are read, the tag of a row."""
        if "\r" in "".join(fields):
            raise self.error(number, OLD_MAC_LINE_ENDINGS)
        if self.labeled and len(fields) < 2:
            raise self.error(number, f"{plural(len(fields), 'column')}; {EXPECTED_COLUMNS}")
        selected = []
        for name, parameter, column in zip(("word", "tag"), ("text_column", "label_column"), self.columns, strict=False):
            index = column if isinstance(column, int) else -1
            if not -1 <= index < len(fields) or not isinstance(column, int):
                choices = f"choose {parameter} from 0 to {len(fields) - 1}"
                raise self.error(number, f"no column {column!r}; {choices}", parameter)
            if not fields[index]:
                raise self.error(number, f"the {name} is empty")
            selected.append(fields[index])
        return selected

    # --- jsonl, json and parquet --------------------------------------------------------------------------------------

    def _read_objects(self) -> Iterator[TaggedSentence]:
        for number, values in read_objects(self.path, map(str, self.columns)):
            words, *others = (self._read_list(number, values, str(column)) for column in self.columns)
            tags = others[0] if others else None
            if tags is not None and len(tags) != len(words):
                found = f"{plural(len(words), 'word')} in {self.columns[0]!r}, but {plural(len(tags), 'tag')}"
                raise self.error(number, f"{found} in {self.columns[1]!r}; expected one tag per word")
            yield TaggedSentence(words, tags, [number] * len(words))

    def _read_list(self, number: int, values: dict[str, Any], column: str) -> list[str]:
        """A field of an object, checked to be a list of strings that are not empty."""
        if column not in values:
            parameter = "text_column" if column == self.columns[0] else "label_column"
            raise self.error(number, f"no field {column!r}; choose {parameter} from {format_list(values)}", parameter)
        items = values[column]
        if not isinstance(items, list):
            raise self.error(number, f"{column!r} is {json.dumps(items, default=str)[:60]}; expected a list of strings")
        for index, item in enumerate(items):
            if not isinstance(item, str):
                found = f"{column}[{index}] is {json.dumps(item, default=str)[:60]}"
                raise self.error(number, f"{found}; expected a string")
            if not item:
                raise self.error(number, f"{column}[{index}] is empty")
            if not is_utf8(item):
                raise self.error(number, f"{column}[{index}] contains a lone surrogate, which is not a valid character")
        return items


class InMemorySentences(NamedTuple):
    """Unlabeled sentences in memory; has the interface of `TaggedFile`."""

    sentences: Sequence[list[str]]

    def rows(self) -> Iterator[TaggedSentence]:
        """Yields the sentences in order."""
        for number, words in enumerate(self.sentences, 1):
            yield TaggedSentence(words, None, [number] * len(words))

    def digest(self) -> str:
        """A checksum of the sentences."""
        return json_digest(list(self.sentences))

    def error(self, line: int | str, message: str) -> FunnelError:
        """An error located at a sentence."""
        return FunnelError(f"sentence {line}: {message}")


def is_column_file(path: Path) -> bool:
    """Whether a file is read as a column file: by its name, all but jsonl, json and parquet files."""
    return file_format(path) not in ("jsonl", "json", "parquet")


def has_token_lists(path: Path, names: Sequence[str]) -> bool:
    """Whether the first object of a jsonl, json or parquet file has fields with these names that are lists.

    Raises:
        FunnelError: the file is unreadable or malformed.
    """
    if is_column_file(path):
        return False
    _, values = next(iter(read_objects(path, names)), (0, {}))
    return all(isinstance(values.get(name), list) for name in names)

"""Reads examples from files: csv, tsv, jsonl, json and parquet files, and folders with one text per file.

No row is skipped or repaired silently:

- A byte-order mark, CRLF line endings and blank lines at the end are accepted. An empty text is a valid example.
- csv follows RFC 4180, including line breaks inside quotes. tsv has no quoting, as in GLUE's files, so that a lone quote
  in a sentence does not swallow the lines after it; `ExampleFile.dialect` says otherwise for the user's own files.
- Everything else raises an error with file and line: bytes that are not UTF-8, NUL bytes, rows with the wrong number of
  fields, missing or duplicate columns, blank lines between rows.
"""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from funnel.data.formats import (
    DIALECTS,
    OLD_MAC_LINE_ENDINGS,
    ROW_NAMES,
    SEPARATORS,
    Dialect,
    file_format,
    read_column_names,
    read_objects,
    read_table,
)
from funnel.errors import FunnelError, format_list, plural
from funnel.io import json_digest, os_errors, sha256

MAX_SCORE = 3.4028234663852886e38  # the largest finite float32
Column = str | int


class Source(Protocol):
    """Where examples come from: a file, or memory."""

    def rows(self) -> Iterator[Any]:
        """Yields the examples in order.

        Raises:
            FunnelError: the source is empty, unreadable or malformed.
        """

    def digest(self) -> str:
        """A checksum of the content and of the options for reading it."""

    def error(self, line: int | str, message: str) -> FunnelError:
        """An error located at an example."""


class SourceFile(Source, Protocol):
    """A file of examples."""

    @property
    def path(self) -> Path:
        """The file or folder."""

    @property
    def text_columns(self) -> tuple[Any, ...]:
        """What the texts are called."""

    def in_folder(self, folder: Path) -> Any:
        """The same file with its path taken relative to `folder`."""

    def iter_texts(self) -> Iterator[str]:
        """Yields all texts."""


class Example(NamedTuple):
    """One example.

    Attributes:
        text, pair: the text and, for tasks on pairs, the second text.
        label: the label as written in the file, a list of labels as JSON; None if the file has no labels.
        line: where the example starts, for error messages: the number of a line (json: item, parquet: row), or the path of
            a file in a folder.
        extra: the values of `ExampleFile.extra_columns`; those of json and parquet that are not strings are JSON.
    """

    text: str
    pair: str | None
    label: str | None
    line: int | str
    extra: tuple[str, ...] = ()

    @property
    def labels(self) -> list[str]:
        """The labels of a multi-label example: those of a JSON list, otherwise the parts between commas; none if empty."""
        return parse_labels(self.label or "")


class InMemoryExamples(NamedTuple):
    """Examples held in memory; has the interface of `ExampleFile`.

    Attributes:
        texts: one per example.
        pairs: the second texts; None for tasks on single texts.
        labels: as a file would contain them.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: list[str]

    def rows(self) -> Iterator[Example]:
        """Yields the examples in order."""
        pairs: Iterable[str | None] = self.pairs if self.pairs is not None else itertools.repeat(None, len(self.texts))
        for number, (text, pair, label) in enumerate(zip(self.texts, pairs, self.labels, strict=True), 1):
            yield Example(text, pair, label, number)

    def iter_texts(self) -> Iterator[str]:
        """Yields all texts, then all second texts."""
        yield from itertools.chain(self.texts, self.pairs or [])

    def digest(self) -> str:
        """A checksum of the examples."""
        return json_digest(self)

    def error(self, line: int | str, message: str) -> FunnelError:
        """An error located at an example."""
        return FunnelError(f"example {line}: {message}")


@dataclass(frozen=True)
class ExampleFile:
    """A file of examples, and which of its columns to read.

    Attributes:
        path: a file in one of the formats of `funnel.data.formats`, or a folder with one subfolder per label.
        text_columns: the column of the text, or the columns of the two texts of a pair. Columns are names, or, in files
            without a header, numbers starting at 0.
        label_column: None for unlabeled files.
        joined: join the text columns with a space into a single text (a title and the text below it).
        escaped: texts contain the escapes backslash-n and backslash-quote, as in the csv files of Zhang et al.
        label_folders: the subfolders, each named after its label. Each contains one .txt file per text.
        dialect: separator and quoting of a csv or tsv file; None for those of GLUE's tsv files, or of RFC 4180 for csv.
        extra_columns: further columns to read.
    """

    path: Path
    text_columns: tuple[Column, ...] = ()
    label_column: Column | None = None
    joined: bool = False
    escaped: bool = False
    label_folders: tuple[str, ...] = ()
    dialect: Dialect | None = None
    extra_columns: tuple[Column, ...] = ()

    def in_folder(self, folder: Path) -> "ExampleFile":
        """The same file with its path taken relative to `folder`."""
        return replace(self, path=folder / self.path)

    def rows(self) -> Iterator[Example]:
        """Reads the examples in order, holding one in memory at a time.

        Raises:
            FunnelError: the file is empty, unreadable or malformed; the message names file and line.
        """
        if self.label_folders:
            yield from self._read_folders()
            return
        n_texts, is_empty = len(self.text_columns), True
        for line, fields in self._read_fields():
            is_empty = False
            texts = [unescape(field) if self.escaped else field for field in fields[:n_texts]]
            label = fields[n_texts] if self.label_column is not None else None
            pair = texts[1] if len(texts) > 1 and not self.joined else None
            text = " ".join(texts) if self.joined else texts[0]
            yield Example(text, pair, label, line, tuple(fields[len(self.columns) :]))
        if is_empty:
            raise FunnelError(f"{self.path}: empty; expected {'a header and ' * self.has_header}at least one example")

    def check(self) -> None:
        """Reads the whole file, so that a malformed row is reported before any work is done.

        Raises:
            FunnelError: as in `rows`.
        """
        for _ in self.rows():
            pass

    def iter_texts(self) -> Iterator[str]:
        """Yields all texts; the second text of a pair follows the first."""
        for example in self.rows():
            yield example.text
            if example.pair is not None:
                yield example.pair

    @property
    def has_header(self) -> bool:
        """Whether columns are identified by name."""
        return any(isinstance(column, str) for column in self.text_columns)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns to read: those of the texts, then that of the label."""
        return self.text_columns if self.label_column is None else (*self.text_columns, self.label_column)

    @property
    def all_columns(self) -> tuple[Column, ...]:
        """`columns`, then `extra_columns`."""
        return (*self.columns, *self.extra_columns)

    def error(self, line: int | str, message: str, parameter: str | None = None) -> FunnelError:
        """An error located at a line, or at a file of a folder; `parameter` as in `FunnelError`."""
        name = ROW_NAMES.get(file_format(self.path), "line")
        place = f"{self.path}, {name} {line}" if isinstance(line, int) else line
        return FunnelError(f"{place}: {message}", parameter)

    @property
    def description(self) -> str:
        """What is read, in one line: "reviews.csv: text column 'review', label column 'stars', separated by semicolons"."""
        what = [f"text column{'s' * (len(self.text_columns) > 1)} {' and '.join(map(repr, self.text_columns))}"]
        if self.label_column is not None:
            what.append(f"label column {self.label_column!r}")
        if not self.has_header:
            what.append("no header")
        if self.dialect is not None:
            what.append(f"separated by {SEPARATORS[self.dialect.separator]}")
            if self.dialect.quoted and self.dialect.separator == "\t":
                what.append("quotes enclose fields")
        return f"{self.path.name}: {', '.join(what)}"

    def column_names(self) -> list[str]:
        """All columns of the file; without a header, their numbers."""
        names = read_column_names(self.path, self.dialect)
        return names if self.has_header else [str(number) for number in range(len(names))]

    def digest(self) -> str:
        """A checksum of the file's content and of the options for reading it."""
        options = (*self.columns, self.joined, self.escaped, *self.label_folders, file_format(self.path), *(self.dialect or ()))
        if not self.label_folders:
            parts = [sha256(self.path)]
        else:
            parts = [part for label, path in self._folder_files() for part in (label, path.name, sha256(path))]
        return json_digest([options, parts])

    def _read_fields(self) -> Iterator[tuple[int, list[str]]]:
        """Yields the number and the selected columns of each row."""
        format = file_format(self.path)
        if format in DIALECTS:
            yield from self._select_columns(read_table(self.path, self.dialect or DIALECTS[format]))
            return
        for number, values in read_objects(self.path, map(str, self.all_columns)):
            yield number, self._select_fields(number, values)

    def _select_columns(self, records: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
        """Reads the header, if there is one, and yields the selected columns of each row."""
        indices, width = None, 0
        for number, fields in records:
            if indices is None:
                indices, width = self._column_indices(number, fields), len(fields)
                if self.has_header:
                    continue
            if len(fields) != width:
                what = f"line 1 names {plural(width, 'column')}" if self.has_header else f"line 1 has {width}"
                raise self.error(number, f"{plural(len(fields), 'field')}, but {what}")
            yield number, [fields[i] for i in indices]

    def _column_indices(self, number: int, first_row: list[str]) -> list[int]:
        """The positions of the selected columns, given the first row."""
        if not self.has_header:
            indices = [int(column) for column in self.all_columns]
            if max(indices) >= len(first_row):
                raise self.error(number, f"{plural(len(first_row), 'field')}; expected at least {max(indices) + 1}")
            return indices
        if "\r" in "".join(first_row):
            raise self.error(number, OLD_MAC_LINE_ENDINGS)
        columns = self.all_columns
        for column in columns:
            if column not in first_row:
                raise self.error(number, f"no column {column!r}; the columns are {format_list(first_row)}")
            if first_row.count(str(column)) > 1:
                raise self.error(number, f"duplicate column {column!r}; rename one of them")
        return [first_row.index(str(column)) for column in columns]

    def _select_fields(self, number: int, values: dict[str, Any]) -> list[str]:
        """The selected columns of a JSON object; labels may be numbers, booleans or lists."""
        fields = []
        for i, column in enumerate(self.all_columns):
            if column not in values:
                raise self.error(number, f"no field {column!r}; the fields are {format_list(values)}")
            value, is_extra, is_label = values[str(column)], i >= len(self.columns), column == self.label_column
            is_labels = is_label and isinstance(value, list) and all(isinstance(item, str | int) for item in value)
            is_score = is_label and isinstance(value, bool | int | float)
            if not (isinstance(value, str) or is_extra or is_labels or is_score):
                expected = "a string, a number, or a list of strings" if is_label else "a string"
                if isinstance(value, dict) and file_format(self.path) == "json":
                    expected += "; write a list of objects, one per example (in pandas, orient='records')"
                raise self.error(number, f"{column!r} is {_to_json(value)[:60]}; expected {expected}")
            text = value if isinstance(value, str) else _to_json(value)
            if not is_utf8(text):
                raise self.error(number, f"{column!r} contains a lone surrogate, which is not a valid character")
            fields.append(text)
        return fields

    def _folder_files(self) -> Iterator[tuple[str, Path]]:
        """Yields label and path of each text file, sorted by name within a label."""
        for label in self.label_folders:
            folder = self.path / label
            with os_errors(folder):
                paths = sorted(path for path in folder.iterdir() if path.suffix == ".txt")
            if not paths:
                raise FunnelError(f"{folder}: no .txt files; expected one text per file")
            yield from ((label, path) for path in paths)

    def _read_folders(self) -> Iterator[Example]:
        for label, path in self._folder_files():
            with os_errors(path):
                content = path.read_bytes()
            try:
                text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
            except UnicodeDecodeError as error:
                raise FunnelError(f"{path}: not UTF-8 text (byte {error.start})") from None
            if "\0" in text:
                raise FunnelError(f"{path}: contains a NUL byte, so it is not a text file")
            yield Example(text.rstrip("\r\n"), None, label, str(path))


# --- text and values --------------------------------------------------------------------------------------------------


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)  # parquet files have dates and decimal numbers


def is_utf8(text: str) -> bool:
    """Whether a string can be encoded as UTF-8, that is, contains no lone surrogate."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def unescape(text: str) -> str:
    r"""Replaces the escapes `\n` and `\"` of Zhang et al.'s files with a line break and a quote."""
    return text.replace("\\n", "\n").replace('\\"', '"')


def parse_labels(text: str) -> list[str]:
    """The labels in a list: JSON, or separated by commas."""
    if text.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(text)
            if isinstance(values, list):
                return list(dict.fromkeys(value if isinstance(value, str) else _to_json(value) for value in values))
    return list(dict.fromkeys(label.strip() for label in text.split(",") if label.strip()))


def parse_score(label: str) -> float | None:
    """A label as a number; None if it is not a finite float32."""
    if "_" in label or not label.isascii():  # Python parses "2020_01" as a number, other programs do not
        return None
    try:
        score = float(label)
    except ValueError:
        return None
    return score if abs(score) <= MAX_SCORE else None


def normalize_label(label: str) -> str | float:
    """A value that labels have in common if they differ only in case, spaces or number format ("1", "1.0")."""
    score = parse_score(label)
    return score if score is not None else " ".join(label.casefold().split())

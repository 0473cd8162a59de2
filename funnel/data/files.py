"""Reads examples from files: tsv, csv and jsonl, plain or gzipped, and folders with one text per file.

No row is skipped or repaired silently:

- A byte-order mark and CRLF line endings are accepted. An empty text is a valid example.
- csv follows RFC 4180, including line breaks inside quotes. tsv has no quoting, as in GLUE's files, so that a lone quote
  in a sentence does not swallow the lines after it.
- Everything else raises an error with file and line: bytes that are not UTF-8, NUL bytes, rows with the wrong number of
  fields, missing or duplicate columns, blank lines.
"""

import csv
import gzip
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from funnel.errors import FunnelError, error_reason, format_list, plural
from funnel.io import os_errors, sha256

MAX_LINE_BYTES = 2**26  # a file without line breaks, or a decompression bomb, must not exhaust the memory
MAX_SCORE = 3.4028234663852886e38  # the largest finite float32
EXPECTED_FORMAT = "expected a .tsv, .csv or .jsonl file, optionally gzipped (.gz)"
OLD_MAC_LINE_ENDINGS = "lines end with CR only; convert the line endings to LF"
Column = str | int


class Example(NamedTuple):
    """One example.

    Attributes:
        text, pair: the text and, for tasks on pairs, the second text.
        label: the label as written in the file; None if the file has no labels.
        line: where the example starts, for error messages: a line number, or the path of a file in a folder.
    """

    text: str
    pair: str | None
    label: str | None
    line: int | str


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
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()

    def error(self, line: int | str, message: str) -> FunnelError:
        """An error located at an example."""
        return FunnelError(f"example {line}: {message}")


@dataclass(frozen=True)
class ExampleFile:
    """A file of examples, and which of its columns to read.

    Attributes:
        path: a .tsv, .csv or .jsonl file, optionally gzipped; or a folder with one subfolder per label.
        text_columns: the column of the text, or the columns of the two texts of a pair. Columns are names, or, in files
            without a header, numbers starting at 0.
        label_column: None for unlabeled files.
        joined: join the text columns with a space into a single text (a title and the text below it).
        escaped: texts contain the escapes backslash-n and backslash-quote, as in the csv files of Zhang et al.
        label_folders: the subfolders, each named after its label. Each contains one .txt file per text.
    """

    path: Path
    text_columns: tuple[Column, ...] = ()
    label_column: Column | None = None
    joined: bool = False
    escaped: bool = False
    label_folders: tuple[str, ...] = ()

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
        is_empty = True
        for line, fields in self._read_fields():
            is_empty = False
            texts = [unescape(field) if self.escaped else field for field in fields[: len(self.text_columns)]]
            label = fields[-1] if self.label_column is not None else None
            pair = texts[1] if len(texts) > 1 and not self.joined else None
            yield Example(" ".join(texts) if self.joined else texts[0], pair, label, line)
        if is_empty:
            raise FunnelError(f"{self.path}: empty; expected {'a header and ' * self.has_header}one example per line")

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

    def error(self, line: int | str, message: str, parameter: str | None = None) -> FunnelError:
        """An error located at a line, or at a file of a folder; `parameter` as in `FunnelError`."""
        place = f"{self.path}, line {line}" if isinstance(line, int) else line
        return FunnelError(f"{place}: {message}", parameter)

    def digest(self) -> str:
        """A checksum of the file's content and of the options for reading it."""
        options = (*self.columns, self.joined, self.escaped, *self.label_folders, file_format(self.path))
        if not self.label_folders:
            parts = [sha256(self.path)]
        else:
            parts = [part for _, path in self._folder_files() for part in (path.name, sha256(path))]
        return hashlib.sha256(json.dumps([options, parts]).encode()).hexdigest()

    def _read_fields(self) -> Iterator[tuple[int, list[str]]]:
        """Yields the line number and the selected columns of each row."""
        lines = read_lines(self.path)
        match file_format(self.path):
            case "jsonl":
                for number, line in enumerate(lines, 1):
                    yield number, self._select_fields(number, _parse_object(line, self.path, number))
            case "csv":
                yield from self._select_columns(_parse_csv(lines, self.path))
            case _:
                yield from self._select_columns((n, line.rstrip("\r\n").split("\t")) for n, line in enumerate(lines, 1))

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
            indices = [int(column) for column in self.columns]
            if max(indices) >= len(first_row):
                raise self.error(number, f"{plural(len(first_row), 'field')}; expected at least {max(indices) + 1}")
            return indices
        if "\r" in "".join(first_row):
            raise self.error(number, OLD_MAC_LINE_ENDINGS)
        for column in self.columns:
            if column not in first_row:
                raise self.error(number, f"no column {column!r}; the columns are {format_list(first_row)}")
            if first_row.count(str(column)) > 1:
                raise self.error(number, f"duplicate column {column!r}; rename one of them")
        return [first_row.index(str(column)) for column in self.columns]

    def _select_fields(self, number: int, values: dict[str, Any]) -> list[str]:
        """The selected columns of a JSON object; labels may be numbers or booleans."""
        fields = []
        for column in self.columns:
            if column not in values:
                raise self.error(number, f"no field {column!r}; the fields are {format_list(values)}")
            value = values[str(column)]
            is_label = column == self.label_column
            if not isinstance(value, str) and not (is_label and isinstance(value, bool | int | float)):
                expected = "a string or number" if is_label else "a string"
                raise self.error(number, f"{column!r} is {json.dumps(value)[:60]}; expected {expected}")
            text = value if isinstance(value, str) else json.dumps(value)
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


# --- file names and columns -------------------------------------------------------------------------------------------


def is_gzipped(path: Path) -> bool:
    """Whether a file's name ends in .gz."""
    return path.suffix.lower() == ".gz"


def file_format(path: Path) -> str:
    """The format that a file's name indicates: "tsv", "csv" or "jsonl"; "" for any other."""
    suffix = (path.with_suffix("") if is_gzipped(path) else path).suffix.lower()
    return {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl"}.get(suffix, "")


def check_file(path: Path, parameter: str) -> None:
    """Checks that a file exists and that its name indicates a format.

    Args:
        parameter: the parameter or option that contains the path, for the error message.

    Raises:
        FunnelError: the file does not exist, is not a regular file, or has an unknown extension.
    """
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        hint = "" if file_format(path) else f"; {EXPECTED_FORMAT}"
        raise FunnelError(f"{parameter} {path}: no such file{hint}", parameter)
    if not file_format(path):
        raise FunnelError(f"{parameter} {path}: unknown file format; {EXPECTED_FORMAT}", parameter)
    if not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a pipe or device"
        raise FunnelError(f"{parameter} {path}: expected a file, found {kind}", parameter)


def read_column_names(path: Path) -> list[str]:
    """The column names of a file: its header, or the fields of its first JSON object.

    Raises:
        FunnelError: the first row is missing or malformed.
    """
    first = next(read_lines(path), "")
    if not first:
        raise FunnelError(f"{path}: empty; expected a header and one example per line")
    if "\r" in first.rstrip("\r\n"):
        raise _line_error(path, 1, OLD_MAC_LINE_ENDINGS)
    if not first.strip():
        raise _line_error(path, 1, "blank line; remove it")
    match file_format(path):
        case "jsonl":
            return list(_parse_object(first, path, 1))
        case "csv":
            return next(_parse_csv(read_lines(path), path))[1]
        case _:
            return first.rstrip("\r\n").split("\t")


# --- text and values --------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 text file, with their line endings and without a byte-order mark.

    Raises:
        FunnelError: the file cannot be read, or as in `decode_lines`.
    """
    with os_errors(path), cast(BinaryIO, gzip.open(path) if is_gzipped(path) else path.open("rb")) as file:
        yield from decode_lines(file, path)


def decode_lines(file: BinaryIO, name: str | Path) -> Iterator[str]:
    """Yields the lines of an open UTF-8 file, with their line endings and without a byte-order mark.

    Args:
        name: the file's name in error messages.

    Raises:
        FunnelError: a line cannot be read, is not UTF-8, contains a NUL byte, or exceeds `MAX_LINE_BYTES`.
    """
    for number in itertools.count(1):
        try:
            line = file.readline(MAX_LINE_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:  # gzip raises all three
            raise _line_error(name, number, f"cannot read ({error_reason(error)})") from None
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise _line_error(name, number, f"longer than {MAX_LINE_BYTES:,} bytes; is this a text file?")
        if number == 1 and line.startswith(b"\x1f\x8b"):
            raise FunnelError(f"{name}: gzip-compressed, but the name does not end in .gz; rename the file")
        if b"\0" in line:
            hint = "; if the file is UTF-16, convert it to UTF-8" if number == 1 else ""
            raise _line_error(name, number, f"contains a NUL byte{hint}")
        try:
            yield (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            message = f"not UTF-8 text (byte {error.start} of the line); if the file is Latin-1, convert it to UTF-8"
            raise _line_error(name, number, message) from None


def _parse_csv(lines: Iterable[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the first line number and the fields of each csv record."""
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(lines, strict=True)
    last_line = 0
    try:
        for fields in reader:
            if not fields:
                raise _line_error(path, reader.line_num, "blank line; remove it")
            yield last_line + 1, fields
            last_line = reader.line_num
    except csv.Error as error:
        if "new-line" in str(error):
            message = "invalid csv (a CR outside quotes); convert the line endings to LF"
        else:
            message = f"invalid csv ({error}); write a quote inside a field as two quotes"
        raise _line_error(path, last_line + 1, message) from None


def _parse_object(line: str, path: Path, number: int) -> dict[str, Any]:
    """The fields of one line of a jsonl file."""
    if not line.strip():
        raise _line_error(path, number, "blank line; remove it")
    try:
        values = json.loads(line.rstrip("\r\n"), object_pairs_hook=_reject_duplicates)
    except json.JSONDecodeError as error:
        reason = f"{error.msg.removesuffix(' at')} at character {error.colno}"
        raise _line_error(path, number, f"invalid JSON ({reason})") from None
    except (ValueError, RecursionError) as error:  # a duplicate field, or a number with thousands of digits
        raise _line_error(path, number, f"invalid JSON ({error_reason(error)})") from None
    if not isinstance(values, dict):
        raise _line_error(path, number, f"expected a JSON object, found {type(values).__name__}")
    return values


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object; `json` itself would keep the last of several fields with the same name."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"duplicate field {name!r}")
        values[name] = value
    return values


def _line_error(path: str | Path, number: int, message: str) -> FunnelError:
    return FunnelError(f"{path}, line {number}: {message}")


def is_utf8(text: str) -> bool:
    """Whether a string can be encoded as UTF-8, that is, contains no lone surrogate."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def unescape(text: str) -> str:
    r"""Replaces the escapes `\n` and `\"` of Zhang et al.'s files with a line break and a quote."""
    return text.replace("\\n", "\n").replace('\\"', '"')


def parse_score(label: str) -> float | None:
    """A label as a number; None if it is not a finite float32."""
    if "_" in label or not label.isascii():  # Python parses "2020_01" as a number, other programs do not
        return None
    try:
        score = float(label)
    except ValueError:
        return None
    return score if abs(score) <= MAX_SCORE else None

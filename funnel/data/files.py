"""Files of examples, read row by row: tsv, csv and jsonl, plain or .gz, and folders with a text a file.

Nothing is skipped. What a reader may meet, and what it does:

- a byte-order mark at the start and CRLF line ends are taken off; an empty text is an example like every other;
- csv has quoting as the standard (RFC 4180) says, line ends inside of quotes among it; tsv has none, as GLUE writes it, so
  that a lone quote in a sentence swallows no lines;
- all else (bytes that are not UTF-8, NUL, too many or too few fields, a column that is missing or, if it is read, there twice,
  blank lines, a file that changes while it is read) is an error with file and line.
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

from funnel.errors import FunnelError, error_reason, format_list

FORMATS = ("tsv", "csv", "jsonl")
LONGEST_LINE = 2**26  # bytes: a file without line ends, or a .gz that unpacks to one, does not fill the memory
CR_ALONE = "lines end with CR alone, as of old; convert the file to LF line ends"
Column = str | int


class Example(NamedTuple):
    """One example: its text, second text, and label as they stand in the file; None for what the file does not have.

    `line` is where it begins in the file, for messages: a line's number, or the name of a file in a folder.
    """

    text: str
    pair: str | None
    label: str | None
    line: int | str


@dataclass(frozen=True)
class ExampleFile:
    """A file of examples and what its columns are.

    Attributes:
        path: a .tsv, .csv or .jsonl file, or one of these with .gz behind; or a folder.
        texts: the column of the text, or those of a text and its second text. A column is a name, or, in files without
            a line of names, its number from 0 on. In a folder: none.
        label: column of the labels; None where there are none. In a folder: the folders by their label, "neg pos".
        joined: the text columns are one text, which a space joins (a title and what stands below it).
        escaped: texts write a line end as backslash and n (Zhang et al.'s csv files).
    """

    path: Path
    texts: tuple[Column, ...] = ()
    label: Column | None = None
    joined: bool = False
    escaped: bool = False

    def at(self, folder: Path) -> "ExampleFile":
        """The same file in a folder."""
        return replace(self, path=folder / self.path)

    def rows(self) -> Iterator[Example]:
        """Reads the examples from first to last; what is in memory at a time is one of them.

        Raises:
            FunnelError: the file cannot be read, is empty, or has a mistake in it; the message has file and line.
        """
        if not self.texts:
            yield from self._folder_rows()
            return
        count = 0
        for line, fields in self._fields():
            texts = [unescape(field) if self.escaped else field for field in fields[: len(self.texts)]]
            label = fields[-1] if self.label is not None else None
            pair = texts[1] if len(texts) > 1 and not self.joined else None
            yield Example(" ".join(texts) if self.joined else texts[0], pair, label, line)
            count += 1
        if not count:
            raise FunnelError(f"{self.path}: empty; it takes {'column names and ' * self.is_named}an example a line")

    def check(self) -> None:
        """Reads the file once, so that a mistake in it is told now and not when its rows are needed.

        Raises:
            FunnelError: as `rows`.
        """
        for _ in self.rows():
            pass

    def iter_texts(self) -> Iterator[str]:
        """All texts, second texts after the first ones of their row."""
        for row in self.rows():
            yield row.text
            if row.pair is not None:
                yield row.pair

    @property
    def is_named(self) -> bool:
        """Whether the columns are known by their names."""
        return any(isinstance(column, str) for column in self.texts)

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.texts if self.label is None else (*self.texts, self.label)

    def error(self, line: int | str, message: str) -> FunnelError:
        """A mistake in a row."""
        return FunnelError(f"{self.path}, line {line}: {message}" if isinstance(line, int) else f"{line}: {message}")

    def digest(self) -> str:
        """A checksum of the file's content and of what is read from it.

        Raises:
            FunnelError: it cannot be read.
        """
        digest = hashlib.sha256(repr((self.texts, self.label, self.joined, self.escaped, file_format(self.path))).encode())
        for path in [self.path] if self.texts else [path for _, path in self._files()]:
            digest.update(path.name.encode() if not self.texts else b"")
            try:
                with path.open("rb") as file:
                    while piece := file.read(2**20):
                        digest.update(piece)
            except OSError as error:
                raise FunnelError(f"{path}: cannot be read ({error_reason(error)})") from None
        return digest.hexdigest()

    def _fields(self) -> Iterator[tuple[int, list[str]]]:
        """Where each row begins, and what stands in its columns."""
        kind = file_format(self.path)
        lines = read_lines(self.path)
        if kind == "jsonl":
            for number, line in enumerate(lines, 1):
                yield number, self._object_fields(number, line)
            return
        records = enumerate((line.rstrip("\r\n").split("\t") for line in lines), 1) if kind == "tsv" else self._csv(lines)
        at: list[int] = []
        names: list[str] = []
        for number, fields in records:
            if not at and self.is_named:
                if "\r" in "".join(fields):
                    raise self.error(number, CR_ALONE)
                at, names = self._places(number, fields), fields
                continue
            if not at:
                at, names = cast(list[int], list(self.columns)), fields
                if max(at) >= len(fields):
                    raise self.error(number, f"{len(fields)} fields; it takes {max(at) + 1} at least")
            if len(fields) != len(names):
                what = f"line 1 names {len(names)} columns" if self.is_named else f"line 1 has {len(names)}"
                raise self.error(number, f"{len(fields)} fields, but {what}")
            yield number, [fields[i] for i in at]

    def _places(self, number: int, names: list[str]) -> list[int]:
        for column in self.columns:
            if column not in names:
                raise self.error(number, f"no column {column!r}; it has {format_list(names)}")
            if names.count(str(column)) > 1:
                raise self.error(number, f"the column {column!r} is there twice; rename one")
        return [names.index(str(column)) for column in self.columns]

    def _csv(self, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
        csv.field_size_limit(LONGEST_LINE)
        reader = csv.reader(lines, strict=True)
        end = 0
        try:
            for fields in reader:
                if not fields:
                    raise self.error(reader.line_num, "blank; remove the line")
                yield end + 1, fields
                end = reader.line_num
        except csv.Error as error:
            if "new-line" in str(error):
                raise self.error(end + 1, "not csv (a CR alone, outside of quotes); convert line ends to LF") from None
            raise self.error(end + 1, f"not csv ({error}); quotes in a text are written twice") from None

    def _object(self, number: int, line: str) -> dict[str, Any]:
        """The fields of a line of jsonl."""

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            values = dict(pairs)
            if len(values) < len(pairs):
                twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
                raise self.error(number, f"the field {twice!r} is there twice")
            return values

        if not line.strip():
            raise self.error(number, "blank; remove the line")
        try:
            values = json.loads(line.rstrip("\r\n"), object_pairs_hook=unique)
        except FunnelError:
            raise
        except json.JSONDecodeError as error:
            reason = f"{error.msg.removesuffix(' at')} at character {error.colno}"
            raise self.error(number, f"not a JSON object ({reason})") from None
        except (ValueError, RecursionError) as error:
            raise self.error(number, f"not a JSON object ({error_reason(error)})") from None
        if not isinstance(values, dict):
            raise self.error(number, f"a JSON {type(values).__name__}, not an object of named fields")
        return values

    def _object_fields(self, number: int, line: str) -> list[str]:
        values, fields = self._object(number, line), []
        for column in self.columns:
            if column not in values:
                raise self.error(number, f"no field {column!r}; it has {format_list(values)}")
            value = values[str(column)]
            is_label = column == self.label
            if not isinstance(value, str) and not (is_label and isinstance(value, (bool, int, float))):
                raise self.error(number, f"{column!r} is {json.dumps(value)[:60]}, not a text{' or number' * is_label}")
            text = value if isinstance(value, str) else json.dumps(value)
            if not is_utf8(text):
                raise self.error(number, f"{column!r} has half of a character (a lone surrogate)")
            fields.append(text)
        return fields

    def _files(self) -> Iterator[tuple[str, Path]]:
        """The files of a folder with a folder of texts a label."""
        for label in str(self.label).split():
            try:
                files = sorted(path for path in (self.path / label).iterdir() if path.suffix == ".txt")
            except OSError as error:
                raise FunnelError(f"{self.path / label}: cannot be read ({error_reason(error)})") from None
            if not files:
                raise FunnelError(f"{self.path / label}: has no .txt files; it takes a text a file")
            yield from ((label, file) for file in files)

    def _folder_rows(self) -> Iterator[Example]:
        for label, path in self._files():
            try:
                text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8")
            except OSError as error:
                raise FunnelError(f"{path}: cannot be read ({error_reason(error)})") from None
            except UnicodeDecodeError as error:
                raise FunnelError(f"{path}: not UTF-8 text (byte {error.start})") from None
            if "\0" in text:
                raise FunnelError(f"{path}: has a NUL byte; it is no text file")
            yield Example(text.rstrip("\r\n"), None, label, str(path))


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no half of a character (a lone surrogate)."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def is_gzipped(path: Path) -> bool:
    """Whether a file is packed with gzip, by its name."""
    return path.suffix.lower() == ".gz"


def file_format(path: Path) -> str:
    """What a file is by its name: tsv, csv or jsonl; "" for any other."""
    suffix = (path.with_suffix("") if is_gzipped(path) else path).suffix.lower()
    return {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl"}.get(suffix, "")


def check_format(flag: str, path: Path) -> None:
    """Stops at a file whose name does not say what is in it.

    Raises:
        FunnelError: it is none of `FORMATS`, or no file.
    """
    formats = "it takes a .tsv, .csv or .jsonl file, each also with .gz behind"
    if not os.path.exists(path):  # pathlib's raises an error for a name that is too long
        raise FunnelError(f"{flag} {path}: no such file" + (f"; {formats}" if not file_format(path) else ""))
    if not file_format(path):
        raise FunnelError(f"{flag} {path}: {formats}")
    if not os.path.isfile(path):
        raise FunnelError(f"{flag} {path}: is no file but a {'folder' if os.path.isdir(path) else 'pipe or device'}")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, line ends included; a byte-order mark is taken off.

    Raises:
        FunnelError: it cannot be read, or as `decode_lines`.
    """
    try:
        with cast(BinaryIO, gzip.open(path) if is_gzipped(path) else path.open("rb")) as file:
            yield from decode_lines(file, path)
    except FileNotFoundError:
        raise FunnelError(f"{path}: no such file") from None
    except OSError as error:
        raise FunnelError(f"{path}: cannot be read ({error_reason(error)})") from None


def decode_lines(file: BinaryIO, name: str | Path) -> Iterator[str]:
    """The lines of an open file of UTF-8 text, line ends included; a byte-order mark is taken off.

    Raises:
        FunnelError: a line cannot be read, is not UTF-8, holds a NUL byte, or is longer than `LONGEST_LINE`; the message
            begins with `name`.
    """
    for number in itertools.count(1):
        try:
            line = file.readline(LONGEST_LINE + 1)
        except (OSError, EOFError, zlib.error) as error:  # gzip raises all three
            raise FunnelError(f"{name}, line {number}: cannot be read ({error_reason(error)})") from None
        if not line:
            return
        if len(line) > LONGEST_LINE:
            raise FunnelError(f"{name}, line {number}: longer than {LONGEST_LINE:,} bytes; is it a text file?")
        if number == 1 and line.startswith(b"\x1f\x8b"):
            raise FunnelError(f"{name}: is packed with gzip; its name must end in .gz")
        if b"\0" in line:
            hint = "; is it UTF-16? convert it to UTF-8" if number == 1 else ""
            raise FunnelError(f"{name}, line {number}: has a NUL byte{hint}")
        try:
            yield (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            message = f"not UTF-8 text (byte {error.start} of the line)"
            raise FunnelError(f"{name}, line {number}: {message}; convert it, if it is Latin-1") from None


def read_column_names(path: Path) -> list[str]:
    """The names of a file's columns: its first line, or the fields of its first object.

    Raises:
        FunnelError: as `ExampleFile.rows`.
    """
    file, first = ExampleFile(path), next(read_lines(path), "")
    if not first:
        raise FunnelError(f"{path}: empty; it takes a line of column names and an example")
    if "\r" in first.rstrip("\r\n"):
        raise file.error(1, CR_ALONE)
    if not first.strip():
        raise file.error(1, "blank; remove the line")
    if file_format(path) == "jsonl":
        return list(file._object(1, first))
    if file_format(path) == "tsv":
        return first.rstrip("\r\n").split("\t")
    return next(file._csv(read_lines(path)))[1]


def unescape(text: str) -> str:
    r"""Turns the `\n` and `\"` of Zhang et al.'s files back into a line end and a quote."""
    return text.replace("\\n", "\n").replace('\\"', '"')

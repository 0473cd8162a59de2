"""Reads rows from csv, tsv, jsonl, json and parquet files. Only json files, which contain one list, are held in memory.

Rows are numbered for error messages: by first line in csv, tsv and jsonl, by position in json and parquet. Blank lines at
the end of a file are ignored.
"""

import codecs
import contextlib
import csv
import gzip
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from funnel.errors import FunnelError, error_reason, requires_extra
from funnel.io import os_errors

MAX_LINE_BYTES = 2**26  # a file without line breaks, or a decompression bomb, must not exhaust the memory
OLD_MAC_LINE_ENDINGS = "lines end with CR only; convert the line endings to LF"
EXPECTED_FORMAT = "expected a .tsv, .csv, .jsonl, .json (these also gzipped: .gz) or .parquet file"
EXPECTED_JSON = "expected a list of objects, or one object per line"
ROW_NAMES = {"json": "item", "parquet": "row"}  # what a row is called in messages; in the other formats, "line"

FORMATS = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet"}
SPREADSHEET = "a spreadsheet; save it as CSV UTF-8 (.csv)"
ARCHIVE = "not supported; unpack the file, or compress it with gzip"
HINTS = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), SPREADSHEET),
    **dict.fromkeys((".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz"), ARCHIVE),
    **dict.fromkeys((".pkl", ".pickle", ".feather", ".arrow"), "not supported; convert the table to .parquet or .csv"),
    **dict.fromkeys(
        (".txt", ".text", ".tab", ".dat"),
        "unknown format; name the columns in line 1 and rename the file to .tsv (tab-separated) or .csv (comma-separated)",
    ),
}
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # of gzip and lzma
SIGNATURES = {  # first bytes of files with the wrong name
    b"\x1f\x8b": "gzip-compressed, but the name does not end in .gz; rename the file",
    b"\xfd7zXZ\0": "xz-compressed; unpack the file",
    b"PK\x03\x04": "a spreadsheet or zip archive; save the table as CSV UTF-8",
    b"PAR1": "a parquet file; rename it to .parquet",
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8",
}


class Dialect(NamedTuple):
    """How a csv or tsv file marks its fields.

    Attributes:
        separator: the character between fields.
        quoted: whether quotes enclose fields, as in RFC 4180. If not, quotes are literal and fields have no line breaks.
    """

    separator: str
    quoted: bool


DIALECTS = {"csv": Dialect(",", quoted=True), "tsv": Dialect("\t", quoted=False)}  # by format; tsv as in GLUE
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def is_gzipped(path: Path) -> bool:
    """Whether a file's name ends in .gz."""
    return path.suffix.lower() == ".gz"


def file_format(path: Path) -> str:
    """The format that a file's name indicates: "tsv", "csv", "jsonl", "json" or "parquet"; "" for any other."""
    format = FORMATS.get((path.with_suffix("") if is_gzipped(path) else path).suffix.lower(), "")
    return "" if format == "parquet" and is_gzipped(path) else format


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
    if not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a pipe or device"
        raise FunnelError(f"{parameter} {path}: expected a file, found {kind}", parameter)
    if not file_format(path):
        hint = HINTS.get(path.suffix.lower(), f"unknown file format; {EXPECTED_FORMAT}")
        raise FunnelError(f"{parameter} {path}: {hint}", parameter)


# --- rows -------------------------------------------------------------------------------------------------------------


def read_table(path: Path, dialect: Dialect) -> Iterator[tuple[int, list[str]]]:
    """Yields number and fields of each row of a csv or tsv file, the header included."""
    lines = _skip_blank_end(read_lines(path))
    if dialect.quoted:
        return _parse_csv(lines, path, dialect.separator)
    return ((number, line.rstrip("\r\n").split(dialect.separator)) for number, line in enumerate(lines, 1))


def read_objects(path: Path, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number and fields of each row of a jsonl, json or parquet file.

    Args:
        columns: names of the fields to read; objects in json and jsonl files are read whole.
    """
    if file_format(path) == "parquet":
        return _read_parquet(path, list(columns))
    if file_format(path) == "json" and not next(read_lines(path), "").lstrip().startswith("{"):
        return _read_json_list(path)
    lines = enumerate(_skip_blank_end(read_lines(path)), 1)
    return ((number, _parse_object(line, path, number)) for number, line in lines)


def read_object(path: Path) -> dict[str, Any]:
    """The fields of a file that contains one JSON object, whatever its name."""
    text = "".join(read_lines(path))
    if not text.strip():
        raise FunnelError(f"{path}: empty; expected a JSON object")
    values = _parse_json(text, path, 1)
    if not isinstance(values, dict):
        raise FunnelError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def read_column_names(path: Path, dialect: Dialect | None = None) -> list[str]:
    """The column names of a file: its header, or the fields of its first object.

    Args:
        dialect: default: that of the format.

    Raises:
        FunnelError: the first row is missing or malformed.
    """
    format = file_format(path)
    if format == "parquet":
        with _open_parquet(path) as file:
            return list(file.schema_arrow.names)
    if format == "json":
        names = next((list(values) for _, values in read_objects(path, ())), None)
        if names is None:
            raise FunnelError(f"{path}: empty; {EXPECTED_JSON}")
        return names
    first = next(read_lines(path), "")
    if not first:
        expected = "one JSON object per line" if format == "jsonl" else "a header and one example per line"
        raise FunnelError(f"{path}: empty; expected {expected}")
    if "\r" in first.rstrip("\r\n"):
        raise _row_error(path, 1, OLD_MAC_LINE_ENDINGS)
    if not first.strip():
        raise _row_error(path, 1, "blank line; remove it")
    if re.fullmatch('"?sep=."?', first.strip()):
        raise _row_error(path, 1, "the separator, for Excel; remove this line")
    if format == "jsonl":
        return list(_parse_object(first, path, 1))
    return next(read_table(path, dialect or DIALECTS[format]))[1]


# --- csv and tsv ------------------------------------------------------------------------------------------------------


def detect_dialect(path: Path, is_usable: Callable[[list[str]], bool]) -> Dialect:
    """Finds the separator and the quoting of the user's own csv or tsv file.

    Another separator than that of the format is chosen if the header would otherwise be a single field. Quoting of
    tab-separated files is recognized from the whole file, as described in `_has_standard_quoting`.

    Args:
        is_usable: whether a header has the columns that are needed.

    Returns:
        The dialect; that with the format's own separator if the header is malformed with every separator.
    """

    def dialect_of(separator: str) -> Dialect:
        return Dialect(separator, quoted=separator != "\t" or _has_standard_quoting(path))

    default = dialect_of(DIALECTS[file_format(path)].separator)
    first_line = next(read_lines(path), "")
    headers = {}
    others = (dialect_of(separator) for separator in SEPARATORS if separator in first_line and separator != default.separator)
    for dialect in itertools.chain([default], others):
        with contextlib.suppress(FunnelError):  # malformed with this separator
            headers[dialect] = read_column_names(path, dialect)
        if dialect == default and (len(headers.get(default, ())) > 1 or is_usable(headers.get(default, []))):
            break
    return max(headers, key=lambda dialect: (is_usable(headers[dialect]), len(headers[dialect])), default=default)


QUOTED_FIELD = r'"[^"]*(?:""[^"]*)*"'
FIELD = rf'(?:{QUOTED_FIELD}|[^"\t]*)'
ROW = re.compile(rf"{FIELD}(?:\t{FIELD})*")
ROW_WITH_OPEN_QUOTE = re.compile(rf'(?:{FIELD}\t)*"[^"]*(?:""[^"]*)*')


def _has_standard_quoting(path: Path) -> bool:
    """Whether a tab-separated file follows RFC 4180 (as pandas and spreadsheets write it), so that quotes are not literal.

    It does if it has a quoted field, and every quote either encloses a whole field or is doubled inside such a field. If
    quoted fields contain tabs or line breaks, some must also contain doubled quotes, or the file must be malformed when
    read without quoting: otherwise a text that begins with a lone quote and a later one that ends with a lone quote would
    swallow the rows between them.
    """
    n_tabs: int | None = None
    is_quoted, has_doubled, spans_fields, fits_unquoted = False, False, False, True
    lines: list[str] = []  # of a row that has an open quote
    size, is_open = 0, False
    for line in _skip_blank_end(read_lines(path)):
        n_tabs = line.count("\t") if n_tabs is None else n_tabs
        fits_unquoted &= line.count("\t") == n_tabs
        if '"' not in line and not is_open:
            continue
        lines.append(line)
        size += len(line)
        is_open ^= line.count('"') % 2 == 1
        if is_open:
            if (len(lines) == 1 and not ROW_WITH_OPEN_QUOTE.fullmatch(line)) or size > MAX_LINE_BYTES:
                return False
            continue
        row, lines, size = "".join(lines).rstrip("\r\n"), [], 0
        if not ROW.fullmatch(row):
            return False
        is_quoted = True
        for field in re.findall(QUOTED_FIELD, row):
            has_doubled |= '"' in field[1:-1]
            spans_fields |= "\t" in field or "\n" in field
    return is_quoted and not is_open and (has_doubled or not (spans_fields and fits_unquoted))


def _parse_csv(lines: Iterable[str], path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the first line number and the fields of each csv record."""
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    last_line = 0
    try:
        for fields in reader:
            if not fields:
                raise _row_error(path, reader.line_num, "blank line; remove it")
            yield last_line + 1, fields
            last_line = reader.line_num
    except csv.Error as error:
        if "new-line" in str(error):
            message = "invalid csv (a CR outside quotes); convert the line endings to LF"
        else:
            message = f"invalid csv ({error}); write a quote inside a field as two quotes"
        raise _row_error(path, last_line + 1, message) from None


# --- jsonl and json ---------------------------------------------------------------------------------------------------


def _parse_object(line: str, path: Path, number: int) -> dict[str, Any]:
    """The fields of an object on a line of its own."""
    if not line.strip():
        raise _row_error(path, number, "blank line; remove it")
    return _check_object(_parse_json(line.rstrip("\r\n"), path, number), path, number)


def _read_json_list(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number and fields of each object in a list. The file is read whole; jsonl files are read line by line."""
    text = "".join(read_lines(path))
    if not text.strip():
        raise FunnelError(f"{path}: empty; {EXPECTED_JSON}")
    items = _parse_json(text, path, 1)
    if not isinstance(items, list) or not items:
        raise FunnelError(f"{path}: {'an empty list' if items == [] else type(items).__name__}; {EXPECTED_JSON}")
    for number, values in enumerate(items, 1):
        yield number, _check_object(values, path, number)


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    """Parses a value that starts at a line of a file."""
    try:
        return json.loads(text, object_pairs_hook=_reject_duplicates)
    except json.JSONDecodeError as error:
        reason, line = f"{error.msg.removesuffix(' at')} at character {error.colno}", first_line + error.lineno - 1
    except (ValueError, RecursionError) as error:  # a duplicate field, or a number with thousands of digits
        reason, line = error_reason(error), first_line
    hint = f"; {EXPECTED_JSON}" if file_format(path) == "json" else ""
    raise FunnelError(f"{path}, line {line}: invalid JSON ({reason}){hint}")


def _check_object(values: Any, path: Path, number: int) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise _row_error(path, number, f"expected a JSON object, found {type(values).__name__}")
    return values


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object; `json` itself would keep the last of several fields with the same name."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"duplicate field {name!r}")
        values[name] = value
    return values


# --- parquet ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    """Yields a pyarrow.parquet.ParquetFile.

    Raises:
        FunnelError: pyarrow is not installed, or the file is damaged.
    """
    with requires_extra("parquet", str(path)):
        import pyarrow
        import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise FunnelError(f"{path}: damaged parquet file ({error_reason(error)})") from None


def _read_parquet(path: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open_parquet(path) as file:
        batches = file.iter_batches(batch_size=1024, columns=columns)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from enumerate(rows, 1)


# --- text -------------------------------------------------------------------------------------------------------------


def open_file(path: Path) -> BinaryIO:
    """Opens a file, decompressed if its name ends in .gz or .xz."""
    if path.suffix.lower() == ".xz":  # corpora and SQuAD's format only; `check_file` rejects it
        return cast(BinaryIO, lzma.open(path))
    return cast(BinaryIO, gzip.open(path) if is_gzipped(path) else path.open("rb"))


def read_lines(path: Path, max_bytes: int | None = None) -> Iterator[str]:
    """Yields the lines of a UTF-8 text file, with their line endings and without a byte-order mark.

    Args:
        max_bytes: maximum length of a line; default: `MAX_LINE_BYTES`.

    Raises:
        FunnelError: the file cannot be read, or as in `decode_lines`.
    """
    with os_errors(path), open_file(path) as file:
        yield from decode_lines(file, path, max_bytes)


def decode_lines(file: BinaryIO, name: str | Path, max_bytes: int | None = None) -> Iterator[str]:
    """Yields the lines of an open UTF-8 file, with their line endings and without a byte-order mark.

    Args:
        name: the file's name in error messages.
        max_bytes: maximum length of a line; default: `MAX_LINE_BYTES`.

    Raises:
        FunnelError: a line cannot be read, is not UTF-8, contains a NUL byte, or is too long.
    """
    max_bytes = max_bytes or MAX_LINE_BYTES
    for number in itertools.count(1):
        try:
            line = file.readline(max_bytes + 1)
        except READ_ERRORS as error:
            raise _row_error(name, number, f"cannot read ({error_reason(error)})") from None
        if not line:
            return
        if number == 1:
            _check_signature(line, name)
        if len(line) > max_bytes:
            raise _row_error(name, number, f"longer than {max_bytes:,} bytes; is this a text file?")
        if b"\0" in line:
            hint = "; if the file is UTF-16, convert it to UTF-8" if number == 1 else ""
            raise _row_error(name, number, f"contains a NUL byte{hint}")
        try:
            yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            message = f"not UTF-8 text (byte {error.start} of the line); if the file is Latin-1, convert it to UTF-8"
            raise _row_error(name, number, message) from None


def _check_signature(content: bytes, name: str | Path) -> None:
    """Raises FunnelError if a file that should be text begins like one of another kind."""
    for signature, kind in SIGNATURES.items():
        if content.startswith(signature):
            raise FunnelError(f"{name}: {kind}")


def _skip_blank_end(lines: Iterable[str]) -> Iterator[str]:
    """Drops trailing blank lines. A line of tabs is kept: its fields are empty."""
    blank: list[str] = []
    for line in lines:
        if line.strip(" \r\n"):
            yield from blank
            blank.clear()
            yield line
        else:
            blank.append(line)


def _row_error(path: str | Path, number: int, message: str) -> FunnelError:
    name = ROW_NAMES.get(file_format(path), "line") if isinstance(path, Path) else "line"
    return FunnelError(f"{path}, {name} {number}: {message}")

"""The user's own files: finds the columns and infers whether the labels are classes or scores."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from funnel.data.files import Column, ExampleFile, normalize_label, parse_score
from funnel.data.formats import DIALECTS, FORMATS, check_file, detect_dialect, file_format, read_column_names
from funnel.errors import FunnelError, format_list, plural
from funnel.io import os_errors

DEFAULT_TEXT_COLUMNS = ("text", "sentence")
DEFAULT_LABEL_COLUMN = "label"
DEV_NAMES = ("dev", "validation", "valid", "val")  # names of a folder's dev file
MULTI_LABEL = "multi-label"
MAX_INTEGER_CLASSES = 50  # integer labels with more distinct values are treated as scores
MAX_SPARSE_CLASSES = 10  # more classes than this need two texts each on average, or the label column is probably wrong
MAX_LISTED_CLASSES = 20
MIN_RELATIVE_RANGE = 1e-6  # of scores; float32 has about 7 digits
FORMATTED_NUMBER = re.compile(r"[-+]?[$€£]?[\d.,\s]*\d[\d.,\s]*[%$€£]?")  # "100.258,92 €", which is not a number in Python
MAX_NAME_LENGTH = 40  # characters of a column name in a message; without a header, it is the first text


# --- files and columns ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColumnChoice:
    """Which columns of a file to read.

    A name matches a column that differs in case or surrounding spaces if only one does. "0", "1", ... are the columns of a csv
    or tsv file without a header, unless the first row has all of these numbers.

    Attributes:
        text_column, text_pair_column, label_column: chosen by the user; None for the default.
        trained, trained_label: columns of a classifier's training texts and labels, which are the defaults.
        labeled: whether labels are read.
        reference: the file whose columns these are, if the user cannot choose others; for error messages.
    """

    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    trained: tuple[str, ...] = ()
    trained_label: str = ""
    labeled: bool = True
    reference: str = ""

    @property
    def candidates(self) -> dict[str, tuple[str, ...]]:
        """The names of each column to read, most preferred first, by parameter."""
        pair = self.text_pair_column or (self.trained[1] if len(self.trained) > 1 else None)
        names = {
            "text_column": (self.text_column,) if self.text_column else (*self.trained[:1], *DEFAULT_TEXT_COLUMNS),
            "text_pair_column": (pair,) if pair else (),
            "label_column": self._label_candidates if self.labeled else (),
        }
        return {parameter: candidates for parameter, candidates in names.items() if candidates}

    @property
    def _label_candidates(self) -> tuple[str, ...]:
        if self.label_column:
            return (self.label_column,)
        return (self.trained_label, DEFAULT_LABEL_COLUMN) if self.trained_label else (DEFAULT_LABEL_COLUMN,)


def open_examples(path: Path, choice: ColumnChoice = ColumnChoice(), parameter: str = "data") -> ExampleFile:
    """Opens the user's own file: finds its separator, quoting, header and columns.

    Args:
        parameter: the parameter that contains the path.

    Raises:
        FunnelError: the file does not exist, has an unknown format or a malformed header, or lacks a column.
    """
    check_file(path, parameter)
    format, dialect = file_format(path), None
    if is_table := format in DIALECTS:
        dialect = detect_dialect(path, lambda names: None not in _find_columns(names, choice, is_table).values())
    names = read_column_names(path, dialect)
    columns = _find_columns(names, choice, is_table)
    if is_table and not _has_header(names, choice) and _looks_like_header(names):
        if choice.reference:
            reason = f"line 1 looks like a header, but {choice.reference} has none; remove it"
            raise FunnelError(f"{parameter} {path}: {reason}", parameter)
        raise FunnelError(f"{path}: line 1 looks like a header; choose text_column from {_format_names(names)}", "text_column")
    for name, column in columns.items():
        if column is None and choice.reference:
            reason = f"no column {choice.candidates[name][0]!r} as in {choice.reference}"
            raise FunnelError(f"{parameter} {path}: {reason}; rename one of its columns ({_format_names(names)})", parameter)
        if column is None:
            raise _missing_column(path, names, choice, name)
    found = [column for column in columns.values() if column is not None]
    for column, count in Counter(found).items():
        if count > 1:
            raise FunnelError(f"{path}: column {column!r} is chosen twice; text, second text and label need different columns")
    label = found.pop() if choice.labeled else None
    return ExampleFile(path, tuple(found), label, dialect=None if dialect == DIALECTS.get(format) else dialect)


def open_dev_file(path: Path, train: ExampleFile, parameter: str = "dev") -> ExampleFile:
    """Opens a file with the columns of the training file; its format, separator and quoting may differ.

    Args:
        parameter: the parameter that contains the path or its folder.

    Raises:
        FunnelError: as in `open_examples`.
    """
    text, pair = (*map(str, train.text_columns), None)[:2]
    choice = ColumnChoice(text, pair, str(train.label_column), reference=f"the training file {train.path.name}")
    return open_examples(path, choice, parameter)


def _find_columns(names: Sequence[str], choice: ColumnChoice, is_table: bool) -> dict[str, Column | None]:
    """The columns to read, by parameter; None for one that the file lacks. Numbers if the file has no header."""
    if is_table and not _has_header(names, choice):
        numbers = {str(number): number for number in range(len(names))}
        return {parameter: numbers.get(candidates[0]) for parameter, candidates in choice.candidates.items()}
    return {parameter: _match(candidates, names) for parameter, candidates in choice.candidates.items()}


def _has_header(names: Sequence[str], choice: ColumnChoice) -> bool:
    """Whether the first row of a csv or tsv file names the columns. It does unless the user gave numbers that it lacks."""
    text, pair = choice.text_column, choice.text_pair_column
    trained = (*choice.trained, None, None)
    given = [name for name in (text or trained[0], pair or trained[1], choice.label_column) if name is not None]
    has_numbers = (text or trained[0]) is not None and all(name.isdecimal() for name in given)
    return not has_numbers or all(name in names for name in given)


def _match(candidates: Sequence[str], names: Sequence[str]) -> str | None:
    """The column of the first candidate that is a name or differs from exactly one in case or surrounding spaces."""
    for candidate in candidates:
        similar = [name for name in names if name.strip().casefold() == candidate.strip().casefold()]
        if candidate in names or len(similar) == 1:
            return candidate if candidate in names else similar[0]
    return None


def _looks_like_header(names: Sequence[str]) -> bool:
    return _match((*DEFAULT_TEXT_COLUMNS, DEFAULT_LABEL_COLUMN), names) is not None


def _missing_column(path: Path, names: Sequence[str], choice: ColumnChoice, parameter: str) -> FunnelError:
    """The error for a column that a file lacks."""
    wanted, is_table = choice.candidates[parameter][0], file_format(path) in DIALECTS
    is_default = getattr(choice, parameter) is None and wanted not in choice.trained
    problem = f"cannot find the {parameter.removesuffix('_column')} column" if is_default else f"no column {wanted!r}"
    available, numbers = _format_names(names), f"0 to {len(names) - 1}"
    if is_table and not _has_header(names, choice):
        available = numbers
    elif is_table and not _looks_like_header(names):
        available += f", or, if line 1 is not a header, from {numbers}"
    return FunnelError(f"{path}: {problem}; choose {parameter} from {available}", parameter)


def _format_names(names: Iterable[str]) -> str:
    return format_list(name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}…" for name in names)


def find_files(folder: Path, is_readable: Callable[[Path], Any] = file_format) -> dict[str, Path]:
    """The files "train" and "dev" of a folder, recognized by their names; dev may be called validation, valid or val.

    Args:
        is_readable: whether a file has a format that is read, according to its name.

    Raises:
        FunnelError: there is no training file, or there are several files for the same purpose.
    """
    found: dict[str, Path] = {}
    with os_errors(folder):
        paths = sorted(path for path in folder.iterdir() if is_readable(path))
    for path in paths:
        name = path.name.split(".")[0].lower()
        split = "dev" if name in DEV_NAMES else name
        if split in ("train", "dev") and split in found:
            names = f"{found[split].name} and {path.name}"
            raise FunnelError(f"data {folder}: {names} are both a {split} file; remove one of them", "data")
        found[split] = path
    if "train" not in found:
        expected = f"train.csv (or {', '.join(FORMATS)}) or, with the name of a published task, that task's files"
        raise FunnelError(f"data {folder}: no training file in this folder; expected {expected}", "data")
    return {split: path for split, path in found.items() if split in ("train", "dev")}


def check_dev_share(dev_share: float | None, paths: Mapping[str, Path], what: str = "file") -> None:
    """Raises FunnelError if a share is to be held out although there is a dev set."""
    if dev_share is not None and "dev" in paths:
        raise FunnelError(f"dev_share cannot be combined with the dev {what} {paths['dev']}; use one of them", "dev_share")


# --- labels -----------------------------------------------------------------------------------------------------------


class Labels(NamedTuple):
    """The labels of a file.

    Attributes:
        names: label names by the label as written in the file, in the order of their ids; None for scores.
        description: one sentence for the user.
        warnings: suspected problems, one line each.
        problem: kind of problem.
    """

    names: dict[str, str] | None
    description: str
    warnings: tuple[str, ...] = ()
    problem: str = "classification"


def infer_labels(file: ExampleFile, problem: str | None) -> Labels:
    """Reads a file's labels and decides whether they are classes or scores.

    Args:
        problem: "classification", "regression" or "multi-label". None to infer it: lists are several labels, and labels are
            scores if most of them are numbers, and these contain a fraction or more than `MAX_INTEGER_CLASSES` distinct
            values.

    Raises:
        FunnelError: the file is malformed, a label is empty or not a number, or the classes are implausible.
    """
    if problem == MULTI_LABEL or (problem is None and _has_lists(file)):
        return _infer_multi_label(file)
    counts, first_lines = _count_labels(file)
    scores = {label: score for label in counts if (score := parse_score(label)) is not None}
    if problem == "regression" or (problem is None and _look_like_scores(counts, scores)):
        for label in counts:
            if label not in scores:
                message = f"label {label!r} is not a finite float32"
                if problem is None:
                    message += ", but most others are numbers; problem=classification reads all of them as classes"
                raise file.error(first_lines[label], message, None if problem else "problem")
        low, high = min(scores.values()), max(scores.values())
        if high - low <= MIN_RELATIVE_RANGE * max(abs(low), abs(high)):
            if low == high:
                raise FunnelError(f"{file.path}: every score is {low:g}; is {file.label_column!r} the label column?")
            found = f"the scores from {low!r} to {high!r} are almost the same number in float32"
            raise FunnelError(f"{file.path}: {found}; subtract a constant from all of them")
        hint = "" if problem else "; problem=classification reads them as classes"
        return Labels(None, f"scores from {low:g} to {high:g}: regression{hint}", problem="regression")

    formatted = _formatted_numbers(counts, scores)
    _check_classes(file, counts, problem, formatted)
    all_numeric = len(scores) == len(counts)
    ordered = _order_classes(counts)
    description = _describe_classes(ordered, counts)
    if all_numeric and problem is None:
        description += "; problem=regression reads them as scores"
    return Labels({label: label for label in ordered}, description, (*_similar_labels(counts), *formatted))


def _order_classes(counts: Counter[str]) -> list[str]:
    """The classes by number if all are numbers, otherwise by name."""
    scores = {label: score for label in counts if (score := parse_score(label)) is not None}
    return sorted(counts, key=lambda label: (scores[label], label)) if len(scores) == len(counts) else sorted(counts)


def _describe_classes(ordered: Sequence[str], counts: Counter[str]) -> str:
    """ "2 classes: neg (10), pos (12)" """
    names = [label if label == " ".join(label.split()) else repr(label) for label in ordered[:MAX_LISTED_CLASSES]]
    shown = ", ".join(f"{name} ({counts[label]:,})" for name, label in zip(names, ordered, strict=False))
    return f"{plural(len(ordered), 'class')}: {shown}" + (", …" if len(ordered) > MAX_LISTED_CLASSES else "")


def _has_lists(file: ExampleFile) -> bool:
    """Whether the first label is a list, which only jsonl, json and parquet files can contain."""
    first = next(file.rows())
    return file_format(file.path) not in DIALECTS and (first.label or "").startswith("[")


def _infer_multi_label(file: ExampleFile) -> Labels:
    """The classes of a file with any number of labels per example."""
    counts: Counter[str] = Counter()
    n_examples = n_without = 0
    for example in file.rows():
        counts.update(example.labels)
        n_examples += 1
        n_without += not example.labels
    if not counts:
        raise FunnelError(f"{file.path}: no example has a label; is {file.label_column!r} the label column?")
    if len(counts) > MAX_SPARSE_CLASSES and 2 * len(counts) > counts.total():
        found = f"{plural(len(counts), 'label')} in {plural(n_examples, 'example')}"
        raise FunnelError(f"{file.path}: {found}; is {file.label_column!r} the label column?")
    ordered = _order_classes(counts)
    mean = counts.total() / n_examples
    description = f"{_describe_classes(ordered, counts)}; {mean:.2g} per example, none for {n_without:,}: multi-label"
    return Labels({label: label for label in ordered}, description, _similar_labels(counts), MULTI_LABEL)


def _count_labels(file: ExampleFile) -> tuple[Counter[str], dict[str, int | str]]:
    """How often each label occurs, and the line of its first occurrence."""
    counts: Counter[str] = Counter()
    first_lines: dict[str, int | str] = {}
    for example in file.rows():
        label = example.label or ""
        if not label.strip():
            raise file.error(example.line, f"{file.label_column!r} is empty; add the label or remove the row")
        counts[label] += 1
        first_lines.setdefault(label, example.line)
    return counts, first_lines


def _similar_labels(counts: Counter[str]) -> tuple[str, ...]:
    """A warning for each group of labels that may be different spellings of one."""
    groups: dict[str | float, list[str]] = {}
    for label in counts:
        groups.setdefault(normalize_label(label), []).append(label)
    similar = [format_list(f"{label!r} ({counts[label]:,})" for label in sorted(g)) for g in groups.values() if len(g) > 1]
    return tuple(
        f"labels {group} differ only in case, spaces or number format; do they mean the same class?" for group in similar
    )


def _formatted_numbers(counts: Counter[str], scores: Mapping[str, float]) -> tuple[str, ...]:
    """A warning if most labels are numbers that are written with a decimal comma, a thousands separator or a unit."""
    labels = [label for label in counts if label not in scores and FORMATTED_NUMBER.fullmatch(label.strip())]
    if len(labels) <= len(counts) / 2:
        return ()
    return (f"labels such as {labels[0]!r} are read as classes; to train on scores, write plain numbers such as 1234.5",)


def _look_like_scores(counts: Counter[str], scores: dict[str, float]) -> bool:
    has_many_values = len(scores) > MAX_INTEGER_CLASSES or any(score != round(score) for score in scores.values())
    return has_many_values and sum(counts[label] for label in scores) > counts.total() / 2


def _check_classes(file: ExampleFile, counts: Counter[str], problem: str | None, formatted: tuple[str, ...]) -> None:
    """Rejects a single class and, unless `problem` is set, a label column that looks like free text.

    Args:
        formatted: warnings about labels that look like numbers.
    """
    if len(counts) < 2:
        only, column = next(iter(counts)), file.label_column
        raise FunnelError(
            f"{file.path}: every label is {only!r}; a classifier needs at least two; is {column!r} the label column?"
        )
    if problem is None and len(counts) > max(MAX_SPARSE_CLASSES, counts.total() / 2):
        advice = formatted[0] if formatted else f"is {file.label_column!r} the label column? If so, pass problem=classification"
        raise FunnelError(f"{file.path}: {len(counts):,} classes for {counts.total():,} texts; {advice}", "problem")

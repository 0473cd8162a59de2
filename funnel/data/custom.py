"""The user's own files: finds the columns and infers whether the labels are classes or scores."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from funnel.data.files import ExampleFile, parse_score, read_column_names
from funnel.errors import FunnelError, format_list

DEFAULT_TEXT_COLUMNS = ("text", "sentence")
DEFAULT_LABEL_COLUMN = "label"
PROBLEMS = ("classification", "regression")
MAX_INTEGER_CLASSES = 50  # integer labels with more distinct values are treated as scores
MAX_SPARSE_CLASSES = 10  # more classes than this need two texts each on average, or the label column is probably wrong
MAX_LISTED_CLASSES = 20


class Labels(NamedTuple):
    """The labels of a file.

    Attributes:
        names: label names by the label as written in the file, in the order of their ids; None for scores.
        description: one sentence for the user.
    """

    names: dict[str, str] | None
    description: str


def choose_columns(path: Path, text_column: str | None, text_pair_column: str | None, label_column: str | None) -> ExampleFile:
    """A labeled file and its columns; the default names are used for columns that are None.

    Raises:
        FunnelError: the file's header is malformed, there is no default column, or a column is chosen twice.
    """
    names = read_column_names(path)
    if text_column is None:
        text_column = next((name for name in DEFAULT_TEXT_COLUMNS if name in names), None)
    if text_column is None:
        raise FunnelError(f"{path}: cannot find the text column; choose text_column from {format_list(names)}", "text_column")
    if label_column is None and DEFAULT_LABEL_COLUMN not in names:
        message = f"{path}: cannot find the label column; choose label_column from {format_list(names)}"
        raise FunnelError(message, "label_column")
    text_columns = (text_column,) if text_pair_column is None else (text_column, text_pair_column)
    file = ExampleFile(path, text_columns, label_column or DEFAULT_LABEL_COLUMN)
    for column, count in Counter(file.columns).items():
        if count > 1:
            raise FunnelError(f"{path}: column {column!r} is chosen twice; text, second text and label need different columns")
    return file


def infer_labels(file: ExampleFile, problem: str | None) -> Labels:
    """Reads a file's labels and decides whether they are classes or scores.

    Args:
        problem: "classification" or "regression". None to infer it: labels are scores if most of them are numbers, and
            these contain a fraction or more than `MAX_INTEGER_CLASSES` distinct values.

    Raises:
        FunnelError: the file is malformed, a label is empty or not a number, or the classes are implausible.
    """
    counts, first_lines = _count_labels(file)
    scores = {label: score for label in counts if (score := parse_score(label)) is not None}
    if problem == "regression" or (problem is None and _look_like_scores(counts, scores)):
        for label in counts:
            if label not in scores:
                message = f"label {label!r} is not a finite float32"
                if problem is None:
                    message += ", but most others are numbers; set problem to classification to treat all as classes"
                raise file.error(first_lines[label], message, None if problem else "problem")
        low, high = min(scores.values()), max(scores.values())
        hint = "set problem to classification to treat them as classes"
        return Labels(None, f"scores from {low:g} to {high:g}: regression; {hint}")

    _check_classes(file, counts, problem)
    all_numeric = len(scores) == len(counts)
    ordered = sorted(counts, key=lambda label: (scores[label], label)) if all_numeric else sorted(counts)
    names = [label if label == " ".join(label.split()) else repr(label) for label in ordered[:MAX_LISTED_CLASSES]]
    shown = ", ".join(f"{name} ({counts[label]:,})" for name, label in zip(names, ordered, strict=False))
    description = f"{len(ordered)} classes: {shown}" + (", …" if len(ordered) > MAX_LISTED_CLASSES else "")
    if all_numeric and problem is None:
        description += "; set problem to regression to treat them as scores"
    return Labels({label: label for label in ordered}, description)


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


def _look_like_scores(counts: Counter[str], scores: dict[str, float]) -> bool:
    has_many_values = len(scores) > MAX_INTEGER_CLASSES or any(score != round(score) for score in scores.values())
    return has_many_values and sum(counts[label] for label in scores) > counts.total() / 2


def _check_classes(file: ExampleFile, counts: Counter[str], problem: str | None) -> None:
    """Rejects a single class and, unless `problem` is set, a label column that looks like free text."""
    if len(counts) < 2:
        raise FunnelError(f"{file.path}: every label is {next(iter(counts))!r}; a classifier needs at least two classes")
    if problem is None and len(counts) > max(MAX_SPARSE_CLASSES, counts.total() / 2):
        raise FunnelError(
            f"{file.path}: {len(counts):,} classes for {counts.total():,} texts; is {file.label_column!r} the label column? "
            "If so, set problem to classification",
            "problem",
        )

"""Writing predictions to files."""

import contextlib
import csv
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from funnel.data.choices import ChoiceExample, choice_name
from funnel.data.files import Example, ExampleFile
from funnel.data.formats import file_format, is_gzipped
from funnel.data.tasks import Task
from funnel.errors import FunnelError, format_list
from funnel.inference.choices import ChoicePrediction
from funnel.inference.classifier import Classifier, Prediction
from funnel.io import atomic_write

SUFFIXES = (".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz")  # of files of predictions
STSB_RANGE = (0.0, 5.0)  # the GLUE server rejects scores outside it


def write_predictions(predictions: Iterable[tuple[Example, Prediction]], source: ExampleFile, path: Path) -> int:
    """Writes predictions to a .csv, .tsv or .jsonl file, gzipped if the name ends in .gz, and returns their number.

    Every row has the example's index from 0, the label, the probability of every class, the text or both texts, and the
    values of the source's `extra_columns`. The latter have the names of the source's columns, preceded by "input " where a
    column of the predictions has the same name. csv and tsv files are quoted as in RFC 4180. The file is written atomically.

    Raises:
        FunnelError: the file cannot be written, or its name has none of these suffixes.
    """
    columns = [str(column) for column in (*source.text_columns, *source.extra_columns)]
    with _open(path) as file:
        if file_format(path) == "jsonl":
            return _write_json_lines(predictions, columns, file)
        return _write_table(predictions, columns, _table_writer(file, path))


def write_choices(predictions: Iterable[tuple[ChoiceExample, ChoicePrediction]], path: Path) -> int:
    """Writes answers to multiple-choice questions to a file, as `write_predictions`, and returns their number.

    Every row has the question's index from 0, the letter of the answer (`label`), its text (`choice`), the probability of every
    choice, and the question.

    Raises:
        FunnelError: as in `write_predictions`.
    """
    count = 0
    with _open(path) as file:
        writer = _table_writer(file, path)
        for example, prediction in predictions:
            answer = {"index": count, "label": prediction.letter, "choice": prediction.choice}
            if file_format(path) == "jsonl":
                write_json_line({**answer, "probabilities": prediction.probabilities, "question": example.question}, file)
            else:
                if count == 0:
                    names = [f"probability of {choice_name(choice)}" for choice in range(len(example.choices))]
                    writer.writerow([*answer, *names, "question"])
                probabilities = [f"{probability:.6f}" for probability in prediction.probabilities]
                fields = [*map(str, answer.values()), *probabilities, example.question]
                writer.writerow(map(_quotable, fields))
            count += 1
    return count


@contextlib.contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    """Yields a text file that is moved into place at the end; gzipped if its name ends in .gz."""
    if not path.name.lower().endswith(SUFFIXES):
        raise FunnelError(f"{path}: unknown format; predictions are written to .csv, .tsv or .jsonl files")
    open_text = gzip.open if is_gzipped(path) else open
    with atomic_write(path) as temporary, cast(TextIO, open_text(temporary, "wt", encoding="utf-8", newline="")) as file:
        yield file


def _table_writer(file: TextIO, path: Path) -> Any:
    return csv.writer(file, delimiter="\t" if file_format(path) == "tsv" else ",", lineterminator="\n")


def write_json_line(values: Mapping[str, object], file: TextIO) -> None:
    """Writes an object to a jsonl file."""
    file.write(json.dumps(values, ensure_ascii=False) + "\n")


def _write_json_lines(predictions: Iterable[tuple[Example, Prediction]], columns: list[str], file: TextIO) -> int:
    columns = _rename_columns(columns, {"index", "label", "probabilities"})
    count = 0
    for example, prediction in predictions:
        values: dict[str, object] = {"index": count, "label": prediction.label}
        if prediction.probabilities:
            values["probabilities"] = prediction.probabilities
        values |= zip(columns, _copied_values(example), strict=True)
        write_json_line(values, file)
        count += 1
    return count


def _write_table(predictions: Iterable[tuple[Example, Prediction]], columns: list[str], writer: Any) -> int:
    count = 0
    for example, prediction in predictions:
        if count == 0:
            names = ["index", "label", *(f"probability of {name}" for name in prediction.probabilities)]
            writer.writerow(map(_quotable, [*names, *_rename_columns(columns, set(names))]))
        label = format_label(prediction.label)
        probabilities = [f"{probability:.6f}" for probability in prediction.probabilities.values()]
        writer.writerow(map(_quotable, [str(count), label, *probabilities, *_copied_values(example)]))
        count += 1
    return count


def format_label(label: str | float | list[str], digits: int = 9) -> str:
    """A predicted label as text; several are separated by commas, or written as JSON if one contains a comma."""
    if isinstance(label, list):
        return json.dumps(label, ensure_ascii=False) if any("," in name for name in label) else ",".join(label)
    return label if isinstance(label, str) else f"{label:.{digits}g}"


def _quotable(field: str) -> str:
    """The field with lone carriage returns replaced, because csv.writer does not quote them."""
    return re.sub(r"\r(?!\n)", "\n", field)


def _copied_values(example: Example) -> list[str]:
    """The fields of the input that are copied to the output."""
    return [example.text, *([] if example.pair is None else [example.pair]), *example.extra]


def _rename_columns(columns: Iterable[str], taken: set[str]) -> list[str]:
    """Makes names distinct from those of the predictions."""
    renamed = []
    for name in columns:
        while name in taken:
            name = f"input {name}"
        taken.add(name)
        renamed.append(name)
    return renamed


def write_glue_submission(classifier: Classifier, task: Task, folder: Path) -> list[Path]:
    """Writes predictions for a task's unlabeled test files in the GLUE server's format, all files or none.

    Args:
        task: with its `tests` located.

    Returns:
        The files written.

    Raises:
        FunnelError: the classifier's labels differ from the task's, a test file is missing or malformed, or the folder
            cannot be written.
    """
    answers = None  # what the server expects, by label name; None for scores
    if task.labels is not None:
        answers = {name: answer for answer, name in task.labels.items()}
        labels = classifier.model.config.id2label.values()
        if set(labels) != set(answers):
            raise FunnelError(f"the classifier's labels are {format_list(labels)}, but {task.title} has {format_list(answers)}")
    contents = {}
    for name, source in task.tests.items():
        lines = ["index\tprediction"]
        for index, (_, prediction) in enumerate(classifier.predict_file(source)):
            lines.append(f"{index}\t{_glue_answer(prediction, answers)}")
        contents[folder / f"{name}.tsv"] = "\n".join(lines) + "\n"
    with contextlib.ExitStack() as stack:  # no file is moved into place before all are written
        for path, content in contents.items():
            stack.enter_context(atomic_write(path)).write_text(content, encoding="utf-8")
    return list(contents)


def _glue_answer(prediction: Prediction, answers: dict[str, str] | None) -> str:
    if answers is not None:
        return answers[str(prediction.label)]
    low, high = STSB_RANGE
    return f"{min(max(float(str(prediction.label)), low), high):.3f}"

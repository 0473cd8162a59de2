"""Multiple choice: reads questions with a list of choices, and encodes them.

Files have one question per row, as jsonl, json or parquet: `context` (optional), `question`, `choices` (a list of strings) and
`label`, the index of the right choice from 0 or its letter (A, B, ...). A folder has RACE's layout: .txt files, at any depth,
with one JSON object each: `article`, and for each of its `questions` a list of `options` and one of the `answers` (a letter).

The two texts of a row are the context, and the question with one of the choices; see `join_choice`.
"""

import json
import os
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from funnel.data.checks import hash_texts
from funnel.data.dataset import Rows, Truncation
from funnel.data.encoding import EncodedRows, row_starts
from funnel.data.files import is_utf8
from funnel.data.formats import DIALECTS, ROW_NAMES, check_file, file_format, read_column_names, read_object, read_objects
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, format_list, plural
from funnel.io import json_digest, os_errors, sha256

FIELDS = ("question", "choices")  # required; also `context` and `label`
RACE_FIELDS = ("article", "questions", "options")  # also `answers`
MAX_CHOICES = 26  # one per letter
MAX_QA_LENGTH = 128  # tokens of question and choice, as in Funnel-Transformer's tensorflow/race.py (max_qa_length)
# An underscore inside a word (snake_case) is not a blank.
BLANK = re.compile(r"(?<!\w)_+|_+(?!\w)")


class ChoiceExample(NamedTuple):
    """A question.

    Attributes:
        context: what the question is about; "" for none.
        label: index of the right choice; None without labels.
        line: where it is, for error messages: the number of a row, or file and question in a folder.
    """

    context: str
    question: str
    choices: tuple[str, ...]
    label: int | None = None
    line: int | str = 0

    @property
    def text(self) -> str:
        """The text that questions may share: the context or, without one, the question."""
        return self.context or self.question

    @property
    def pair(self) -> None:
        """None: `text` alone identifies examples that belong together."""
        return None


def choice_name(index: int) -> str:
    """The letter of a choice."""
    return string.ascii_uppercase[index]


def join_choice(question: str, choice: str) -> str:
    """The question with one of its choices: in the place of the blank ("_"), if there is one, otherwise after the question.

    As in Funnel-Transformer's tensorflow/race.py, except that several underscores in a row are one blank, and that underscores
    inside a word are none.
    """
    joined, n_blanks = BLANK.subn(lambda _: choice, question)
    return joined if n_blanks else f"{question} {choice}"


@dataclass(frozen=True)
class InMemoryQuestions:
    """Questions held in memory; has the interface of `ChoiceFile`."""

    examples: tuple[ChoiceExample, ...]

    def rows(self) -> Iterator[ChoiceExample]:
        """Yields the questions in order."""
        yield from self.examples

    def digest(self) -> str:
        """A checksum of the questions."""
        return json_digest(self.examples)

    def error(self, line: int | str, message: str) -> FunnelError:
        """An error located at a question."""
        return FunnelError(f"question {line}: {message}")


@dataclass(frozen=True)
class ChoiceFile:
    """A file of questions, or a folder in RACE's layout.

    Attributes:
        labeled: whether labels are read and required.
    """

    path: Path
    labeled: bool = True

    @property
    def text_columns(self) -> tuple[str, ...]:
        """None: texts are read from several fields."""
        return ()

    def in_folder(self, folder: Path) -> "ChoiceFile":
        """The same file with its path taken relative to `folder`."""
        return replace(self, path=folder / self.path)

    def rows(self) -> Iterator[ChoiceExample]:
        """Reads the questions in order; those of a folder sorted by file name.

        Raises:
            FunnelError: the source is empty, unreadable or malformed, or questions have different numbers of choices; the
                message names file and line, or file and question.
        """
        expected = 0
        for example in self._read_folder() if os.path.isdir(self.path) else self._read_file():
            expected = expected or len(example.choices)
            if len(example.choices) != expected:
                found = f"{len(example.choices)} choices, but the first question has {expected}"
                raise self.error(example.line, f"{found}; all questions need the same number")
            yield example
        if not expected:
            raise FunnelError(f"{self.path}: empty; expected at least one question")

    def iter_texts(self) -> Iterator[str]:
        """Yields all texts; a context that follows itself only once."""
        context = ""
        for example in self.rows():
            if example.context != context:
                context = example.context
                yield context
            yield from (join_choice(example.question, choice) for choice in example.choices)

    def error(self, line: int | str, message: str) -> FunnelError:
        """An error located at a question."""
        name = ROW_NAMES.get(file_format(self.path), "line")
        return FunnelError(f"{self.path}, {name} {line}: {message}" if isinstance(line, int) else f"{line}: {message}")

    def digest(self) -> str:
        """A checksum of the content and of the options for reading it."""
        paths = self._folder_files() if os.path.isdir(self.path) else [self.path]
        parts = [(os.path.relpath(path, self.path), sha256(path)) for path in paths]
        return json_digest(["choices", self.labeled, parts])

    def _read_file(self) -> Iterator[ChoiceExample]:
        check_file(self.path, "data")
        if file_format(self.path) in DIALECTS:
            raise FunnelError(
                f"{self.path}: choices are lists, which a {file_format(self.path)} file cannot contain; use jsonl"
            )
        is_parquet = file_format(self.path) == "parquet"  # read by column
        for number, values in read_objects(self.path, self._parquet_columns() if is_parquet else ()):
            _check_fields(values, (*FIELDS, *["label"] * self.labeled), self.error(number, ""))
            example = ChoiceExample(values.get("context") or "", values["question"], values["choices"], line=number)
            yield self._check(example, values.get("label"))

    def _parquet_columns(self) -> list[str]:
        return [name for name in read_column_names(self.path) if name in (*FIELDS, "context", "label")]

    def _read_folder(self) -> Iterator[ChoiceExample]:
        names = ("questions", "options", "answers")[: 3 if self.labeled else 2]
        for path in self._folder_files():
            values = read_object(path)
            _check_fields(values, ("article", *names), FunnelError(f"{path}: "))
            columns = [values[name] for name in names]
            for name, items in zip(names, columns, strict=True):
                if not isinstance(items, list):
                    raise FunnelError(f"{path}: {name!r} is not a list; expected one item per question")
                if len(items) != len(columns[0]):
                    raise FunnelError(f"{path}: {plural(len(columns[0]), 'question')}, but {len(items)} {name}")
            if not columns[0]:
                raise FunnelError(f"{path}: no questions; remove the file")
            for number, (question, options, *answer) in enumerate(zip(*columns, strict=True), 1):
                example = ChoiceExample(values["article"], question, options, line=f"{path}, question {number}")
                yield self._check(example, answer[0] if answer else None)

    def _folder_files(self) -> list[Path]:
        with os_errors(self.path):
            paths = sorted(self.path.rglob("*.txt"))
        if not paths:
            raise FunnelError(
                f"{self.path}: no .txt files; expected RACE's layout, with one article and its questions per file"
            )
        return paths

    def _check(self, example: ChoiceExample, label: Any) -> ChoiceExample:
        """Checks the types of a question's fields, and parses its label."""
        line, choices = example.line, example.choices
        if not isinstance(choices, list) or not 2 <= len(choices) <= MAX_CHOICES:
            raise self.error(line, f"choices are {_show(choices)}; expected a list of 2 to {MAX_CHOICES} strings")
        for what, text in (("context", example.context), ("question", example.question), *(("choice", c) for c in choices)):
            if not isinstance(text, str):
                raise self.error(line, f"{what} is {_show(text)}; expected a string")
            if not is_utf8(text):
                raise self.error(line, f"{what} contains a lone surrogate, which is not a valid character")
        if not self.labeled:
            return example._replace(choices=tuple(choices))
        index = _parse_label(label, len(choices))
        if index is None:
            last = len(choices) - 1
            expected = f"a letter from A to {choice_name(last)}, or an index from 0 to {last}"
            raise self.error(line, f"label {_show(label)}; expected {expected}")
        return example._replace(choices=tuple(choices), label=index)


def _check_fields(values: Mapping[str, Any], names: Sequence[str], place: FunnelError) -> None:
    """Raises FunnelError if a field is missing.

    Args:
        place: an error whose message is the beginning of this one's.
    """
    for name in names:
        if name not in values:
            raise FunnelError(f"{place}no field {name!r}; the fields are {format_list(values) or '(none)'}")


def _parse_label(label: Any, n_choices: int) -> int | None:
    """The index of a choice, from an index or a letter; None for anything else."""
    letters = string.ascii_uppercase[:n_choices]
    if isinstance(label, str):
        return letters.index(label) if len(label) == 1 and label in letters else None
    return label if type(label) is int and 0 <= label < n_choices else None


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, default=str)[:60]


# --- encoding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChoiceEncoder:
    """Encodes every choice as [CLS] context [SEP] question and choice [SEP], without a context as a single text.

    Of question and choice, the last `MAX_QA_LENGTH` tokens are kept, as in tensorflow/race.py; then the context is truncated to
    fit. (There, the question precedes the article; in BERT's and XLNet's recipes, it follows.) `Rows.hashes` are those of the
    contexts, so that `Dataset.split` keeps the questions about a context together.
    """

    def settings(self) -> Any:
        return ["choices", MAX_QA_LENGTH]

    def encode(
        self, source: Any, examples: Sequence[ChoiceExample], tokenizer: FunnelTokenizer, max_length: int
    ) -> EncodedRows:
        special = 2 + tokenizer.separators
        if max_length <= special:
            raise FunnelError(f"invalid max_length {max_length}: expected more than the {special} special tokens", "max_length")
        contexts = list(dict.fromkeys(example.context for example in examples))
        context_ids = dict(zip(contexts, tokenizer.encode_plain(contexts), strict=True))
        joined = [join_choice(example.question, choice) for example in examples for choice in example.choices]
        qa_ids = iter(tokenizer.encode_plain(joined))
        ids: list[int] = []
        lengths, pair_starts = [], []
        truncation = Truncation()
        for example in examples:
            rows = [_join(context_ids[example.context], next(qa_ids), tokenizer, max_length) for _ in example.choices]
            for row, pair_start, _ in rows:
                ids += row
                lengths.append(len(row))
                pair_starts.append(pair_start)
            full = [full_length for *_, full_length in rows]
            lost = sum(full) - sum(len(row) for row, *_ in rows)
            truncation = truncation.merge(Truncation(int(lost > 0), lost, sum(full), max(full)))
        shape = (len(examples), len(examples[0].choices))
        lengths_array = np.array(lengths, np.int32).reshape(shape)
        labels = np.array([-1 if example.label is None else example.label for example in examples], np.int32)
        hashes = hash_texts([example.text for example in examples], None)
        starts = np.array(pair_starts, np.int32).reshape(shape)
        rows_of_all = Rows(row_starts(lengths_array), lengths_array, starts, labels, hashes)
        return EncodedRows(np.array(ids, np.int32), rows_of_all, truncation)


def _join(context: list[int], qa: list[int], tokenizer: FunnelTokenizer, max_length: int) -> tuple[list[int], int, int]:
    """The ids of a choice, with special tokens; the start of the second text; and the length without truncation."""
    cls, sep, separators = tokenizer.ids["cls"], tokenizer.ids["sep"], tokenizer.separators
    if not context:
        ids = [cls, *qa[-min(MAX_QA_LENGTH, max_length - 2) :], sep]
        return ids, len(ids), len(qa) + 2
    special = 2 + separators
    kept = qa[-min(MAX_QA_LENGTH, max_length - special) :]
    first = [cls, *context[: max_length - special - len(kept)], *[sep] * separators]
    ids = [*first, *kept, sep]
    return ids, len(first) if tokenizer.second_type else len(ids), len(context) + len(qa) + special

"""Reads questions about texts and their answers from files in SQuAD's format, version 1.1 or 2.0.

    {"data": [{"title": ..., "paragraphs": [{"context": ..., "qas": [
        {"id": ..., "question": ..., "answers": [{"text": ..., "answer_start": ...}], "is_impossible": false}]}]}]}

Answers are parts of the context. A question without an answer has an empty list and `is_impossible` true. No question is
skipped or repaired: a missing field, a duplicate id, or an answer that the context does not contain at `answer_start`, counted
in characters (Unicode code points), is an error. Titles and other fields are optional and not read. Files may be compressed.
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from funnel.data.files import is_utf8
from funnel.data.formats import READ_ERRORS, open_file, read_lines
from funnel.errors import FunnelError, error_reason, format_list, plural
from funnel.io import json_digest, sha256

SUFFIXES = (".json", ".json.gz", ".json.xz")
MAX_LINE_BYTES = 2**31  # such files often have a single line
HEAD_BYTES = 5000  # in which the format is recognized
MIN_ARTICLES = 10  # a file with fewer is split into train and dev by paragraph
KINDS = {str: "a string", list: "a list", int: "an integer", bool: "true or false"}


class GoldAnswer(NamedTuple):
    """An answer, and the position of its first character in the context."""

    text: str
    start: int


class Question(NamedTuple):
    """A question about a text.

    Attributes:
        id: unique in its source.
        question, context: the texts.
        answers: what annotators gave as answers; none if the context does not answer the question; None if unknown.
        group: number of the article, or of the paragraph, in the source. Questions of a group are not separated when a source
            is split into train and dev.
    """

    id: str
    question: str
    context: str
    answers: tuple[GoldAnswer, ...] | None = None
    group: int = 0

    @property
    def text(self) -> str:
        """The question; the name that `Example` has for the first text."""
        return self.question

    @property
    def pair(self) -> str:
        """The context; the name that `Example` has for the second text."""
        return self.context


class InMemoryQuestions(NamedTuple):
    """Questions held in memory; has the interface of `SquadFile`."""

    questions: Sequence[Question]

    def rows(self) -> Iterator[Question]:
        """Yields the questions in order."""
        yield from self.questions

    def digest(self) -> str:
        """A checksum of the questions."""
        return json_digest(self)

    def error(self, line: int | str, message: str) -> FunnelError:
        """An error located at a question."""
        return FunnelError(f"question {line}: {message}")


@dataclass(frozen=True)
class SquadFile:
    """A file in SQuAD's format.

    Attributes:
        path: a .json file, optionally compressed.
        labeled: whether answers are read, and required.
    """

    text_columns: ClassVar[tuple[str, ...]] = ("question", "context")

    path: Path
    labeled: bool = True

    def in_folder(self, folder: Path) -> "SquadFile":
        """The same file with its path taken relative to `folder`."""
        return replace(self, path=folder / self.path)

    def rows(self) -> Iterator[Question]:
        """Yields the questions in order. The file is read once and its questions are kept.

        Raises:
            FunnelError: the file is unreadable or malformed; the message names the file and the question or the place.
        """
        yield from self.questions

    def iter_texts(self) -> Iterator[str]:
        """Yields every context once, then all questions."""
        yield from dict.fromkeys(question.context for question in self.questions)
        yield from (question.question for question in self.questions)

    def digest(self) -> str:
        """A checksum of the file's content and of the options for reading it."""
        return json_digest(["squad", self.labeled, sha256(self.path)])

    def error(self, line: int | str, message: str) -> FunnelError:
        """An error located at a place in the file, such as "question 56be4db0acb8001400a502ec"."""
        return FunnelError(f"{self.path}, {line}: {message}")

    @property
    def has_unanswerable(self) -> bool:
        """Whether a question has no answer, as in SQuAD 2.0."""
        return any(question.answers == () for question in self.questions)

    @property
    def group_name(self) -> str:
        """What `Question.group` counts: "article" or "paragraph"."""
        return "article" if len(self._articles) >= MIN_ARTICLES else "paragraph"

    @property
    def description(self) -> str:
        """What the file contains, in one line."""
        n_paragraphs = sum(len(article["paragraphs"]) for article in self._articles)
        n_unanswerable = sum(question.answers == () for question in self.questions)
        counts = plural(len(self.questions), "question") + (f" ({n_unanswerable:,} without an answer)" * (n_unanswerable > 0))
        return f"{self.path.name}: {counts}, {plural(n_paragraphs, 'paragraph')}, {plural(len(self._articles), 'article')}"

    # --- parsing ------------------------------------------------------------------------------------------------------

    @cached_property
    def questions(self) -> list[Question]:
        """All questions."""
        questions: list[Question] = []
        n_paragraphs = 0
        for number, article in enumerate(self._articles):
            for i, paragraph in enumerate(article["paragraphs"]):
                group = number if self.group_name == "article" else n_paragraphs
                questions += self._paragraph(paragraph, group, f"data[{number}].paragraphs[{i}]")
                n_paragraphs += 1
        if not questions:
            raise FunnelError(f"{self.path}: no questions; expected at least one")
        seen: set[str] = set()
        for question in questions:
            if question.id in seen:
                raise self.error(f"question {question.id}", "duplicate id; predictions and answers are matched by id")
            seen.add(question.id)
        return questions

    @cached_property
    def _articles(self) -> list[dict[str, Any]]:
        """The items of the file's "data", each with a list of paragraphs."""
        text = "".join(read_lines(self.path, MAX_LINE_BYTES))
        if not text.strip():
            raise FunnelError(f"{self.path}: empty; expected JSON in the format of SQuAD")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FunnelError(f"{self.path}: invalid JSON ({error_reason(error)})") from None
        articles: list[dict[str, Any]] = self._field(values, "data", list, "top level")
        for number, article in enumerate(articles):
            self._field(article, "paragraphs", list, f"data[{number}]")
        return articles

    def _paragraph(self, paragraph: Any, group: int, place: str) -> Iterator[Question]:
        """Yields the questions of a paragraph."""
        context = self._field(paragraph, "context", str, place)
        for number, entry in enumerate(self._field(paragraph, "qas", list, place)):
            name = self._field(entry, "id", str, f"{place}.qas[{number}]")
            text = self._field(entry, "question", str, f"question {name}")
            answers = self._answers(entry, name, context) if self.labeled else None
            yield Question(name, text, context, answers, group)

    def _answers(self, entry: Any, name: str, context: str) -> tuple[GoldAnswer, ...]:
        """The answers of a question, checked against its context."""
        place = f"question {name}"
        if isinstance(entry, dict) and "answers" not in entry:
            raise self.error(place, "no answers; they are required in a file to train or evaluate on")
        values = self._field(entry, "answers", list, place)
        is_impossible = "is_impossible" in entry and self._field(entry, "is_impossible", bool, place)
        if is_impossible == bool(values):
            found = "has answers, but is_impossible is true" if values else "an empty list of answers"
            raise self.error(place, f"{found}; a question has either answers or is_impossible true")
        return tuple(self._answer(value, place, context) for value in values)

    def _answer(self, value: Any, place: str, context: str) -> GoldAnswer:
        text, start = self._field(value, "text", str, place), self._field(value, "answer_start", int, place)
        if not text.strip():
            raise self.error(place, "an answer is empty")
        found = context[start : start + len(text)] if start >= 0 else ""
        if found != text:
            other = context.find(text)
            hint = f"; it begins at character {other}" if other >= 0 else "; the context does not contain it"
            raise self.error(place, f"the answer {text[:60]!r} is not at answer_start {start} of the context{hint}")
        return GoldAnswer(text, start)

    def _field(self, values: Any, name: str, kind: type, place: str) -> Any:
        """A field of an object of the file, of a type in `KINDS`."""
        if not isinstance(values, dict):
            raise self.error(place, f"expected a JSON object, found {type(values).__name__}")
        if name not in values:
            raise self.error(place, f"no field {name!r}; the fields are {format_list(values) or '(none)'}")
        value = values[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            found = json.dumps(value, ensure_ascii=False)[:60]
            raise self.error(place, f"{name!r} is {found}; expected {KINDS[kind]}")
        if isinstance(value, str) and not is_utf8(value):
            raise self.error(place, f"{name!r} contains a lone surrogate, which is not a valid character")
        return value


def is_squad(path: Path) -> bool:
    """Whether a file has a .json name and begins like a file in SQuAD's format; False if it cannot be read."""
    if not path.name.lower().endswith(SUFFIXES) or not path.is_file():
        return False
    try:
        with open_file(path) as file:
            head = file.read(HEAD_BYTES).removeprefix(codecs.BOM_UTF8)
    except READ_ERRORS:
        return False
    return head.lstrip().startswith(b"{") and b'"paragraphs"' in head

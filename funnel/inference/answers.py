"""Answering questions with parts of a text."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from tqdm import tqdm

from funnel.data.encoding import encode_examples, encode_in_memory
from funnel.data.spans import MAX_QUERY_LENGTH, SpanEncoder
from funnel.data.squad import InMemoryQuestions, Question, SquadFile
from funnel.data.tokenizer import list_of_strings
from funnel.errors import FunnelError
from funnel.inference.predictor import Predictor, describe_truncation, run_record
from funnel.problems.answer_spans import AnswerSpans, Candidates, open_squad

CHUNK_SIZE = 1024  # questions of a file that are answered at a time


class CandidateAnswer(NamedTuple):
    """A part of the context that may be the answer.

    Attributes:
        text: as in the context.
        probability: among all candidates of the question and, if the model may decline to answer, "no answer".
        score: sum of the logits of its first and its last token.
        start, end: position of its first character in the context, and the one after its last.
    """

    text: str
    probability: float
    score: float
    start: int
    end: int


class Answer(NamedTuple):
    """The answer to a question.

    Attributes:
        text: a part of the context; "" for no answer.
        probability: of the answer, or of "no answer", as in `CandidateAnswer`.
        start, end: position of its first character in the context, and the one after its last; None for no answer.
        candidates: the best candidates, the best first; at most 20.
    """

    text: str
    probability: float
    start: int | None
    end: int | None
    candidates: list[CandidateAnswer]


class QuestionAnswerer(Predictor):
    """Answers questions about texts. Arguments and attributes as in `Predictor`.

    Attributes:
        encoder: how questions and contexts are encoded.
        n_truncated: number of questions so far that were longer than `encoder.max_query_length` tokens. Contexts are never
            truncated.
    """

    problems = ("answer-spans",)
    title = "question answerer"
    problem: AnswerSpans
    encoder = SpanEncoder()

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None, dtype: str | None = None) -> "QuestionAnswerer":
        """Loads a run's best checkpoint, or a checkpoint folder; as in `Predictor.load`.

        Questions and contexts are encoded as in the run; without one, with the default stride and length of questions, which is
        reduced to half of the maximum length if necessary.
        """
        answerer = super().load(folder, device, dtype)
        settings = run_record(Path(folder))
        recorded = {name: settings.get(name) for name in ("max_query_length", "doc_stride")}
        if not settings:
            recorded["max_query_length"] = min(MAX_QUERY_LENGTH, answerer.inputs.max_length // 2)
        answerer.encoder = SpanEncoder(**{name: n for name, n in recorded.items() if isinstance(n, int) and n > 0})
        return answerer

    @property
    def truncation_note(self) -> str:
        """As in `Predictor`, of questions."""
        return describe_truncation(self.n_truncated, "question", self.encoder.max_query_length)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a string is an iterable of strings, too
        self, questions: str, contexts: str
    ) -> Answer: ...
    @overload
    def __call__(self, questions: Iterable[str], contexts: str | Iterable[str]) -> list[Answer]: ...
    def __call__(self, questions: str | Iterable[str], contexts: str | Iterable[str]) -> Answer | list[Answer]:
        """Answers one question, or several.

        Args:
            questions: a question, or any iterable of them.
            contexts: the text that contains the answer; for several questions, the text of each, or one for all of them.

        Raises:
            FunnelError: a text is not a string, or questions and contexts do not match.
        """
        if isinstance(questions, str):
            if not isinstance(contexts, str):
                raise FunnelError("contexts must be a string, as questions is one", "contexts")
            return self([questions], contexts)[0]
        questions = list_of_strings(questions, "questions")
        contexts = [contexts] * len(questions) if isinstance(contexts, str) else list_of_strings(contexts, "contexts")
        if len(questions) != len(contexts):
            raise FunnelError(f"got {len(questions)} questions and {len(contexts)} contexts; expected one for each", "contexts")
        pairs = zip(questions, contexts, strict=True)
        return self.answer([Question(str(number), question, context) for number, (question, context) in enumerate(pairs)])

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers questions in their order; updates `n_truncated`."""
        if not questions:
            return []
        source = InMemoryQuestions(questions)
        dataset = encode_in_memory(source, self.encoder, self.tokenizer, self.inputs.max_length)
        return [self.to_answer(found) for found in self.problem.decode(self.run_checked(dataset), dataset)]

    def to_answer(self, found: Candidates) -> Answer:
        """Converts the candidates of one question."""
        null_score = -math.inf if self.problem.threshold is None else found.null_score
        scores = torch.tensor([null_score, *(span.score for span in found.spans)], dtype=torch.float64)
        null_probability, *probabilities = scores.softmax(0).tolist()
        candidates = [
            CandidateAnswer(span.text, probability, span.score, span.start, span.end)
            for span, probability in zip(found.spans, probabilities, strict=True)
        ]
        if not self.problem.answer(found):
            return Answer("", null_probability if candidates else 1.0, None, None, candidates)
        best = candidates[0]
        return Answer(best.text, best.probability, best.start, best.end, candidates)

    def predict_file(self, path: Path) -> Iterator[tuple[Question, Answer]]:
        """Yields the questions of a file in SQuAD's format with their answers, with a progress bar on standard error.

        The file's own answers are not read.

        Raises:
            FunnelError: the file is missing or malformed.
        """
        rows = open_squad(path, "file", labeled=False).rows()
        with tqdm(desc=path.name, unit="question", disable=None, dynamic_ncols=True) as progress:
            while chunk := list(itertools.islice(rows, CHUNK_SIZE)):
                yield from zip(chunk, self.answer(chunk), strict=True)
                progress.update(len(chunk))

    def evaluate_file(self, path: Path, metrics: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
        """Evaluates the model on a file in SQuAD's format; arguments and result as in `Predictor.evaluate`.

        Raises:
            FunnelError: the file is missing or malformed, or has no answers.
        """
        source: SquadFile = open_squad(path, "file")
        dataset = encode_examples(source, self.encoder, self.tokenizer, self.inputs.max_length)
        return self.evaluate(dataset, metrics, path.name)

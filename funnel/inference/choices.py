"""Answering multiple-choice questions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from funnel.data.choices import MAX_CHOICES, ChoiceEncoder, ChoiceExample, ChoiceFile, InMemoryQuestions, choice_name
from funnel.data.encoding import encode_examples, encode_in_memory
from funnel.data.tokenizer import list_of_strings
from funnel.errors import FunnelError, plural
from funnel.inference.predictor import Predictor


@dataclass(frozen=True)
class ChoicePrediction:
    """The answer to a question.

    Attributes:
        index: of the most probable choice, from 0.
        choice: its text.
        probability: its probability.
        probabilities: of every choice, in their order.
    """

    index: int
    choice: str
    probability: float
    probabilities: list[float]

    @property
    def letter(self) -> str:
        """The letter of the most probable choice."""
        return choice_name(self.index)


class MultipleChoice(Predictor):
    """Answers multiple-choice questions, with or without a context. Arguments and attributes as in `Predictor`."""

    problems = ("multiple-choice",)
    title = "multiple-choice model"

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a string is an iterable of strings, too
        self, questions: str, choices: Sequence[str], contexts: str | None = None
    ) -> ChoicePrediction: ...
    @overload
    def __call__(
        self, questions: Iterable[str], choices: Iterable[Sequence[str]], contexts: Iterable[str] | None = None
    ) -> list[ChoicePrediction]: ...
    def __call__(
        self, questions: str | Iterable[str], choices: Any, contexts: str | Iterable[str] | None = None
    ) -> ChoicePrediction | list[ChoicePrediction]:
        """Answers one question, or several, which may have different numbers of choices.

        Args:
            questions: where a question contains "_", it is replaced with the choice; otherwise the choice follows the question.
            choices: of the question; of several questions, one list each.
            contexts: what each question is about.

        Raises:
            FunnelError: an argument is not a string or a list of strings, or the numbers of questions, choices and contexts
                differ.
        """
        if contexts is not None and isinstance(contexts, str) != isinstance(questions, str):
            raise FunnelError("questions and contexts must both be strings or both be lists of strings", "contexts")
        if isinstance(questions, str):
            return self([questions], [choices], [contexts] if isinstance(contexts, str) else None)[0]
        questions = list_of_strings(questions, "questions")
        texts = [""] * len(questions) if contexts is None else list_of_strings(contexts, "contexts")
        lists = [list_of_strings(items, f"choices[{i}]") for i, items in enumerate(choices)]
        if not len(questions) == len(lists) == len(texts):
            found = f"{plural(len(lists), 'list')} of choices and {plural(len(texts), 'context')}"
            raise FunnelError(f"{plural(len(questions), 'question')}, but {found}: expected one of each", "questions")
        for i, items in enumerate(lists):
            if not 2 <= len(items) <= MAX_CHOICES:
                raise FunnelError(f"choices[{i}] has {plural(len(items), 'item')}: expected 2 to {MAX_CHOICES}", "choices")
        examples = [ChoiceExample(*row) for row in zip(texts, questions, map(tuple, lists), strict=True)]
        scores = self.logits(examples)
        return [self.to_prediction(example, row) for example, row in zip(examples, scores, strict=True)]

    def logits(self, examples: Sequence[ChoiceExample]) -> list[Tensor]:
        """The scores of the choices of each question, [c] each, float32 on the CPU; updates `n_truncated`."""
        results = [torch.empty(0)] * len(examples)
        for n_choices in sorted({len(example.choices) for example in examples}):
            rows = [row for row, example in enumerate(examples) if len(example.choices) == n_choices]
            source = InMemoryQuestions(tuple(examples[row] for row in rows))
            dataset = encode_in_memory(source, ChoiceEncoder(), self.tokenizer, self.inputs.max_length)
            for row, scores in zip(rows, self.run_checked(dataset), strict=True):
                results[row] = scores
        return results

    @staticmethod
    def to_prediction(example: ChoiceExample, scores: Tensor) -> ChoicePrediction:
        """Converts the scores of a question's choices, [c]."""
        probabilities = scores.double().softmax(0).tolist()
        index = int(scores.argmax())
        return ChoicePrediction(index, example.choices[index], probabilities[index], probabilities)

    def predict_file(self, source: ChoiceFile) -> Iterator[tuple[ChoiceExample, ChoicePrediction]]:
        """Yields the questions of a file or folder with the answers, in order.

        Raises:
            FunnelError: the file is malformed.
        """
        results = self.run_checked(encode_examples(source, ChoiceEncoder(), self.tokenizer, self.inputs.max_length))
        for example, scores in zip(source.rows(), results, strict=True):
            yield example, self.to_prediction(example, scores)

    def evaluate_file(self, source: ChoiceFile, metrics: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
        """Evaluates the model on a labeled file or folder; results and errors as in `Predictor.evaluate`."""
        dataset = encode_examples(source, ChoiceEncoder(), self.tokenizer, self.inputs.max_length)
        return self.evaluate(dataset, metrics, source.path.name)

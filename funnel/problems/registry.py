"""All kinds of problem, by name and by model."""

from funnel.data.dataset import Dataset
from funnel.data.encoding import encode_examples
from funnel.data.tasks import Task
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model.config import FunnelConfig
from funnel.problems.answer_spans import AnswerSpans
from funnel.problems.base import Problem
from funnel.problems.classification import Classification
from funnel.problems.multi_label import MultiLabel
from funnel.problems.multiple_choice import MultipleChoice
from funnel.problems.regression import Regression
from funnel.problems.token_labels import TokenLabels

KINDS = (Classification, Regression, MultiLabel, TokenLabels, AnswerSpans, MultipleChoice)
PROBLEMS: dict[str, type[Problem]] = {kind.name: kind for kind in KINDS}


def problem_of(architecture: str, config: FunnelConfig, source: str = "model") -> Problem:
    """The problem that a trained model solves.

    Args:
        architecture: the name of its class.
        source: where it comes from, for the error message.

    Raises:
        FunnelError: it has no head for any of them.
    """
    for kind in PROBLEMS.values():
        if kind.model_class.__name__ == architecture and kind.problem_type == config.problem_type:
            return kind(config)
    raise FunnelError(f"{source}: expected a trained model with a head, found a {architecture}; fine-tune it first")


def encode_split(task: Task, split: str, tokenizer: FunnelTokenizer, max_length: int) -> Dataset:
    """One of a task's sets of examples, encoded; errors as in `encode_examples`."""
    return encode_examples(task.files[split], PROBLEMS[task.problem].encoder(task), tokenizer, max_length)

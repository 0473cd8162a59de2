"""The training loss of a task."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from funnel.data.batches import Batch
from funnel.options import option
from funnel.problems.base import Problem

CLASS_WEIGHTS = ("balanced",)


@dataclass(frozen=True)
class LossArgs:
    """Options for the loss of problems with classes."""

    label_smoothing: float = option(0.0, "share of the target that is spread over all classes", bounds="[0, 1)")
    class_weights: str | None = option(
        None, "balanced: weight each class by the inverse of its frequency (default: equal weights)", choices=CLASS_WEIGHTS
    )


def first_value(values: Tensor) -> Tensor:
    """The loss, of a scalar or of [k] values of which it is the first."""
    return values.reshape(-1)[0]


@dataclass(frozen=True)
class TaskLoss:
    """Computes the mean loss of a batch with a model."""

    problem: Problem

    def settings(self) -> dict[str, Any]:
        """Settings of a run that a resumed run must share."""
        return {}

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.problem.loss(model(**batch.inputs), batch.labels)

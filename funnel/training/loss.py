"""The training loss of a task."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from funnel.data.batches import Batch


def loss_function(logits: Tensor, labels: Tensor, label_std: float = 1.0) -> Tensor:
    """Mean cross-entropy for label ids, mean squared error for float labels. logits [b, n_outputs], labels [b].

    Args:
        label_std: unit of the errors, which are divided by it before squaring. Training uses the labels' standard deviation
            (`FunnelConfig.label_std`), so that gradients do not depend on the labels' scale; with 1, the loss is in the labels'
            own units.
    """
    if labels.is_floating_point():
        return ((logits.float().squeeze(1) - labels) / label_std).square().mean()
    return F.cross_entropy(logits.float(), labels)


def first_value(values: Tensor) -> Tensor:
    """The loss, of a scalar or of [k] values of which it is the first."""
    return values.reshape(-1)[0]


@dataclass(frozen=True)
class TaskLoss:
    """Computes the mean loss of a batch with a model.

    Attributes:
        label_std: as in `loss_function`.
    """

    label_std: float = 1.0

    def settings(self) -> dict[str, Any]:
        """Settings of a run that a resumed run must share."""
        return {}

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.from_logits(model(**batch.inputs), batch.labels)

    def from_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of logits, [b, n_outputs]."""
        return loss_function(logits, labels, self.label_std)

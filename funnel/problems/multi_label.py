"""Any number of classes per text or pair of texts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from funnel.data.dataset import Dataset
from funnel.data.encoding import Encoder, TextEncoder
from funnel.data.tasks import Task
from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.heads import FunnelForSequenceClassification
from funnel.problems.base import Problem
from funnel.problems.calibration import calibrate
from funnel.problems.error_analysis import list_mistakes, score_classes
from funnel.problems.metrics import MULTI_LABEL, ClassCounts, Metric

DEFAULT_THRESHOLD = 0.5


class MultiLabel(Problem):
    """Any number of classes per text; one sigmoid and binary cross-entropy per class.

    A class is predicted if its probability exceeds a threshold, which is the same for all classes. `tune` chooses the one with
    the best F1 over all decisions on dev, so that scores on dev are slightly optimistic.
    """

    name = "multi-label"
    title = "multi-label classifier"
    model_class = FunnelForSequenceClassification
    problem_type = "multi_label_classification"

    @classmethod
    def encoder(cls, task: Task) -> Encoder:
        return TextEncoder(task.label_ids, multi_label=True)

    def count_classes(self, dataset: Dataset) -> np.ndarray:
        counts: np.ndarray = dataset.labels.sum(0)
        return counts

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        targets = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(outputs.float(), targets, reduction="none")
        return losses.mean() if self.class_weights is None else (self.class_weights * losses).mean()

    def mean_loss(self, results: Tensor, dataset: Dataset) -> float:
        return float(F.binary_cross_entropy_with_logits(results, torch.from_numpy(dataset.labels)))

    @property
    def decision_threshold(self) -> float:
        """A class is predicted if its probability is higher."""
        return DEFAULT_THRESHOLD if self.threshold is None else self.threshold

    def tune(self, results: Tensor, dataset: Dataset) -> None:
        self.threshold = best_threshold(results.double().sigmoid().numpy(), dataset.labels)

    @classmethod
    def metric_functions(cls, labels: Sequence[str]) -> Mapping[str, Metric]:
        return MULTI_LABEL

    def predict(self, results: Tensor, dataset: Dataset) -> np.ndarray:
        """Whether each class applies, [n, k]."""
        predicted: np.ndarray = results.double().sigmoid().numpy() > self.decision_threshold
        return predicted

    def analyze(self, results: Tensor, dataset: Dataset, tokenizer: FunnelTokenizer) -> dict[str, Any]:
        names, labels, predictions = self.labels, dataset.labels > 0, self.predict(results, dataset)
        targets = torch.from_numpy(dataset.labels).double()
        losses = F.binary_cross_entropy_with_logits(results.double(), targets, reduction="none").sum(1).numpy()
        cost = np.where((predictions == labels).all(1), -np.inf, np.nan_to_num(losses, nan=np.inf))
        counts = ClassCounts((labels & predictions).sum(0), labels.sum(0), predictions.sum(0))
        probabilities = results.double().sigmoid().numpy()

        def describe(row: int) -> dict[str, Any]:
            label, predicted = (
                ", ".join(names[k] for k in np.flatnonzero(flags[row])) or "(none)" for flags in (labels, predictions)
            )
            return {"label": label, "predicted": predicted}

        return {
            "examples": len(dataset),
            "unit": "decision",
            "threshold": self.decision_threshold,
            **score_classes(names, counts, average_all=True),
            "calibration": calibrate(probabilities.reshape(-1), labels.reshape(-1)),
            "mistakes": list_mistakes(cost, describe, dataset, tokenizer),
        }


def best_threshold(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the highest F1 over all decisions; halfway between two probabilities. 0.5 without positive labels.

    Args:
        probabilities, labels: [n, k].
    """
    order = np.argsort(-probabilities, axis=None, kind="stable")
    sorted_probabilities, positive = probabilities.reshape(-1)[order], labels.reshape(-1)[order] > 0
    n_positive = int(positive.sum())
    if n_positive == 0 or not np.isfinite(sorted_probabilities).all():
        return DEFAULT_THRESHOLD
    f1 = 2 * positive.cumsum() / (np.arange(1, len(order) + 1) + n_positive)  # if all up to here are predicted
    below = np.append(sorted_probabilities[1:], 0.0)
    f1[sorted_probabilities == below] = 0  # no threshold separates equal probabilities
    best = int(f1.argmax())
    return float((sorted_probabilities[best] + below[best]) / 2)

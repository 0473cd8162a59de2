"""One class per text or pair of texts."""

from collections.abc import Mapping, Sequence
from functools import partial
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
from funnel.problems.error_analysis import compare_predictions, confusion_counts, count_confusions, list_mistakes, score_classes
from funnel.problems.metrics import CLASSIFICATION, Metric, f1_of_class, macro_f1


class Classification(Problem):
    """One class per text or pair of texts; cross-entropy."""

    name = "classification"
    title = "text classifier"
    model_class = FunnelForSequenceClassification

    @classmethod
    def encoder(cls, task: Task) -> Encoder:
        return TextEncoder(task.label_ids)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs.float(), labels, label_smoothing=self.label_smoothing, reduction="none")
        return losses.mean() if self.class_weights is None else (self.class_weights[labels] * losses).mean()

    def mean_loss(self, results: Tensor, dataset: Dataset) -> float:
        return float(F.cross_entropy(results, torch.from_numpy(dataset.labels).long()))

    @classmethod
    def metric_functions(cls, labels: Sequence[str]) -> Mapping[str, Metric]:
        of_classes = {f"f1 ({label})": partial(f1_of_class, i) for i, label in enumerate(labels)}
        return {**CLASSIFICATION, **of_classes, "f1 (macro)": macro_f1}  # the mean even if a class is called "macro"

    def predict(self, results: Tensor, dataset: Dataset) -> np.ndarray:
        """Label ids, [n]."""
        return results.argmax(1).numpy()

    def analyze(self, results: Tensor, dataset: Dataset, tokenizer: FunnelTokenizer) -> dict[str, Any]:
        names, labels = self.labels, dataset.labels
        predictions, probabilities, cost, calibration = compare_predictions(results, labels)
        confusion = count_confusions(labels, predictions, len(names))

        def describe(row: int) -> dict[str, Any]:
            label, prediction = labels[row], predictions[row]
            probability = [float(probabilities[row, label]), float(probabilities[row, prediction])]
            return {"label": names[label], "predicted": names[prediction], "probability": probability}

        return {
            "examples": len(dataset),
            "unit": dataset.unit,
            "labels": names,
            "confusion": confusion.tolist(),
            **score_classes(names, confusion_counts(confusion)),
            "calibration": calibration,
            "mistakes": list_mistakes(cost, describe, dataset, tokenizer),
        }

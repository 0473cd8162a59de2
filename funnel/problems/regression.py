"""One score per text or pair of texts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from funnel.data.dataset import Dataset
from funnel.data.encoding import Encoder, TextEncoder
from funnel.data.tasks import Task
from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.heads import FunnelForSequenceClassification
from funnel.problems.base import Problem
from funnel.problems.error_analysis import MAX_POINTS, list_mistakes
from funnel.problems.metrics import REGRESSION, Metric, rmse


class Regression(Problem):
    """One score per text or pair of texts; squared error.

    In training, errors are divided by the labels' standard deviation (`FunnelConfig.label_std`) before they are squared, so
    that gradients do not depend on the labels' scale; in evaluation, the loss is in the labels' own units.
    """

    name = "regression"
    title = "regression"
    model_class = FunnelForSequenceClassification
    problem_type = "regression"
    has_classes = False

    @classmethod
    def outputs(cls, task: Task) -> Sequence[str]:
        return ["score"]

    @classmethod
    def encoder(cls, task: Task) -> Encoder:
        return TextEncoder(None)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return ((outputs.float().squeeze(1) - labels) / self.config.label_std).square().mean()

    def mean_loss(self, results: Tensor, dataset: Dataset) -> float:
        return rmse(self.predict(results, dataset), dataset.labels) ** 2

    @classmethod
    def metric_functions(cls, labels: Sequence[str]) -> Mapping[str, Metric]:
        return REGRESSION

    def predict(self, results: Tensor, dataset: Dataset) -> np.ndarray:
        """Scores, [n]."""
        return results[:, 0].numpy()

    def analyze(self, results: Tensor, dataset: Dataset, tokenizer: FunnelTokenizer) -> dict[str, Any]:
        labels, predictions = dataset.labels, results[:, 0].double().numpy()
        cost = np.nan_to_num(np.abs(predictions - labels), nan=np.inf)
        shown = np.unique(np.linspace(0, len(labels) - 1, min(MAX_POINTS, len(labels))).astype(int))

        def describe(row: int) -> dict[str, Any]:
            return {"label": float(labels[row]), "predicted": float(predictions[row])}

        return {
            "examples": len(dataset),
            "points": [[float(labels[row]), float(predictions[row])] for row in shown],
            "mistakes": list_mistakes(cost, describe, dataset, tokenizer),
        }

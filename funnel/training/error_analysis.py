"""What a model gets wrong on its dev set: which classes it takes for which, and the texts that cost it most.

Every checkpoint `best/` of a run has it as evaluation.json, so that a report needs neither the data nor the model.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from funnel.data.dataset import Dataset
from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.config import FunnelConfig

FILE = "evaluation.json"
COSTLIEST = 20  # texts that are kept
LETTERS = 600  # of each
POINTS = 500  # of a regression's scatter plot


def analyze_errors(logits: Tensor, dataset: Dataset, config: FunnelConfig, tokenizer: FunnelTokenizer) -> dict[str, Any]:
    """What evaluation.json has.

    Args:
        logits: [examples, num_labels], those of the dataset.

    Returns:
        `texts`, how many there are. Of a classifier `labels`, their names; `confusion`, [labels, labels], texts by label
        (rows) and prediction; and `mistakes`, the wrong predictions with the largest loss: `text` (as the tokenizer gives it
        back), `label`, `predicted`, `probability` of both. Of a regression `points`, pairs of score and prediction evenly
        drawn; `mistakes` with the largest differences, with `label` and `predicted`.
    """
    labels = dataset.labels
    found: dict[str, Any] = {"texts": len(labels)}
    if config.problem_type == "regression":
        scores = logits[:, 0].double().numpy()
        cost = np.nan_to_num(np.abs(scores - labels), nan=np.inf)
        shown = np.unique(np.linspace(0, len(labels) - 1, min(POINTS, len(labels))).astype(int))
        found["points"] = [[float(labels[i]), float(scores[i])] for i in shown]
        rows: list[dict[str, Any]] = [{"label": float(labels[i]), "predicted": float(scores[i])} for i in _costliest(cost)]
    else:
        names = [config.id2label[i] for i in range(config.num_labels)]
        predicted = logits.argmax(1).numpy()
        losses = torch.nn.functional.cross_entropy(logits.double(), torch.from_numpy(labels).long(), reduction="none").numpy()
        cost = np.where(predicted == labels, -np.inf, np.nan_to_num(losses, nan=np.inf))
        confusion = np.zeros((len(names), len(names)), dtype=int)
        np.add.at(confusion, (labels, predicted), 1)
        found |= {"labels": names, "confusion": confusion.tolist()}
        probabilities = logits.double().softmax(1).numpy()
        rows = [
            {
                "label": names[labels[i]],
                "predicted": names[predicted[i]],
                "probability": [float(probabilities[i, labels[i]]), float(probabilities[i, predicted[i]])],
            }
            for i in _costliest(cost)
        ]
    found["mistakes"] = [
        {"text": tokenizer.decode(dataset.ids(int(i)))[:LETTERS], **row} for i, row in zip(_costliest(cost), rows, strict=True)
    ]
    return found


def _costliest(cost: np.ndarray) -> np.ndarray:
    """Numbers of the rows that cost most, in that order; without those of -inf."""
    order = np.argsort(-cost, kind="stable")[:COSTLIEST]
    return order[cost[order] > -np.inf]

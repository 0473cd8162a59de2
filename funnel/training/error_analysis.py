"""Error analysis on dev: the confusion matrix and the examples with the largest loss.

Saved with a run's best checkpoint, so that a report needs neither the data nor the model.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from funnel.data.dataset import Dataset
from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.config import FunnelConfig

EVALUATION_FILE = "evaluation.json"
MAX_MISTAKES = 20
MAX_TEXT_LENGTH = 600  # characters of a mistake's text
MAX_POINTS = 500  # in the scatter plot of a regression task


def analyze_errors(logits: Tensor, dataset: Dataset, config: FunnelConfig, tokenizer: FunnelTokenizer) -> dict[str, Any]:
    """Returns the content of evaluation.json.

    Args:
        logits: [n_examples, n_outputs].

    Returns:
        `examples`: number of examples. `mistakes`: those with the largest loss (classification: among the wrong ones), with
        `text` (decoded from the ids), `label` and `predicted`. For a classifier also `labels` (names), `confusion`
        ([label, prediction] counts), and `probability` (of the label, of the prediction) for each mistake. For a
        regression `points`, pairs of label and prediction from evenly spaced rows.
    """
    if config.problem_type == "regression":
        results, cost, mistakes = _analyze_regression(logits, dataset.labels)
    else:
        results, cost, mistakes = _analyze_classification(logits, dataset.labels, config)
    order = np.argsort(-cost, kind="stable")[:MAX_MISTAKES]
    worst = [int(row) for row in order if cost[row] > -np.inf]
    texts = [tokenizer.decode(dataset.input_ids(row))[:MAX_TEXT_LENGTH] for row in worst]
    results["mistakes"] = [{"text": text, **mistakes(row)} for text, row in zip(texts, worst, strict=True)]
    return {"examples": len(dataset.labels), **results}


def _analyze_regression(logits: Tensor, labels: np.ndarray) -> tuple[dict[str, Any], np.ndarray, Any]:
    predictions = logits[:, 0].double().numpy()
    cost = np.nan_to_num(np.abs(predictions - labels), nan=np.inf)
    shown = np.unique(np.linspace(0, len(labels) - 1, min(MAX_POINTS, len(labels))).astype(int))

    def mistake(row: int) -> dict[str, Any]:
        return {"label": float(labels[row]), "predicted": float(predictions[row])}

    return {"points": [[float(labels[row]), float(predictions[row])] for row in shown]}, cost, mistake


def _analyze_classification(logits: Tensor, labels: np.ndarray, config: FunnelConfig) -> tuple[dict[str, Any], np.ndarray, Any]:
    names = [config.id2label[i] for i in range(config.num_labels)]
    predictions = logits.argmax(1).numpy()
    probabilities = logits.double().softmax(1).numpy()
    losses = cross_entropy(logits.double(), torch.from_numpy(labels).long(), reduction="none").numpy()
    cost = np.where(predictions == labels, -np.inf, np.nan_to_num(losses, nan=np.inf))
    confusion = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(confusion, (labels, predictions), 1)

    def mistake(row: int) -> dict[str, Any]:
        label, prediction = labels[row], predictions[row]
        probability = [float(probabilities[row, label]), float(probabilities[row, prediction])]
        return {"label": names[label], "predicted": names[prediction], "probability": probability}

    return {"labels": names, "confusion": confusion.tolist()}, cost, mistake

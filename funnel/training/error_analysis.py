"""Error analysis on a labeled dataset: the confusion matrix and the examples with the largest loss.

A run saves the analysis of dev with its best checkpoint, so that a report needs neither the data nor the model.
"""

from collections.abc import Mapping, Sequence
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
        ([label, prediction] counts), `classes` (`label`, `precision`, `recall`, `f1` and number of `examples` of each class; 0
        where undefined), and `probability` (of the label, of the prediction) for each mistake. For a regression `points`,
        pairs of label and prediction from evenly spaced rows.
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

    return {"labels": names, "confusion": confusion.tolist(), "classes": _class_scores(names, confusion)}, cost, mistake


def _class_scores(names: Sequence[str], confusion: np.ndarray) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each class. confusion [label, prediction]."""
    correct, actual, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    precision, recall = correct / np.maximum(predicted, 1), correct / np.maximum(actual, 1)
    f1 = 2 * correct / np.maximum(actual + predicted, 1)
    return [
        {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "examples": int(n)}
        for name, p, r, f, n in zip(names, precision, recall, f1, actual, strict=True)
    ]


def single_class_warning(evaluation: Mapping[str, Any]) -> str | None:
    """A warning if a classifier predicts the same class for all examples while their labels differ, else None.

    Args:
        evaluation: from `analyze_errors`; empty if there is none.
    """
    confusion = np.array(evaluation.get("confusion", []), ndmin=2)  # [label, prediction]
    predicted, actual = np.flatnonzero(confusion.sum(0)), confusion.sum(1)
    if len(predicted) != 1 or np.count_nonzero(actual) == 1:
        return None
    name, share = evaluation["labels"][predicted[0]], actual[predicted[0]] / actual.sum()
    return f"predicts {name!r} for all {actual.sum():,} examples of dev; its accuracy, {share:.1%}, is that class's frequency"

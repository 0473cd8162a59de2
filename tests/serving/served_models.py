"""Small random text classifiers to serve."""

from pathlib import Path
from typing import Any

import torch
from conftest import tiny_config

from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.heads import FunnelForSequenceClassification

WORDS = "a good bad film the very not witty dull plot"
TEXTS = ["", "a good film", "the very bad film " * 30, "good", "witty , not dull", "plot " * 60]


def save_classifier(folder: Path, **changes: Any) -> Path:
    """Writes a checkpoint of a random classifier of up to 64 tokens, whose predictions differ clearly between texts."""
    torch.manual_seed(0)
    tokenizer = FunnelTokenizer.train([WORDS] * 5)
    labels = {0: "negative", 1: "neutral", 2: "positive"}
    config = tiny_config(**{"vocab_size": tokenizer.vocab_size, "num_decoder_layers": 0, "id2label": labels,
                            "model_max_length": 64, **changes})  # fmt: skip
    model = FunnelForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def save_regression(folder: Path) -> Path:
    """The same with scores instead of classes."""
    changes = {"id2label": {0: "score"}, "problem_type": "regression", "label_mean": 3.0, "label_std": 2.0}
    return save_classifier(folder, text_columns=("first", "second"), **changes)

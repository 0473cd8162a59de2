"""Run folders of every kind of problem, with random models, as train.py writes them."""

import json
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_config

from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.heads import MODELS
from funnel.problems.registry import PROBLEMS

LABELS = ["no", "a|b `c`", "<b>yes</b>"]
TAGS = ["O", "B-x", "I-x"]
# By kind: names of the outputs, text columns, metrics.
KINDS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "classification": (LABELS, ["text"], ["accuracy", "f1 (macro)"]),
    "regression": (["score"], ["first", "second"], ["pearson", "spearman", "rmse"]),
    "multi-label": (LABELS, ["text"], ["f1 (micro)", "f1 (macro)", "subset accuracy"]),
    "token-labels": (TAGS, ["0"], ["f1", "precision", "recall", "accuracy"]),
    "answer-spans": (["start", "end"], ["question", "context"], ["f1", "exact"]),
    "multiple-choice": (["choice"], ["context", "question"], ["accuracy"]),
}
COMMAND = (
    "/home/me/venv/bin/python3 /home/me/funnel/train.py --data /home/me/clients/train.csv --dev=../secret/dev.csv "
    "--weights none --out runs/mine --text-column a/b"
)


def write_trained_run(folder: Path, kind: str = "classification", changes: dict[str, Any] | None = None, **settings) -> Path:
    """Writes a run with three evaluations, of which the second is the best by any metric; returns the folder.

    Args:
        changes: of the model's config.
        settings: of run.json.
    """
    names, columns, metrics = KINDS[kind]
    problem, torch_state = PROBLEMS[kind], torch.random.get_rng_state()
    torch.manual_seed(0)
    tokenizer = FunnelTokenizer.train(["who wrote it ? it was written by ada lovelace . a text , another bob"] * 5)
    has_decoder = problem.model_class.has_decoder
    threshold = {"multi-label": 0.4, "answer-spans": -0.5}.get(kind)
    config = tiny_config(
        vocab_size=tokenizer.vocab_size,
        num_decoder_layers=int(has_decoder),
        id2label=dict(enumerate(names)),
        problem_type=problem.problem_type,
        model_max_length=24,
        text_columns=tuple(columns),
        decision_threshold=threshold,
    ).replace(**(changes or {}))
    model = MODELS[problem.model_class.__name__](config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    torch.random.set_rng_state(torch_state)
    model.save_pretrained(folder / "best")
    tokenizer.save(folder / "best")
    values = {
        "task": "custom", "data": "/home/me/clients/train.csv", "columns": columns, "metrics": metrics, "weights": "none",
        "labels": names if problem.has_classes else None, "blocks": config.layout, "init": "identity", "keep": "spread",
        "layout_plan": None, "epochs": 1.5, "steps": 30, "lr": 2e-4, "batch_size": 8, "max_length": 24, "warmup": 0.1,
        "weight_decay": 0.01, "seed": 3, "grad_accum": 1, "dtype": "fp32", "train_examples": 1234, "dev_examples": 100,
        "mean_tokens": 9.3, "max_query_length": 8, "doc_stride": 8, "digests": {"train": "ab"}, **settings,
    }  # fmt: skip
    arguments = {"data": values["data"], "dev": "/home/me/secret/dev.csv", "weights": values["weights"]}
    record = {"version": 3, "command": COMMAND, "settings": values, "arguments": arguments}
    (folder / "run.json").write_text(json.dumps(record))
    with (folder / "metrics.jsonl").open("w") as log:
        for step, quality in ((10, 0.3), (20, 0.8123456), (30, 0.5)):
            scores = {name: 1 - quality if name == "rmse" else quality for name in metrics}
            log.write(json.dumps({"step": step, "split": "train", "loss": 1.0, "lr": 1e-4, "examples_per_second": 8}) + "\n")
            log.write(json.dumps({"step": step, "split": "dev", "loss": 1 - quality, **scores}) + "\n")
    return folder

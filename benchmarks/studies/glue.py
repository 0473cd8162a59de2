"""What turning a BERT into a Funnel module_costs: tasks with their defaults, ours beside the source model itself.

    python -m benchmarks.glue --data GLUE --source MINILM --tasks cola rte stsb --seeds 0 1 2 --jobs 2
    python -m benchmarks.glue --report

"ours" is `train.py` on the converted weights, in a process of its own. "source" is transformers' BertForSequenceClassification
with the same weights, batches, optimizer, schedule and number format. A line of --results a run; runs that have one are
skipped. Prints a Markdown table: mean and range over seeds of the last evaluation, in percent.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.studies.results import run_all
from funnel.data.dataset import Dataset, encode
from funnel.data.tasks import get_task, locate_files
from funnel.data.tokenizer import FunnelTokenizer
from funnel.io import read_json
from funnel.training import optim as training
from funnel.training.metrics import METRICS

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "glue.jsonl"


class Result(NamedTuple):
    """The last evaluation of a run; `weights` is the name of the source's folder, `blocks` the layout, or "BERT"."""

    weights: str
    task: str
    blocks: str
    seed: int
    epochs: float
    scores: dict[str, float]


def run(weights: str, task: str, blocks: str, seed: int, epochs: float, args: argparse.Namespace) -> Result:
    """One run, of the source model where `blocks` is "BERT"."""
    scores = source(task, seed, epochs, args) if blocks == "BERT" else ours(task, blocks, seed, epochs, args)
    return Result(weights, task, blocks, seed, epochs, scores)


def ours(task: str, blocks: str, seed: int, epochs: float, args: argparse.Namespace) -> dict[str, float]:
    """A run of train.py."""
    folder = args.out / f"{task}_{blocks.replace(',', '-')}_seed{seed}"
    if folder.exists():
        shutil.rmtree(folder)
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--task",
        task,
        "--data",
        str(args.data),
        "--weights",
        str(args.converted),
    ]
    command += ["--blocks", blocks, "--seed", str(seed), "--epochs", str(epochs), "--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment(args))
    steps = read_json(folder / "run.json")["settings"]["steps"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in lines if line["split"] == "dev" and line["step"] == steps)
    shutil.rmtree(folder)
    return {name: last[name] for name in get_task(task).metrics}


def source(task: str, seed: int, epochs: float, args: argparse.Namespace) -> dict[str, float]:
    """The source model, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.glue", "--train-source", task, "--seeds", str(seed), "--epochs", str(epochs)]
    command += ["--data", str(args.data), "--source", str(args.source)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment(args), cwd=ROOT)
    scores: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return scores


def environment(args: argparse.Namespace) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs)), **os.environ}


def train_source(name: str, seed: int, epochs: float, args: argparse.Namespace) -> dict[str, float]:
    """train.py's loop around transformers' BERT."""
    import transformers

    task, device = locate_files(get_task(name), args.data), torch.device("cpu")
    training.set_seed(seed)
    training.keep_freed_memory()
    tokenizer = FunnelTokenizer.load(args.source)
    train_set, dev_set = (encode(task.files[s], task.label_ids, tokenizer, task.max_length) for s in ("train", "dev"))
    outputs = 1 if task.labels is None else len(task.labels)
    model = transformers.BertForSequenceClassification.from_pretrained(args.source, num_labels=outputs).train()
    dtype = training.choose_dtype(None, device, model.config.hidden_size)
    steps_per_epoch = -(-len(train_set) // task.batch_size)
    total = max(1, round(steps_per_epoch * epochs))
    optimizer = torch.optim.AdamW(groups(model), lr=task.learning_rate, eps=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.linear_warmup_decay(total, 0.1))
    step = 0
    while step < total:
        for index in train_set.training_batches(task.batch_size, seed, step // steps_per_epoch):
            with training.autocast(device, dtype):
                logits = logits_of(model, train_set, index)
            training.loss_function(logits, train_set.batch(index).labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            step += 1
            if step == total:
                break
    model.eval()
    predicted = torch.empty(len(dev_set), outputs)
    with torch.no_grad(), training.autocast(device, dtype):
        for index in dev_set.evaluation_batches(64):
            predicted[torch.from_numpy(index)] = logits_of(model, dev_set, index).float()
    answers = (predicted[:, 0] if task.labels is None else predicted.argmax(1)).numpy()
    return {metric: METRICS[metric](answers, dev_set.labels) for metric in task.metrics}


def logits_of(model: Any, dataset: Dataset, index: Any) -> torch.Tensor:
    batch = dataset.batch(index)
    types = batch.token_type_ids.clone()
    types[:, 0] = 0  # BERT has no type of its own for [cls]
    logits: torch.Tensor = model(batch.input_ids, batch.attention_mask, types).logits
    return logits


def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """As training.param_groups, by BERT's names."""
    plain = [p for n, p in model.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
    decayed = [p for n, p in model.named_parameters() if not (n.endswith("bias") or "LayerNorm" in n)]
    return [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]


def table(results: list[Result]) -> str:
    """Markdown, a line a task and layout."""
    groups: dict[tuple[str, str, float], list[Result]] = {}
    for result in sorted(results, key=lambda r: (r.task, r.epochs, r.blocks != "BERT", r.blocks, r.seed)):
        groups.setdefault((result.task, result.blocks, result.epochs), []).append(result)
    lines = [
        "| task | model | epochs | seeds | last evaluation on dev, mean (lowest to highest) |",
        "|---|---|---|---|---|",
    ]
    for (task, blocks, epochs), runs in groups.items():
        cells = []
        for name in runs[0].scores:
            values = [run.scores[name] * 100 for run in runs]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{name} {statistics.mean(values):.1f}{spread}")
        model = "the source, a BERT" if blocks == "BERT" else f"ours, {blocks}"
        lines.append(f"| {get_task(task).title} | {model} | {epochs:g} | {len(runs)} | {', '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["cola", "rte", "stsb"])
    parser.add_argument("--data", type=Path, help="folder with a folder a task, as CoLA and SST-2")
    parser.add_argument("--source", type=Path, help="folder of a BERT as transformers saves it")
    parser.add_argument("--models", nargs="+", default=["BERT", "2,2,2"], help="layouts, and BERT for the source itself")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, help="(default: the task's)")
    parser.add_argument("--out", type=Path, default=Path("runs/glue"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of what runs came to (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="start no run; report those that are done")
    parser.add_argument("--train-source", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train_source:
        print(json.dumps(train_source(args.train_source, args.seeds[0], args.epochs, args)))
        return
    done = [Result(**json.loads(line)) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    if not args.report:
        args.converted = args.out / "converted"
        if not args.converted.exists():
            command = [sys.executable, str(ROOT / "convert_weights.py"), str(args.source), str(args.converted)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        asked = [
            (args.source.name, task, blocks, seed, args.epochs or get_task(task).epochs)
            for seed in args.seeds for task in args.tasks for blocks in args.models
        ]  # fmt: skip
        missing = [key for key in asked if key not in {result[:5] for result in done}]
        done += run_all(lambda key: run(*key, args), missing, args.jobs, args.results)
    print(table(done))


if __name__ == "__main__":
    main()

"""Tokens, answers and choices: Funnel layouts compared with the BERT itself, fine-tuned by transformers' Trainer.

    python -m benchmarks.studies.problems --task wnut17 --data WNUT17 --source MINILM --jobs 2
    python -m benchmarks.studies.problems --task squad --data dev-v1.1.json.xz --source MINILM --seeds 0
    python -m benchmarks.studies.problems --task race --data data/squad-choices --source MINILM --seeds 0
    python -m benchmarks.studies.problems --report

The model BERT is transformers' BertFor..., with its data collator, Trainer, AdamW and linear schedule. All other models are
layouts of the same weights, trained with train.py's loss, batches, optimizer and schedule. Both sides have the same rows,
number of epochs, batch size, learning rate, warmup, weight decay, clipping, dtype and allocator setting (train.py's), and their
outputs are decoded and scored by the same functions. For squad, the data is one file, of which a tenth of the articles is the
dev set. Each run is a separate process; times are processor time, which other processes on the machine hardly change. Results
are appended to --results; runs that are already stored there are skipped. Needs the extra bench.
"""

import argparse
import json
import math
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies.fit import CPU, Recipe, fit
from benchmarks.studies.results import describe_scores, read_results, run_all, run_module
from funnel.data.dataset import IGNORED, Dataset
from funnel.data.spans import END, START
from funnel.data.tasks import Task
from funnel.errors import format_list
from funnel.problems.base import Problem
from funnel.problems.registry import PROBLEMS, encode_split
from funnel.problems.task_args import DEFAULT_DEV_SHARE, TaskArgs, load_task
from funnel.training.device import autocast, keep_freed_memory, set_seed
from funnel.training.evaluate import BATCH_SIZE, predict
from funnel.training.loss import LossArgs
from funnel.weights.build import BuiltModel, WeightsArgs, build_task_model

RESULTS = Path(__file__).with_name("problems.jsonl")
BERT = "BERT"  # in place of a layout, for the source model
WARMUP = 0.1  # share of the steps, as in `fit`
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Setting:
    """Hyperparameters of a task, for all models.

    Attributes:
        head: what transformers' class for BERT is called, after "Bert".
    """

    epochs: float
    batch_size: int
    lr: float
    max_length: int
    head: str


SETTINGS = {
    "wnut17": Setting(4, 16, 5e-5, 128, "ForTokenClassification"),
    "squad": Setting(1, 16, 5e-5, 256, "ForQuestionAnswering"),
    "race": Setting(2, 8, 5e-5, 192, "ForMultipleChoice"),
}
MODELS = (BERT, "6", "4,2", "3,3", "2,2,2")


class Run(NamedTuple):
    """What identifies a run.

    Attributes:
        weights: name of the source's folder.
        model: blocks, or `BERT`.
    """

    weights: str
    task: str
    model: str
    seed: int
    epochs: float


class Result(NamedTuple):
    """A run and what it measured.

    Attributes:
        scores: on dev, by metric; for race by level and metric, such as "high accuracy".
        minutes: processor time of training, summed over threads.
        rows_per_second: rows of the dev sets per second of processor time; a row is a sentence, a window or a question.
        memory_mib: peak resident memory of the process, including libraries.
    """

    weights: str
    task: str
    model: str
    seed: int
    epochs: float
    scores: dict[str, float]
    minutes: float
    rows_per_second: float
    memory_mib: float

    @property
    def run(self) -> Run:
        return Run(*self[:5])


class Data(NamedTuple):
    """A task's encoded sets.

    Attributes:
        dev_sets: by what their metrics begin with, such as "high "; "" if there is only one.
    """

    train_set: Dataset
    dev_sets: dict[str, Dataset]


# --- runs -------------------------------------------------------------------------------------------------------------


def start(run: Run, options: argparse.Namespace) -> Result:
    """Trains and evaluates one model in a separate process."""
    command = ["benchmarks.studies.problems", "--run", json.dumps(run)]
    command += ["--data", str(options.data), "--source", str(options.source)]
    print("+", run, file=sys.stderr, flush=True)
    return Result(*run_module(command, options.jobs))


def train_and_score(run: Run, data_path: Path, source: Path) -> Result:
    """Trains and evaluates one model in this process."""
    keep_freed_memory()  # as train.py does; also for transformers, which it makes faster
    setting = SETTINGS[run.task]
    task = load_task(TaskArgs(data=data_path) if data_path.is_file() else TaskArgs(task=run.task, data=data_path))
    set_seed(run.seed)  # for the new head
    built = build_task_model(WeightsArgs(str(source), None if run.model == BERT else run.model), task, setting.max_length)
    data = load_data(task, built, setting.max_length)
    problem = PROBLEMS[task.problem](built.model.config)
    problem.prepare(data.train_set, LossArgs())
    recipe = Recipe(setting.batch_size, run.epochs, setting.lr, run.seed, problem)
    if run.model == BERT:
        del built
        trainer = hf_trainer(data, recipe, setting.head, source)
        train: Callable[[], Any] = trainer.train
        evaluate = partial(hf_predict, trainer, problem=problem)
    else:
        built.calibrate(data.train_set)
        train = partial(fit, built.model, data.train_set, recipe)
        evaluate = partial(funnel_predict, built, recipe=recipe)
    started = time.process_time()
    train()
    trained = time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results = {level: evaluate(dev_set) for level, dev_set in data.dev_sets.items()}
    seconds = time.process_time() - trained
    scores: dict[str, float] = {}
    for level, dev_set in data.dev_sets.items():
        scores |= {level + name: score for name, score in problem.score(results[level], dev_set, task.metrics).items()}
    n_rows = sum(len(dev_set) for dev_set in data.dev_sets.values())
    return Result(*run, scores, (trained - started) / 60, n_rows / seconds, memory)


def load_data(task: Task, built: BuiltModel, max_length: int) -> Data:
    """The encoded training and dev sets."""
    levels = {split: split.removeprefix("dev_") + " " for split in task.files if split.startswith("dev_")}
    levels = levels or {split: "" for split in task.files if split == "dev"}
    train_set = encode_split(task, "train", built.tokenizer, max_length)
    dev_sets = {level: encode_split(task, split, built.tokenizer, max_length) for split, level in levels.items()}
    if not dev_sets:
        train_set, dev_sets[""] = train_set.split(DEFAULT_DEV_SHARE, seed=0)
    return Data(train_set, dev_sets)


def funnel_predict(built: BuiltModel, dataset: Dataset, recipe: Recipe) -> Tensor:
    """What the problem keeps of the outputs."""
    with autocast(CPU, recipe.dtype):
        return predict(built.model, recipe.problem, dataset)


# --- transformers -----------------------------------------------------------------------------------------------------


def hf_trainer(data: Data, recipe: Recipe, head: str, source: Path) -> Any:
    """transformers' Trainer for the task; writes nothing.

    Args:
        head: as in `Setting`.
    """
    import transformers

    options = {"num_labels": len(recipe.problem.labels)} if head == "ForTokenClassification" else {}
    model = getattr(transformers, f"Bert{head}").from_pretrained(source, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    collators = {
        "ForTokenClassification": transformers.DataCollatorForTokenClassification,
        "ForQuestionAnswering": transformers.DataCollatorWithPadding,
        "ForMultipleChoice": transformers.DataCollatorForMultipleChoice,
    }
    n_steps = max(1, round(math.ceil(len(data.train_set) / recipe.batch_size) * recipe.epochs))
    arguments = transformers.TrainingArguments(
        tempfile.gettempdir(), max_steps=n_steps, per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=BATCH_SIZE, learning_rate=recipe.lr, warmup_steps=round(WARMUP * n_steps),
        weight_decay=WEIGHT_DECAY, seed=recipe.seed, bf16=recipe.dtype == "bf16", use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=hf_rows(data.train_set, head), data_collator=collators[head](tokenizer)
    )


def hf_rows(dataset: Dataset, head: str) -> list[dict[str, Any]]:
    """The rows of a dataset in the form that transformers' data collators expect."""
    return [hf_row(dataset, row, head) for row in range(len(dataset))]


def hf_row(dataset: Dataset, row: int, head: str) -> dict[str, Any]:
    """One row."""
    batch = dataset.batch(np.array([row]))
    types = batch.token_type_ids.clamp(max=1) * (batch.token_type_ids != 2)  # BERT's [CLS] has type 0
    lengths = batch.attention_mask[0].sum(-1)
    values: dict[str, Any] = {
        "input_ids": batch.input_ids[0].tolist(),
        "token_type_ids": types[0].tolist(),
        "attention_mask": batch.attention_mask[0].tolist(),
    }
    if head == "ForMultipleChoice":
        values = {name: [ids[:n] for ids, n in zip(lists, lengths.tolist(), strict=True)] for name, lists in values.items()}
        return {**values, "label": int(batch.labels[0])}
    if head == "ForTokenClassification":
        return {**values, "labels": batch.labels[0].tolist()}
    labels = batch.labels[0].where(batch.labels[0] != IGNORED, 0)
    positions = {name: int((labels & bit).argmax()) for name, bit in (("start_positions", START), ("end_positions", END))}
    return {**values, **positions}


def hf_predict(trainer: Any, dataset: Dataset, problem: Problem) -> Tensor:
    """What the problem keeps of the Trainer's predictions."""
    head = type(trainer.model).__name__.removeprefix("Bert")
    output = trainer.predict(hf_rows(dataset, head)).predictions
    logits = torch.from_numpy(np.stack(output, -1) if isinstance(output, tuple) else output).float()
    if logits.dim() < 3:
        return logits
    width = dataset.longest
    logits = torch.nn.functional.pad(logits[:, :width], (0, 0, 0, max(0, width - logits.shape[1])))
    rows = np.split(np.arange(len(logits)), range(BATCH_SIZE, len(logits), BATCH_SIZE))
    return torch.cat([problem.collect(logits[part], dataset.batch(part, width).labels) for part in rows])


# --- report -----------------------------------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    """A Markdown table with one line per task and model: mean and standard error over seeds, in percent; costs."""
    columns = "weights", "task", "epochs", "model", "seeds", "dev", "training, minutes", "rows per second", "memory, MiB"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for key in dict.fromkeys((r.weights, r.task, r.epochs, r.model) for r in results):
        group = [r for r in results if (r.weights, r.task, r.epochs, r.model) == key]
        weights, task, epochs, model = key
        metrics = [name for name in group[0].scores if not name.endswith("loss")]
        scores = ", ".join(describe_scores(name, [r.scores[name] for r in group]) for name in metrics)
        minutes = statistics.mean(r.minutes for r in group)
        rate = statistics.mean(r.rows_per_second for r in group)
        memory = statistics.mean(r.memory_mib for r in group)
        shown = model if model == BERT else f"`{model}`"
        costs = f"{minutes:.1f} | {rate:.0f} | {memory:.0f}"
        lines.append(f"| {weights} | {task} | {epochs:g} | {shown} | {len(group)} | {scores} | {costs} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=SETTINGS)
    parser.add_argument("--data", type=Path, help="the task's folder, or for squad a file")
    parser.add_argument("--source", type=Path, help="folder of a BERT in transformers' format")
    parser.add_argument("--models", nargs="+", default=MODELS, help=f"layouts or {BERT} (default: {format_list(MODELS)})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, help="epochs (default: the task's)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="print the stored results and start no run")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)  # do this run, in this process
    options = parser.parse_args()
    if not (options.report or options.run) and None in (options.task, options.data, options.source):
        parser.error("--task, --data and --source are required, except with --report")
    return options


def main() -> None:
    options = parse_arguments()
    if options.run:
        print(json.dumps(train_and_score(Run(*options.run), options.data, options.source)))
        return
    results = [Result(**values) for values in read_results(options.results)]
    if not options.report:
        epochs = options.epochs or SETTINGS[options.task].epochs
        requested = [
            Run(options.source.name, options.task, model, seed, epochs) for seed in options.seeds for model in options.models
        ]
        done = {result.run for result in results}
        missing = [run for run in requested if run not in done]
        results += run_all(partial(start, options=options), missing, options.jobs, options.results)
    print(table(results))


if __name__ == "__main__":
    main()

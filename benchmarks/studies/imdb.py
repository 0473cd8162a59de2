"""Do more blocks help on long texts? Fine-tunes a BERT on movie reviews of up to 512 tokens, in many layouts.

    python -m benchmarks.studies.imdb --data IMDB --source MINILM --jobs 2
    python -m benchmarks.studies.imdb --report --plot docs/long_texts.png

Six layers in 1 to 6 blocks, and 3, 5 and 7 blocks of two layers (with new identity layers). Every run trains on the same
--reviews reviews of the training set and is evaluated on the same --test-reviews of the test set, half of each class. The
classifier reads [CLS], as in train.py; with --pooling mean, the mean of the last block instead. Each run is a separate process.
Results are appended to --results; runs that are already stored there are skipped. --data is a folder with train.jsonl.xz and
test.jsonl.xz (fields id, text, label); the reviews are written to --out in the official folder structure.
"""

import argparse
import json
import lzma
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from torch import Tensor, nn

from benchmarks.studies.fit import Recipe, fit, score
from benchmarks.studies.results import MINILM, read_results, run_all, run_module
from funnel.data.tasks import get_task, locate_files
from funnel.model.config import FunnelConfig
from funnel.model.flops import total_flops
from funnel.model.heads import FunnelForSequenceClassification
from funnel.problems.classification import Classification
from funnel.problems.registry import encode_split
from funnel.training.device import set_seed
from funnel.weights.build import WeightsArgs, build_task_model
from funnel.weights.load import read_source_config

RESULTS = Path(__file__).with_name("imdb.jsonl")
SIX_LAYERS = ("6", "3,3", "2,2,2", "2,2,1,1", "2,1,1,1,1", "1,1,1,1,1,1")
BLOCKS_OF_TWO = ("2,2,2", "2,2,2,2,2", "2,2,2,2,2,2,2")
LENGTH = 512
LEARNING_RATE = 5e-5
CLASSES = {0: "neg", 1: "pos"}


class Run(NamedTuple):
    """What identifies a run.

    Attributes:
        weights: name of the source's folder.
        layout: blocks.
        pooling: what the classifier reads, "cls" or "mean".
        reviews, test_reviews: numbers of training and test reviews.
    """

    weights: str
    layout: str
    pooling: str
    seed: int
    reviews: int
    test_reviews: int
    epochs: float


class Result(NamedTuple):
    """A run and what it measured.

    Attributes:
        accuracy: on the test reviews.
        minutes: processor time of training, summed over threads.
        memory_mib: peak resident memory of the process.
    """

    weights: str
    layout: str
    pooling: str
    seed: int
    reviews: int
    test_reviews: int
    epochs: float
    accuracy: float
    minutes: float
    memory_mib: float

    @property
    def run(self) -> Run:
        return Run(*self[:7])


@dataclass(frozen=True)
class Settings:
    """What all runs share; see the command line."""

    source: Path
    folders: Path
    jobs: int


# --- data -------------------------------------------------------------------------------------------------------------


def write_folders(data: Path, folders: Path, reviews: dict[str, int]) -> None:
    """Writes some reviews as the official folders, unless this has been done before.

    Args:
        data: has train.jsonl.xz and test.jsonl.xz.
        reviews: number of reviews by split, half of each class.
    """
    for split, count in reviews.items():
        if (folders / split).exists():
            continue
        with lzma.open(data / f"{split}.jsonl.xz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        order = np.random.default_rng(0).permutation(len(rows))
        for label, name in CLASSES.items():
            folder = folders / split / name
            folder.mkdir(parents=True)
            for i in [i for i in order if rows[i]["label"] == label][: count // 2]:
                (folder / f"{i}.txt").write_text(rows[i]["text"], encoding="utf-8")


# --- runs -------------------------------------------------------------------------------------------------------------


class MeanPooled(nn.Module):
    """A text classifier that reads the mean of the last block's positions instead of [CLS]."""

    def __init__(self, model: FunnelForSequenceClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        states, mask = self.model.encode(input_ids, attention_mask, token_type_ids)
        weights = mask.unsqueeze(2).to(states[-1])
        logits: Tensor = self.model.classifier((states[-1] * weights).sum(1) / weights.sum(1))
        return logits


def run_model(run: Run, settings: Settings) -> Result:
    """Trains one model in a separate process."""
    command = ["benchmarks.studies.imdb", "--train", json.dumps(run), "--source", str(settings.source)]
    command += ["--folders", str(settings.folders)]
    print("+", run, file=sys.stderr, flush=True)
    return Result(*run_module(command, settings.jobs))


def train(run: Run, settings: Settings) -> Result:
    """Trains one model in this process."""
    task = locate_files(get_task("imdb"), settings.folders)
    set_seed(run.seed)  # for the classifier
    built = build_task_model(WeightsArgs(str(settings.source), run.layout), task, LENGTH)
    train_set, test_set = (encode_split(task, split, built.tokenizer, LENGTH) for split in ("train", "dev"))
    built.calibrate(train_set)
    model = MeanPooled(cast(FunnelForSequenceClassification, built.model)) if run.pooling == "mean" else built.model
    recipe = Recipe(task.batch_size, run.epochs, LEARNING_RATE, run.seed, Classification(built.model.config))
    started = time.process_time()
    fit(model, train_set, recipe)
    minutes = (time.process_time() - started) / 60
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    accuracy = score(model, test_set, ("accuracy",), recipe)["accuracy"]
    return Result(*run, accuracy, minutes, memory)


# --- report -----------------------------------------------------------------------------------------------------------


def relative_flops(source: FunnelConfig, layout: str) -> float:
    """FLOPs of a text of 512 tokens, relative to the source's layout."""
    return total_flops(source.replace(blocks=layout), LENGTH) / total_flops(source, LENGTH)


def group_results(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    """Results by layout and pooling, in the order of the lists at the top, other layouts last."""
    order = list(dict.fromkeys(SIX_LAYERS + BLOCKS_OF_TWO + tuple(result.layout for result in results)))
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in sorted(results, key=lambda r: (order.index(r.layout), r.pooling, r.seed)):
        groups.setdefault((result.layout, result.pooling), []).append(result)
    return groups


def table(results: list[Result], costs: dict[str, float]) -> str:
    """A Markdown table with one line per layout and pooling.

    Args:
        costs: relative FLOPs by layout.
    """
    lines = [
        "| layout | classifier reads | accuracy, mean (seeds) | FLOPs | processor minutes | memory, MiB |",
        "|---" * 6 + "|",
    ]
    for (layout, pooling), group in group_results(results).items():
        percents = [100 * result.accuracy for result in group]
        accuracy = f"{statistics.mean(percents):.1f} ({', '.join(f'{p:.1f}' for p in percents)})"
        minutes, memory = (statistics.mean(getattr(r, name) for r in group) for name in ("minutes", "memory_mib"))
        reads = "[CLS]" if pooling == "cls" else "mean"
        lines.append(f"| {layout} | {reads} | {accuracy} | {costs[layout]:.2f} | {minutes:.1f} | {memory:.0f} |")
    return "\n".join(lines)


def plot(results: list[Result], costs: dict[str, float], path: Path) -> None:
    """Draws accuracy against FLOPs, training time and memory; the numbers are the numbers of blocks."""
    import matplotlib.pyplot as plt

    groups = {layout: group for (layout, pooling), group in group_results(results).items() if pooling == "cls"}
    axes_values = {
        "FLOPs relative to 6 layers without pooling": costs,
        "training, processor minutes": {k: statistics.mean(r.minutes for r in group) for k, group in groups.items()},
        "peak memory, MiB": {k: statistics.mean(r.memory_mib for r in group) for k, group in groups.items()},
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    for axis, (label, values) in zip(axes, axes_values.items(), strict=True):
        for layouts, style, title in ((SIX_LAYERS, "o-", "six layers"), (BLOCKS_OF_TWO, "s--", "blocks of two layers")):
            shown = [layout for layout in layouts if layout in groups]
            accuracies = [100 * statistics.mean(r.accuracy for r in groups[layout]) for layout in shown]
            axis.plot([values[layout] for layout in shown], accuracies, style, label=title)
            for layout, accuracy in zip(shown, accuracies, strict=True):
                axis.annotate(str(layout.count(",") + 1), (values[layout], accuracy), textcoords="offset points", xytext=(4, 4))
        for layout, group in groups.items():
            axis.plot([values[layout]] * len(group), [100 * r.accuracy for r in group], "k.", markersize=3)
        axis.set(xlabel=label)
    axes[0].set(ylabel="accuracy on test reviews, %")
    axes[0].legend()
    figure.savefig(path, dpi=110)


# --- command line -----------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.jsonl.xz and test.jsonl.xz")
    parser.add_argument("--source", type=Path, help="folder of a BERT with 6 layers")
    parser.add_argument("--layouts", nargs="+", default=list(dict.fromkeys(SIX_LAYERS + BLOCKS_OF_TWO)))
    parser.add_argument("--pooling", choices=("cls", "mean"), default="cls", help="what the classifier reads")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--reviews", type=int, default=5000, help="training reviews (default: %(default)s)")
    parser.add_argument("--test-reviews", type=int, default=5000, help="test reviews (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/imdb"), help="folder for the reviews (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="print the stored results and start no run")
    parser.add_argument("--plot", type=Path, help="image to write (needs the extra plot)")
    parser.add_argument("--train", type=json.loads, help=argparse.SUPPRESS)  # do this run, in this process
    parser.add_argument("--folders", type=Path, help=argparse.SUPPRESS)  # its reviews
    args = parser.parse_args()
    if not args.report and (args.source is None or (args.data is None and not args.train)):
        parser.error("--data and --source are required, except with --report")
    return args


def main() -> None:
    args = parse_arguments()
    if args.train:
        print(json.dumps(train(Run(*args.train), Settings(args.source, args.folders, 1))))
        return
    results = [Result(**values) for values in read_results(args.results)]
    if not args.report:
        folders = args.out / f"aclImdb-{args.reviews}-{args.test_reviews}"
        write_folders(args.data, folders, {"train": args.reviews, "test": args.test_reviews})
        settings = Settings(args.source, folders, args.jobs)
        requested = [
            Run(args.source.name, layout, args.pooling, seed, args.reviews, args.test_reviews, args.epochs)
            for seed in args.seeds
            for layout in args.layouts
        ]
        done = {result.run for result in results}
        results += run_all(
            partial(run_model, settings=settings), [r for r in requested if r not in done], args.jobs, args.results
        )
    source = MINILM if args.source is None else read_source_config(args.source)
    costs = {layout: relative_flops(source, layout) for layout in {result.layout for result in results}}
    print(table(results, costs))
    if args.plot:
        plot(results, costs, args.plot)


if __name__ == "__main__":
    main()

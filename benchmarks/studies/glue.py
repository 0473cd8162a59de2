"""Where to pool: GLUE scores of a BERT in several layouts, compared with the BERT itself.

    python -m benchmarks.studies.glue --data GLUE --source MINILM --epochs 4 --lr 5e-5 --jobs 2
    python -m benchmarks.studies.glue --report

Funnel runs are train.py on the converted weights. BERT runs are transformers' BertForSequenceClassification with the same
batches, optimizer, schedule and dtype. Each run is a separate process. Results are appended to --results; runs that are
already stored there are skipped. Prints a Markdown table: mean and standard error over seeds of the last evaluation, in
percent, and FLOPs at 128 tokens relative to transformers' BERT, which computes all positions of its last layer. `5,1` is the
same function as `6`, and `4,1,1` the same as `4,2`: a last block of one layer computes [CLS] from the unpooled sequence.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.studies.fit import Recipe, fit, score
from benchmarks.studies.results import MINILM, ROOT, describe_scores, read_results, run_all, run_module, train
from funnel.data.tasks import get_task, locate_files
from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.config import FunnelConfig
from funnel.model.flops import count_flops, total_flops
from funnel.model.heads import FunnelBaseModel
from funnel.problems.metrics import LOWER_IS_BETTER
from funnel.problems.registry import PROBLEMS, encode_split
from funnel.training.device import set_seed

RESULTS = Path(__file__).with_name("glue.jsonl")
BERT = "BERT"  # in place of a layout, for the source model
MODELS = (BERT, "6", "4,2", "3,3", "2,2,2", "1,5")
LENGTH = 128  # tokens of the text whose FLOPs are counted


class Run(NamedTuple):
    """What identifies a run.

    Attributes:
        weights: name of the source's folder.
        blocks: layout, or `BERT`.
    """

    weights: str
    task: str
    blocks: str
    seed: int
    epochs: float
    lr: float


class Result(NamedTuple):
    """A run with the scores of its last evaluation, by metric."""

    weights: str
    task: str
    blocks: str
    seed: int
    epochs: float
    lr: float
    scores: dict[str, float]

    @property
    def run(self) -> Run:
        return Run(*self[:6])


@dataclass(frozen=True)
class Settings:
    """What all runs share.

    Attributes:
        data: folder with a folder per task.
        source: folder of the BERT.
        out: folder for runs and converted weights.
        jobs: number of runs at a time.
    """

    data: Path
    source: Path
    out: Path
    jobs: int

    @property
    def converted(self) -> Path:
        return self.out / "converted"


# --- runs -------------------------------------------------------------------------------------------------------------


def convert_source(settings: Settings) -> None:
    """Converts the BERT, unless this has been done before."""
    if not settings.converted.exists():
        command = [sys.executable, str(ROOT / "convert_weights.py"), str(settings.source), str(settings.converted)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def run_model(run: Run, settings: Settings) -> Result:
    """Trains one model in a separate process."""
    scores = run_bert(run, settings) if run.blocks == BERT else run_funnel(run, settings)
    return Result(*run, scores)


def run_funnel(run: Run, settings: Settings) -> dict[str, float]:
    """Runs train.py on the converted weights."""
    folder = settings.out / f"{run.task}_{run.blocks.replace(',', '-')}_seed{run.seed}"
    arguments = ["--task", run.task, "--data", str(settings.data), "--weights", str(settings.converted)]
    arguments += ["--blocks", run.blocks, "--seed", str(run.seed), "--epochs", str(run.epochs)]
    arguments += ["--lr", str(run.lr), "--eval-every", "1000000"]  # only after the last step
    scores = train(arguments, folder, settings.jobs)
    shutil.rmtree(folder)
    return select_scores(scores, run.task)


def run_bert(run: Run, settings: Settings) -> dict[str, float]:
    """Runs `train_bert` in a separate process."""
    command = ["benchmarks.studies.glue", "--train-bert", json.dumps(run)]
    command += ["--data", str(settings.data), "--source", str(settings.source)]
    scores: dict[str, float] = run_module(command, settings.jobs)
    return scores


def select_scores(scores: dict[str, float], task: str) -> dict[str, float]:
    """The task's metrics that GLUE reports: all except rmse, which is not a percentage."""
    return {metric: scores[metric] for metric in get_task(task).metrics if metric not in LOWER_IS_BETTER}


class BertClassifier(nn.Module):
    """transformers' BERT with the interface of a funnel model."""

    def __init__(self, folder: Path, num_labels: int) -> None:
        import transformers

        super().__init__()
        transformers.logging.set_verbosity_error()
        self.bert: Any = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Computes logits, [b, num_labels]."""
        bert_types = token_type_ids.masked_fill(token_type_ids == 2, 0)  # BERT has no separate type for [CLS]
        logits: Tensor = self.bert(input_ids, attention_mask, bert_types).logits
        return logits


def train_bert(run: Run, settings: Settings) -> dict[str, float]:
    """Trains transformers' BERT as train.py trains a Funnel; returns the scores on dev."""
    task = locate_files(get_task(run.task), settings.data)
    tokenizer = FunnelTokenizer.load(settings.source)
    train_set, dev_set = (encode_split(task, split, tokenizer, task.max_length) for split in ("train", "dev"))
    set_seed(run.seed)  # for the classifier
    kind = PROBLEMS[task.problem]
    outputs = dict(enumerate(kind.outputs(task)))
    model = BertClassifier(settings.source, len(outputs))
    config = FunnelConfig(d_model=model.bert.config.hidden_size, id2label=outputs, problem_type=kind.problem_type)
    recipe = Recipe(task.batch_size, run.epochs, run.lr, run.seed, kind(config))
    fit(model, train_set, recipe)
    return select_scores(score(model, dev_set, task.metrics, recipe), run.task)


# --- report -----------------------------------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    """A Markdown table with one line per task, model and settings."""
    groups: dict[tuple[str, float, float, str], list[Result]] = {}
    for result in sorted(results, key=lambda r: (r.task, r.epochs, r.lr, -relative_flops(r.blocks), r.blocks, r.seed)):
        groups.setdefault((result.task, result.epochs, result.lr, result.blocks), []).append(result)
    lines = [
        "| task | epochs | lr | model | FLOPs | seeds | last evaluation on dev, mean ± standard error |",
        "|---|---|---|---|---|---|---|",
    ]
    for (task, epochs, lr, blocks), group in groups.items():
        scores = ", ".join(describe_scores(metric, [run.scores[metric] for run in group]) for metric in group[0].scores)
        flops = f"{relative_flops(blocks):.2f}"
        model = "BERT" if blocks == BERT else f"`{blocks}`"
        lines.append(f"| {get_task(task).title} | {epochs:g} | {lr:g} | {model} | {flops} | {len(group)} | {scores} |")
    return "\n".join(lines)


@lru_cache
def relative_flops(blocks: str) -> float:
    """FLOPs of a classifier at `LENGTH` tokens, relative to transformers' BERT, which computes its whole last layer."""
    with torch.device("meta"):
        bert = FunnelBaseModel(MINILM).eval()
    return 1.0 if blocks == BERT else total_flops(MINILM.replace(blocks=blocks), LENGTH) / count_flops(bert, LENGTH, 1)[""]


# --- command line -----------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["cola", "rte", "mrpc", "stsb"])
    parser.add_argument("--data", type=Path, help="folder with a folder per task, such as CoLA and SST-2")
    parser.add_argument("--source", type=Path, help="folder of a BERT in transformers' format")
    parser.add_argument("--models", nargs="+", default=MODELS, help="layouts, and BERT for the source itself")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, help="(default: the task's)")
    parser.add_argument("--lr", type=float, help="learning rate (default: the task's)")
    parser.add_argument("--out", type=Path, default=Path("runs/glue"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="print the stored results and start no run")
    parser.add_argument("--train-bert", type=json.loads, help=argparse.SUPPRESS)  # do this run, in this process
    args = parser.parse_args()
    if not args.report and (args.data is None or args.source is None):
        parser.error("--data and --source are required, except with --report")
    return args


def main() -> None:
    args = parse_arguments()
    settings = Settings(args.data, args.source, args.out, args.jobs)
    if args.train_bert:
        print(json.dumps(train_bert(Run(*args.train_bert), settings)))
        return
    results = [Result(**values) for values in read_results(args.results)]
    if not args.report:
        convert_source(settings)
        requested = [
            Run(
                args.source.name,
                task,
                blocks,
                seed,
                args.epochs or get_task(task).epochs,
                args.lr or get_task(task).learning_rate,
            )
            for seed in args.seeds
            for task in args.tasks
            for blocks in args.models
        ]
        done = {result.run for result in results}
        missing = [run for run in requested if run not in done]
        results += run_all(partial(run_model, settings=settings), missing, args.jobs, args.results)
    print(table(results))


if __name__ == "__main__":
    main()

"""The benefit of pretraining: pretrains models with pretrain.py, then fine-tunes each, before and after pretraining.

    python -m benchmarks.studies.pretraining --recipe minilm --teacher MINILM --corpus wiki.txt.xz reviews.jsonl.xz --data GLUE
    python -m benchmarks.studies.pretraining --recipe electra --corpus wiki.txt.xz --data GLUE --plot docs/electra.png
    python -m benchmarks.studies.pretraining --recipe tiny --data GLUE
    python -m benchmarks.studies.pretraining --report

Needs no network: corpus, teacher and data are local. Interrupted runs are resumed, stored results are not repeated. Results are
appended to --results; those of MiniLM's layouts before distillation are also in glue.jsonl, with the same settings. The
pretrained weights are written to OUT/NAME.safetensors in float16, in pieces of at most 16 MB (NAME.safetensors.0, .1, ...; join
them with cat). The recipe tiny only fine-tunes the package's model, which benchmarks.studies.tiny makes.
"""

import argparse
import importlib.util
import math
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.studies.results import ROOT, describe_scores, environment, read_results, run_all, train
from funnel.data.tasks import get_task
from funnel.model.checkpoint import load_checkpoint, save_weights
from funnel.options import TINY
from funnel.problems.metrics import LOWER_IS_BETTER
from funnel.weights.build import LEARNING_RATES

RESULTS = Path(__file__).with_name("pretraining.jsonl")
PIECE = 16 * 10**6  # bytes
BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class Recipe:
    """How to pretrain and to fine-tune.

    Attributes:
        models: arguments of pretrain.py by name; None for weights of this name that exist already.
        steps: default number of steps.
        lr: learning rate of fine-tuning.
        tasks: to fine-tune on.
        epochs: of fine-tuning; SST-2, which is larger, is trained for one.
    """

    models: dict[str, list[str] | None]
    steps: int
    lr: float
    tasks: tuple[str, ...] = ("cola", "stsb", "sst2")
    epochs: float = 4.0


# Texts of GLUE are short. The learning rate was chosen by the training loss after 200 steps, of 1e-4 and 3e-4.
DISTILL = "--objective distill --states pooled --decoder-layers 0 --pairs --max-length 64 --batch-size 64 --lr 3e-4".split()
# Chosen for an hour or two on two cores.
ELECTRA = "--blocks 2,2,2 --d-model 192 --vocab 8192 --max-length 64 --batch-size 64".split()
RECIPES = {
    "minilm": Recipe(
        {name: [*DISTILL, "--blocks", name] for name in ("2,2,2", "4,2")}, 1_500, 5e-5, ("cola", "stsb", "rte", "mrpc", "sst2")
    ),
    "electra": Recipe({"electra": ELECTRA}, 4_000, 1e-4),
    TINY: Recipe({TINY: None}, 2_000, LEARNING_RATES[TINY]),
}


class Run(NamedTuple):
    """What identifies a fine-tuning run.

    Attributes:
        model: a key of `Recipe.models`.
        stage: `BEFORE` or `AFTER` pretraining.
        steps: of pretraining.
    """

    recipe: str
    model: str
    stage: str
    steps: int
    task: str
    seed: int


class Result(NamedTuple):
    """A run with the scores of its last evaluation, by metric."""

    recipe: str
    model: str
    stage: str
    steps: int
    task: str
    seed: int
    scores: dict[str, float]


def pretrain(name: str, arguments: list[str], steps: int, out: Path) -> None:
    """Runs pretrain.py in a separate process, or resumes it."""
    folder = out / name
    if (folder / "run.json").exists():
        arguments = ["--resume"]
    command = [sys.executable, str(ROOT / "pretrain.py"), *arguments, "--steps", str(steps), "--out", str(folder)]
    print("+ " + " ".join(command[1:]), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, env=environment(1))


def pretrain_model(model: str, arguments: list[str], steps: int, options: argparse.Namespace) -> None:
    """Pretrains a model of a recipe, writes its weights in pieces, and writes the network before pretraining if needed."""
    name = model_name(model)
    arguments = ["--corpus", *options.corpus, *options.arguments.split(), *arguments]
    if options.teacher:
        arguments += ["--teacher", options.teacher]
    if BEFORE in options.stages:
        pretrain(f"{name}_before", [*arguments, "--lr", "1e-30"], 1, options.out)
    pretrain(name, arguments, steps, options.out)
    write_pieces(options.out / name / "last", options.out / f"{name}.safetensors")
    if options.plot:
        plot(options.out / name, options.plot)


def fine_tune(run: Run, options: argparse.Namespace) -> Result:
    """Runs train.py on a model."""
    recipe, name = RECIPES[run.recipe], model_name(run.model)
    epochs = 1.0 if run.task == "sst2" else recipe.epochs
    weights = options.out / (name if run.stage == AFTER else f"{name}_before") if recipe.models[run.model] else run.model
    arguments = ["--task", run.task, "--data", str(options.data), "--weights", str(weights), "--seed", str(run.seed)]
    arguments += ["--epochs", str(epochs), "--lr", str(recipe.lr), "--eval-every", "1000000"]  # only after the last step
    scores = train(arguments, options.out / f"{name}_{run.stage}_{run.task}_{run.seed}", options.jobs)
    metrics = [metric for metric in get_task(run.task).metrics if metric not in LOWER_IS_BETTER]
    return Result(*run, {metric: scores[metric] for metric in metrics})


def plot(run: Path, path: Path) -> None:
    """Draws the losses of ELECTRA's generator and discriminator.

    Args:
        run: folder of the run.
        path: of the image.
    """
    import matplotlib.pyplot as plt

    log = read_results(run / "metrics.jsonl")
    figure, columns = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axes, model in zip(columns, ("generator", "discriminator"), strict=True):
        for split, style in (("train", "-"), ("dev", "o")):
            lines = [line for line in log if line["split"] == split]
            label = {"train": "training", "dev": "held-out text"}[split]
            axes.plot([line["step"] for line in lines], [line[f"{model}_loss"] for line in lines], style, ms=4, label=label)
        axes.set(xlabel="step", ylabel=f"loss of the {model}")
        axes.grid(alpha=0.3)
    columns[0].legend()
    figure.savefig(path, dpi=110)


def model_name(model: str) -> str:
    """The name of a model as part of a path."""
    return model.replace(",", "-")


def write_pieces(checkpoint: Path, path: Path) -> None:
    """Writes a checkpoint's weights in float16, in pieces of at most `PIECE` bytes."""
    weights = load_checkpoint(checkpoint).weights
    save_weights(path, {name: tensor.to(torch.float16) for name, tensor in weights.items()})
    data = path.read_bytes()
    for number in range(math.ceil(len(data) / PIECE)):
        path.with_name(f"{path.name}.{number}").write_bytes(data[number * PIECE : (number + 1) * PIECE])
    path.unlink()


def table(results: list[Result]) -> str:
    """A Markdown table with one line per model and task."""
    lines = ["| model | steps | task | seeds | before | after |", "|---|---|---|---|---|---|"]
    groups = dict.fromkeys((r.recipe, r.model, r.steps, r.task) for r in results)
    for key in groups:
        group = [r for r in results if (r.recipe, r.model, r.steps, r.task) == key]
        cells = [describe([r.scores for r in group if r.stage == stage]) for stage in (BEFORE, AFTER)]
        recipe, model, steps, task = key
        seeds = len({r.seed for r in group})
        lines.append(f"| {recipe} `{model}` | {steps:,} | {get_task(task).title} | {seeds} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def describe(scores: list[dict[str, float]]) -> str:
    """Mean and standard error of the main metric, in percent."""
    if not scores:
        return ""
    metric = next(iter(scores[0]))
    return describe_scores(metric, [score[metric] for score in scores])


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES)
    parser.add_argument("--corpus", nargs="+", help="text files")
    parser.add_argument("--teacher", help="folder of the model to distill")
    parser.add_argument("--data", type=Path, help="folder with a folder per GLUE task")
    parser.add_argument("--steps", type=int, help="(default: the recipe's)")
    parser.add_argument("--tasks", nargs="+", help="(default: the recipe's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", choices=(BEFORE, AFTER), default=[BEFORE, AFTER], help="what to fine-tune")
    parser.add_argument("--arguments", default="", help="further arguments of pretrain.py, as one string")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/RECIPE)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="fine-tuning runs at a time (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="image of ELECTRA's losses to write (needs the extra plot)")
    parser.add_argument("--report", action="store_true", help="print the stored results and start no run")
    options = parser.parse_args()
    if not options.report and None in (options.recipe, options.data):
        parser.error("--recipe and --data are required, except with --report")
    if not options.report and options.recipe != TINY and not options.corpus:
        parser.error(f"--corpus is required for the recipe {options.recipe}")
    if not options.report and options.recipe == "minilm" and not options.teacher:
        parser.error("--teacher is required for the recipe minilm")
    if options.plot and (options.recipe != "electra" or importlib.util.find_spec("matplotlib") is None):
        parser.error("--plot is for the recipe electra, and needs the extra plot")
    options.out = options.out or Path("runs") / str(options.recipe)
    return options


def main() -> None:
    options = parse_arguments()
    results = [Result(**values) for values in read_results(options.results)]
    if not options.report:
        recipe = RECIPES[options.recipe]
        steps = options.steps or recipe.steps
        for model, arguments in recipe.models.items():
            if arguments:
                pretrain_model(model, arguments, steps, options)
        requested = [
            Run(options.recipe, model, stage, steps, task, seed)
            for seed in options.seeds
            for task in options.tasks or recipe.tasks
            for model in recipe.models
            for stage in options.stages
            if (task != "sst2" or seed == options.seeds[0]) and (stage == AFTER or recipe.models[model])
        ]
        done = {Run(*result[:6]) for result in results}
        missing = [run for run in requested if run not in done]
        results += run_all(partial(fine_tune, options=options), missing, options.jobs, options.results)
    print(table(results))


if __name__ == "__main__":
    main()

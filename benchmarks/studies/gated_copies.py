"""Identity layers compared with gated copies as the start of new layers.

    python -m benchmarks.studies.gated_copies --data GLUE/SST-2 --weights MINILM --layouts 2,2,2,2,2,2,2 4,4,4,4,4,4,4

A gated copy computes y = (1 - c) x + c f(x), where f is a copy of an old layer and c rises from 0 to 1 over the first tenth of
training (as in arXiv 2305.02869), so that it starts as the identity and ends as an ordinary layer. In a layer that pools, x is
the pooled sequence. Prints the accuracy on dev after training as a Markdown table, one line per layout and start.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.studies.fit import Recipe, fit, score
from funnel.data.tasks import Task
from funnel.model.heads import FunnelPreTrainedModel
from funnel.problems.registry import PROBLEMS, encode_split
from funnel.problems.task_args import TaskArgs, load_task
from funnel.training.device import set_seed
from funnel.weights.build import BuiltModel, WeightsArgs, build_task_model
from funnel.weights.load import read_source_config, resolve
from funnel.weights.surgery import make_plan, write_plan

STARTS = ("identity", "gated copy")
GATED_SHARE = 0.1  # of all steps


class Gate:
    """The gate of all new layers of a model; opens with the number of forward passes in training."""

    def __init__(self, model: FunnelPreTrainedModel, layers: list[nn.Module], steps: int) -> None:
        self.step, self.steps = 0, steps
        model.register_forward_pre_hook(self.count)
        for layer in layers:
            layer.register_forward_hook(self.mix)

    def count(self, model: nn.Module, _: Any) -> None:
        self.step += model.training

    def mix(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        c = min(1.0, (self.step - 1) / self.steps)
        return (1 - c) * inputs[0] + c * output


def build(args: argparse.Namespace, layout: str, start: str, task: Task) -> tuple[BuiltModel, list[nn.Module]]:
    """A classifier in a layout, and its new layers."""
    source = read_source_config(resolve(args.weights))
    plan = make_plan(source, source.replace(blocks=layout))
    weights = WeightsArgs(args.weights, layout)
    if start == "gated copy":
        path = args.out / f"{layout}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_plan(path, [row if row.start == "keep" else row._replace(start="copy") for row in plan])
        weights = WeightsArgs(args.weights, layout, layout_plan=path)
    built = build_task_model(weights, task, task.max_length)
    return built, [built.model.encoder.layers(row.block)[row.layer] for row in plan if row.start != "keep"]


def train(args: argparse.Namespace, layout: str, start: str, seed: int) -> float:
    """Trains one model; returns its accuracy on dev."""
    task = load_task(TaskArgs(task="sst2", data=args.data))
    set_seed(seed)  # for the classifier
    built, new = build(args, layout, start, task)
    train_set, dev_set = (encode_split(task, split, built.tokenizer, task.max_length) for split in ("train", "dev"))
    built.calibrate(train_set)
    recipe = Recipe(task.batch_size, args.epochs, args.lr, seed, PROBLEMS[task.problem](built.model.config))
    if start == "gated copy":
        Gate(built.model, new, max(1, round(GATED_SHARE * args.epochs * len(train_set) / task.batch_size)))
    fit(built.model, train_set, recipe)
    return score(built.model, dev_set, ("accuracy",), recipe)["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with SST-2 (default: download it)")
    parser.add_argument("--weights", required=True, help="hub id or folder")
    parser.add_argument("--layouts", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=float, default=0.25)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gated"), help="folder of the layout plans (default: %(default)s)"
    )
    args = parser.parse_args()
    print("| layout | new layers | accuracy, mean (seeds) |\n|---|---|---|")
    for layout in args.layouts:
        for start in STARTS:
            percents = [100 * train(args, layout, start, seed) for seed in args.seeds]
            print(
                f"| {layout} | {start} | {statistics.mean(percents):.1f} ({', '.join(f'{p:.1f}' for p in percents)}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""Effect of more blocks on accuracy: fine-tunes one model in many layouts, with copied or identity layers and several seeds.

    python -m benchmarks.studies.layouts --data GLUE/SST-2 --weights weights/minilm --epochs 0.25 1 --jobs 2
    python -m benchmarks.studies.layouts --data GLUE/SST-2 --weights weights/minilm --time 5
    python -m benchmarks.studies.layouts --weights minilm --report --epochs 0.25 1 --plot docs/layout_study.png

Each run of train.py is a separate process. Results are appended to --results; runs that are already stored there are skipped,
and interrupted runs are resumed. A layout without new layers is trained once per seed, as "identity". --time measures training
steps of the stored layouts, alternating in one process; the machine should be idle. Prints a Markdown table: accuracy of
the last evaluation (mean over seeds, and each seed's) per number of epochs, FLOPs of a text of --length tokens, and training
minutes per epoch.
"""

import argparse
import itertools
import shutil
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.studies.results import read_results, run_all, train
from funnel.data.batches import Batch
from funnel.io import read_json, write_json
from funnel.model.checkpoint import is_funnel_checkpoint, load_config
from funnel.model.config import FunnelConfig, parse_blocks
from funnel.model.flops import total_flops
from funnel.model.heads import FunnelPreTrainedModel
from funnel.problems.registry import encode_split
from funnel.problems.task_args import TaskArgs, load_task
from funnel.training.device import autocast, choose_dtype, keep_freed_memory
from funnel.training.optim import build_adamw, clip_grad_norm, param_groups
from funnel.weights.build import WeightsArgs, build_task_model
from funnel.weights.load import read_source_config, resolve
from funnel.weights.surgery import make_plan

RESULTS = Path(__file__).with_name("layouts.jsonl")
TIMES = Path(__file__).with_name("layout_times.json")  # seconds of training per text, by layout
LAYOUTS = [",".join([str(n)] * blocks) for n, counts in ((2, (3, 4, 5, 6, 7)), (4, (3, 5, 6, 7))) for blocks in counts]
TIMED_STEPS = 10  # per round of --time


class Run(NamedTuple):
    """What identifies a run.

    Attributes:
        weights: hub id, or the name of a folder without its path.
        init: how new layers start, "identity" or "copy".
    """

    task: str
    weights: str
    lr: float
    layout: str
    init: str
    seed: int
    epochs: float

    @property
    def folder_name(self) -> str:
        weights, layout = self.weights.replace("/", "-"), self.layout.replace(",", "-")
        return f"{self.task}_{weights}_{self.lr:g}_{layout}_{self.init}_seed{self.seed}_{self.epochs:g}"


class Result(NamedTuple):
    """A run with its last accuracy on dev and the FLOPs of a text's forward pass."""

    task: str
    weights: str
    lr: float
    layout: str
    init: str
    seed: int
    epochs: float
    accuracy: float
    flops: float

    @property
    def run(self) -> Run:
        return Run(*self[:7])


@dataclass(frozen=True)
class Settings:
    """What all runs share.

    Attributes:
        data: folder with the task's files; None to download them.
        weights: hub id or folder.
        out: folder of the runs.
        jobs: number of runs at a time.
        length: tokens of the text whose FLOPs are counted.
    """

    data: Path | None
    weights: str
    out: Path
    jobs: int
    length: int


# --- runs -------------------------------------------------------------------------------------------------------------


def run_training(run: Run, settings: Settings) -> Result:
    """Starts or resumes a run of train.py, and deletes its folder after it has ended."""
    folder = settings.out / run.folder_name
    arguments = ["--task", run.task, "--weights", settings.weights, "--blocks", run.layout, "--init", run.init]
    arguments += ["--seed", str(run.seed), "--lr", str(run.lr), "--epochs", str(run.epochs)]
    if settings.data is not None:
        arguments += ["--data", str(settings.data)]
    if is_funnel_checkpoint(folder / "last"):
        arguments.append("--resume")
    accuracy = train(arguments, folder, settings.jobs)["accuracy"]
    batch_size = read_json(folder / "run.json")["settings"]["batch_size"]
    flops = total_flops(load_config(folder / "last"), settings.length, batch_size)
    shutil.rmtree(folder)
    return Result(*run, accuracy, flops)


def has_new_layers(source: FunnelConfig, layout: str) -> bool:
    """Whether a layout has layers that the source does not have."""
    return any(row.start != "keep" for row in make_plan(source, source.replace(blocks=layout)))


def missing_runs(requested: Iterable[Run], results: Iterable[Result], settings: Settings) -> list[Run]:
    """The requested runs that have no result yet, ordered by seed."""
    source = read_source_config(resolve(settings.weights))
    done = {result.run for result in results}
    missing = [run for run in requested if run not in done and (run.init == "identity" or has_new_layers(source, run.layout))]
    return sorted(missing, key=lambda run: (run.seed, run.epochs))


# --- training time ----------------------------------------------------------------------------------------------------


class TimedModel:
    """A layout whose training steps are timed."""

    def __init__(self, model: FunnelPreTrainedModel) -> None:
        self.model = model.train()
        self.device = torch.device("cpu")
        self.dtype = choose_dtype(None, self.device, model.config.d_model)
        self.optimizer = build_adamw(param_groups(model, 0.01), 5e-5)

    def seconds_per_text(self, batches: list[Batch]) -> float:
        """Trains on some batches."""
        started = time.perf_counter()
        for batch in batches:
            with autocast(self.device, self.dtype):
                logits = self.model(**batch.inputs)
            F.cross_entropy(logits.float(), batch.labels).backward()
            clip_grad_norm(self.model, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return (time.perf_counter() - started) / sum(len(batch.labels) for batch in batches)


def time_layouts(layouts: list[str], task_name: str, settings: Settings, rounds: int) -> dict[str, float]:
    """Seconds of training per text for each layout: the median of rounds in which all train on the same batches."""
    keep_freed_memory()
    task = load_task(TaskArgs(task=task_name, data=settings.data))
    built = [build_task_model(WeightsArgs(settings.weights, layout), task, task.max_length) for layout in layouts]
    dataset = encode_split(task, "train", built[0].tokenizer, task.max_length)
    batches = [dataset.batch(rows) for rows in dataset.training_batches(task.batch_size, 0, 0)[:TIMED_STEPS]]
    models = [TimedModel(model) for model, *_ in built]
    measured = []
    for _ in range(rounds + 1):
        measured.append([model.seconds_per_text(batches) for model in models])
        print("milliseconds per text:", ", ".join(f"{s * 1000:.2f}" for s in measured[-1]), flush=True)
    medians = [statistics.median(times) for times in zip(*measured[1:], strict=True)]  # the first round warms up
    return dict(zip(layouts, medians, strict=True))


# --- report -----------------------------------------------------------------------------------------------------------


def table(results: list[Result], minutes: dict[str, float]) -> str:
    """A Markdown table with one line per layout and init.

    Args:
        minutes: training minutes per epoch, by layout; may lack layouts.
    """
    all_epochs = sorted({result.epochs for result in results})
    header = ["layout", "new layers", *(f"epochs: {epochs:g}" for epochs in all_epochs), "MFLOPs per text"]
    header += ["minutes per epoch"] if minutes else []
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for (layout, init), group in group_results(results).items():
        cells = [layout, init]
        cells += [describe_accuracies([r for r in group if r.epochs == epochs]) for epochs in all_epochs]
        cells += [f"{group[0].flops / 1e6:.0f}"]
        if minutes:
            cells.append(f"{minutes[layout]:.1f}" if layout in minutes else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_accuracies(results: list[Result]) -> str:
    """The mean, and each run's accuracy, in percent."""
    percents = [result.accuracy * 100 for result in results]
    return f"{statistics.mean(percents):.1f} ({', '.join(f'{p:.1f}' for p in percents)})" if percents else ""


def group_results(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    """Results by layout and init."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.layout, result.init), []).append(result)
    return groups


def plot(results: list[Result], minutes: dict[str, float], path: Path) -> None:
    """Draws accuracy against FLOPs and against training time, one point per layout and init."""
    import matplotlib.pyplot as plt

    costs = {"MFLOPs per text, forward": {result.layout: result.flops / 1e6 for result in results}}
    if minutes:
        costs["training minutes per epoch"] = minutes
    size = (5 * len(costs), 4)
    figure, axes = plt.subplots(1, len(costs), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, (label, cost) in zip(axes[0], costs.items(), strict=True):
        axis.set(xlabel=label)
        lines: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
        for (layout, init), group in group_results(results).items():
            if layout in cost:
                accuracy = statistics.mean(result.accuracy for result in group) * 100
                point = (cost[layout], accuracy, layout.count(",") + 1)
                lines.setdefault((init, layout.split(",")[0]), []).append(point)
        for (init, layers), points in sorted(lines.items()):
            style = "o-" if init == "identity" else "s--"
            axis.plot([p[0] for p in points], [p[1] for p in points], style, label=f"{init}, {layers} layers per block")
            for x, y, num_blocks in points:
                axis.annotate(str(num_blocks), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes[0, 0].set(ylabel="accuracy on dev, %")
    axes[0, 0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# --- command line -----------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", type=Path, help="folder with the task's files (default: download them)")
    parser.add_argument("--weights", default="funnel-transformer/small", help="hub id or folder; for --report, its name")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    parser.add_argument("--inits", nargs="+", default=["identity", "copy"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--epochs", type=float, nargs="+", default=[1.0], help="(default: 1; the plot shows the first)")
    parser.add_argument("--length", type=int, default=13, help="tokens of a text, for its FLOPs (default: SST-2's mean)")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default: %(default)s)")
    parser.add_argument("--time", type=int, metavar="N", help="time N rounds of training steps instead of training")
    parser.add_argument("--times", type=Path, default=TIMES, help="file of these times (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=67349, help="texts per epoch (default: SST-2's)")
    parser.add_argument("--report", action="store_true", help="print the stored results and start no run")
    parser.add_argument("--plot", type=Path, help="image to write (needs the extra plot)")
    args = parser.parse_args()
    for layout in args.layouts:
        parse_blocks(layout)
    return args


def main() -> None:
    args = parse_arguments()
    settings = Settings(args.data, args.weights, args.out, args.jobs, args.length)
    results = [Result(**{name: values[name] for name in Result._fields}) for values in read_results(args.results)]
    weights = Path(args.weights).name if Path(args.weights).exists() else args.weights
    variants = itertools.product(args.layouts, args.inits, args.seeds, args.epochs)
    requested = [Run(args.task, weights, args.lr, *variant) for variant in variants]
    times = read_json(args.times) if args.times.exists() else {}
    if args.time:
        stored = {result.layout for result in results}
        times |= time_layouts([layout for layout in args.layouts if layout in stored], args.task, settings, args.time)
        write_json(args.times, times)
    elif not args.report:
        missing = missing_runs(requested, results, settings)
        results += run_all(partial(run_training, settings=settings), missing, args.jobs, args.results)

    shown = [result for result in results if result.run in requested]
    shown.sort(key=lambda r: (r.layout[0], len(r.layout), r.init == "copy", r.seed))
    minutes = {layout: seconds * args.texts / 60 for layout, seconds in times.items()}
    print(f"\n{len(shown)} runs are done\n\n{table(shown, minutes)}")
    if args.plot and shown:
        plot([result for result in shown if result.epochs == args.epochs[0]], minutes, args.plot)


if __name__ == "__main__":
    main()

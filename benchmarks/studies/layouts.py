"""Do more blocks help? Fine-tunes one model in many layouts, from copied and from identity layers, with several seeds.

    python -m benchmarks.layout_study --data GLUE/SST-2 --weights weights/minilm --epochs 0.25 1 --jobs 2
    python -m benchmarks.layout_study --data GLUE/SST-2 --weights weights/minilm --time 5
    python -m benchmarks.layout_study --weights minilm --report --epochs 0.25 1 --plot docs/layout_study.png

Each run is `train.py` as a user runs it, in a process of its own. What it came to is a line of --results, which is kept with
the project; runs that have a line there are skipped, and one that broke off is resumed. A layout without new layers is
trained once a seed, as "identity". --time measures training steps of the layouts that have results, in one process, in turn,
on an otherwise idle machine. Prints a Markdown table: accuracy at the last evaluation (the mean over seeds, and each run's) for
every number of --epochs, FLOPs of a text of --length tokens, minutes of training an epoch.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.studies.results import run_all
from funnel.data.dataset import encode
from funnel.data.tasks import load_task
from funnel.io import read_json, write_json
from funnel.model import checkpoint
from funnel.model.config import FunnelConfig, parse_blocks
from funnel.model.flops import total_flops
from funnel.training import optim as training
from funnel.weights.build import build_classifier
from funnel.weights.load import read_weights_from, resolve
from funnel.weights.surgery import make_plan

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "layout_study.jsonl"
TIMES = ROOT / "benchmarks" / "layout_times.json"  # seconds of training a text, by layout
LAYOUTS = [",".join([str(n)] * blocks) for n, counts in ((2, (3, 4, 5, 6, 7)), (4, (3, 5, 6, 7))) for blocks in counts]


class Key(NamedTuple):
    """What makes two runs the same one; `weights` is a hub id, or the name of a folder without its place."""

    task: str
    weights: str
    lr: float
    layout: str
    init: str
    seed: int
    epochs: float


class Result(NamedTuple):
    """What a finished run came to: the fields of its key, and accuracy and FLOPs."""

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
    def key(self) -> Key:
        return Key(*self[:7])


def run(key: Key, args: argparse.Namespace) -> Result:
    """Starts a run, or goes on with it, and returns what it came to."""
    task, weights, lr, layout, init, seed, epochs = key
    folder = args.out / f"{task}_{weights.replace('/', '-')}_{lr:g}_{layout.replace(',', '-')}_{init}_seed{seed}_{epochs:g}"
    command = [sys.executable, str(ROOT / "train.py"), "--task", task, "--weights", args.weights, "--blocks", layout]
    command += ["--data", str(args.data)] if args.data else []
    command += ["--init", init, "--seed", str(seed), "--lr", str(lr), "--epochs", str(epochs), "--out", str(folder)]
    if checkpoint.is_checkpoint(folder / "last"):
        command.append("--resume")
    elif folder.exists():  # it broke off before its first checkpoint
        shutil.rmtree(folder)
    print(f"+ {' '.join(command[1:])}\n", end="", flush=True)
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={"OMP_NUM_THREADS": threads, **os.environ})
    settings = read_json(folder / "run.json")["settings"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in lines if line["split"] == "dev" and line["step"] == settings["steps"])
    flops = total_flops(checkpoint.load_config(folder / "last"), args.length, settings["batch_size"])
    shutil.rmtree(folder)
    return Result(*key, last["accuracy"], flops)


def read_results(path: Path) -> list[Result]:
    """The runs that are done."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [Result(**{name: row[name] for name in Result._fields}) for row in rows]


def is_same(source: FunnelConfig, layout: str, init: str) -> bool:
    """Whether it is the same run as with init "identity", because the layout has no new layers."""
    sizes, repeats = parse_blocks(layout)
    new = source.replace(block_sizes=sizes, block_repeats=repeats)
    return init != "identity" and all(row.start == "keep" for row in make_plan(source, new))


def time_layouts(layouts: list[str], args: argparse.Namespace, steps: int = 10) -> dict[str, float]:
    """Seconds of training a text for each layout: each trains on the same batches, in turn; the median of --time rounds."""
    task, device = load_task(args.task, args.data), torch.device("cpu")
    assert task.labels is not None
    training.keep_freed_memory()
    models, rounds = [], []
    for layout in layouts:
        built = build_classifier(args.weights, list(task.labels.values()), layout)
        dataset = encode(task.files["train"], task.label_ids, built.tokenizer, task.max_length)
        optimizer = torch.optim.AdamW(training.param_groups(built.model.train(), 0.01), lr=args.lr, eps=1e-6, fused=True)
        models.append((built.model, optimizer))
    batches = [dataset.batch(index) for index in dataset.training_batches(task.batch_size, 0, 0)[:steps]]
    dtype = training.choose_dtype(None, device, built.model.config.d_model)
    for _ in range(args.time + 1):
        seconds = []
        for model, optimizer in models:
            started = time.perf_counter()
            for batch in batches:
                with training.autocast(device, dtype):
                    logits = model(batch.input_ids, batch.attention_mask, batch.token_type_ids)
                training.loss_function(logits, batch.labels).backward()
                training.clip_gradients(model)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seconds.append((time.perf_counter() - started) / sum(len(batch.labels) for batch in batches))
        rounds.append(seconds)
        print("milliseconds a text:", ", ".join(f"{s * 1000:.2f}" for s in seconds), flush=True)
    medians = [statistics.median(column) for column in zip(*rounds[1:], strict=True)]  # the first round warms up
    return dict(zip(layouts, medians, strict=True))


def table(results: list[Result], times: dict[str, float], texts: int) -> str:
    """Markdown, a line a layout and init; `texts` are those of an epoch."""
    spans = sorted({r.epochs for r in results})
    heads = ["layout", "new layers", *(f"epochs: {epochs:g}" for epochs in spans), "MFLOPs a text"]
    heads += ["minutes an epoch"] if times else []
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (layout, init), group in grouped(results).items():
        cells = [accuracies([r for r in group if r.epochs == epochs]) for epochs in spans]
        cells = [layout, init, *cells, f"{group[0].flops / 1e6:.0f}"]
        if times:
            cells.append(f"{times[layout] * texts / 60:.1f}" if layout in times else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def accuracies(runs: list[Result]) -> str:
    """In percent: the mean, and each run's."""
    percents = [r.accuracy * 100 for r in runs]
    return f"{statistics.mean(percents):.1f} ({', '.join(f'{p:.1f}' for p in percents)})" if runs else ""


def grouped(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.layout, result.init), []).append(result)
    return groups


def draw(results: list[Result], times: dict[str, float], texts: int, path: Path) -> None:
    """Accuracy against FLOPs and, of layouts that were timed, against time; a point a layout and init."""
    import matplotlib.pyplot as plt

    module_costs = {"MFLOPs a text, forward": {r.layout: r.flops / 1e6 for r in results}}
    if times:
        module_costs["minutes of training an epoch"] = {layout: seconds * texts / 60 for layout, seconds in times.items()}
    figure, axes = plt.subplots(
        1, len(module_costs), figsize=(5 * len(module_costs), 4), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (label, cost) in zip(axes[0], module_costs.items(), strict=True):
        for init, per_block in sorted({(init, layout.split(",")[0]) for layout, init in grouped(results)}):
            points = [
                (cost[layout], statistics.mean(r.accuracy for r in group) * 100, layout.count(",") + 1)
                for (layout, kind), group in grouped(results).items()
                if kind == init and layout.split(",")[0] == per_block and layout in cost
            ]
            line = "o-" if init == "identity" else "s--"
            axis.plot([p[0] for p in points], [p[1] for p in points], line, label=f"{init}, {per_block} layers a block")
            for x, y, blocks in points:
                axis.annotate(str(blocks), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axis.set(xlabel=label)
    axes[0, 0].set(ylabel="accuracy on dev, %")
    axes[0, 0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", default="funnel-transformer/small", help="hub id or folder; for --report its name will do")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    parser.add_argument("--inits", nargs="+", default=["identity", "copy"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--epochs", type=float, nargs="+", default=[1.0], help="(default: 1; the picture shows the first)")
    parser.add_argument("--length", type=int, default=13, help="tokens of a text, for its FLOPs (default: SST-2's mean)")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of what runs came to (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default: %(default)s)")
    parser.add_argument("--time", type=int, metavar="N", help="start no run; time N rounds of training steps of each layout")
    parser.add_argument("--texts", type=int, default=67349, help="of an epoch (default: SST-2's)")
    parser.add_argument("--report", action="store_true", help="start no run; report those that are done")
    parser.add_argument("--plot", type=Path, help="picture to write (needs the extra plot)")
    args = parser.parse_args()
    for layout in args.layouts:
        parse_blocks(layout)

    done = read_results(args.results)
    weights = Path(args.weights).name if Path(args.weights).exists() else args.weights
    ways = itertools.product(args.layouts, args.inits, args.seeds, args.epochs)
    asked = [Key(args.task, weights, args.lr, *way) for way in ways]
    times = read_json(TIMES) if TIMES.exists() else {}
    if args.time:
        times.update(time_layouts([name for name in args.layouts if name in {result.layout for result in done}], args))
        write_json(TIMES, times)
    elif not args.report:
        source = read_weights_from(resolve(args.weights)).config
        there = {result.key for result in done}
        missing = [key for key in asked if key not in there and not is_same(source, key.layout, key.init)]
        missing.sort(key=lambda key: (key.seed, key.epochs))  # a whole study with the first seed, then with the next
        done += run_all(lambda key: run(key, args), missing, args.jobs, args.results)
    shown = sorted((r for r in done if r.key in asked), key=lambda r: (r.layout[0], len(r.layout), r.init == "copy", r.seed))
    print(f"\n{len(shown)} runs are done\n\n{table(shown, times, args.texts)}")
    if args.plot and shown:
        draw([r for r in shown if r.epochs == args.epochs[0]], times, args.texts, args.plot)


if __name__ == "__main__":
    main()

"""Do more blocks help? Fine-tunes one model in many layouts, from copied and from identity layers, with several seeds.

    python -m benchmarks.layout_study --data GLUE/SST-2 --weights weights/minilm --out runs/study
    python -m benchmarks.layout_study --out runs/study --report --plot docs/layout_study.png

Each run is `train.py` as a user runs it, in a process of its own. A study that was stopped goes on where it stopped: runs
that are done are skipped, a run that broke off is resumed. Prints a Markdown table: accuracy at the last
evaluation (the mean over seeds, and each run's), FLOPs of a text of --length tokens, minutes.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from funnel import checkpoint
from funnel.config import parse_layout, read_json
from funnel.cost import total_flops

ROOT = Path(__file__).parent.parent
LAYOUTS = [",".join([str(n)] * blocks) for n, counts in ((2, (3, 4, 5, 6, 7)), (4, (3, 5, 6, 7))) for blocks in counts]


class Result(NamedTuple):
    """What a finished run came to."""

    layout: str
    init: str
    seed: int
    accuracy: float
    seconds: float
    flops: float


def folder_of(out: Path, layout: str, init: str, seed: int) -> Path:
    return out / f"{layout.replace(',', '-')}_{init}_seed{seed}"


def read(folder: Path, length: int) -> Result | None:
    """A finished run's result; None for one that is not there or not done."""
    if not (folder / "metrics.jsonl").is_file():
        return None
    record = read_json(folder / "run.json")["settings"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["split"] == "dev" and line["step"] == record["steps"]]
    if not last:
        return None
    rate = statistics.median(line["examples_per_second"] for line in lines if line["split"] == "train")
    flops = total_flops(checkpoint.load_config(folder / "last"), length, record["batch_size"])
    seconds = record["steps"] * record["batch_size"] / rate
    return Result(record["blocks"], record["init"], record["seed"], last[0]["accuracy"], seconds, flops)


def run(folder: Path, layout: str, init: str, seed: int, args: argparse.Namespace) -> None:
    """Starts a run, or goes on with it."""
    command = [sys.executable, str(ROOT / "train.py"), "--task", args.task, "--weights", args.weights, "--blocks", layout]
    command += ["--data", str(args.data)] if args.data else []
    command += ["--init", init, "--seed", str(seed), "--lr", str(args.lr), "--epochs", str(args.epochs), "--out", str(folder)]
    if checkpoint.is_checkpoint(folder / "last"):
        command.append("--resume")
    elif folder.exists():  # it broke off before its first checkpoint
        shutil.rmtree(folder)
    print("+", " ".join(command[1:]), flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def table(results: list[Result]) -> str:
    """Markdown, a line a layout and init."""
    lines = ["| layout | new layers | accuracy, mean (runs) | MFLOPs a text | minutes |", "|---|---|---|---|---|"]
    for (layout, init), group in grouped(results).items():
        accuracies = [r.accuracy * 100 for r in group]
        runs = ", ".join(f"{a:.1f}" for a in accuracies)
        minutes = statistics.mean(r.seconds for r in group) / 60
        mean = statistics.mean(accuracies)
        lines.append(f"| {layout} | {init} | {mean:.1f} ({runs}) | {group[0].flops / 1e6:.0f} | {minutes:.1f} |")
    return "\n".join(lines)


def grouped(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.layout, result.init), []).append(result)
    return groups


def draw(results: list[Result], path: Path) -> None:
    """Accuracy against FLOPs and against seconds, a point a layout and init."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    series = {(init, name.split(",")[0]) for name, init in grouped(results)}
    for init, per_block in sorted(series):
        groups = [(k, g) for k, g in grouped(results).items() if k[1] == init and k[0].split(",")[0] == per_block]
        y = [statistics.mean(r.accuracy for r in g) * 100 for _, g in groups]
        for axis, x in (
            (axes[0], [g[0].flops / 1e6 for _, g in groups]),
            (axes[1], [statistics.mean(r.seconds for r in g) / 60 for _, g in groups]),
        ):
            axis.plot(x, y, "o-" if init == "identity" else "s--", label=f"{init}, {per_block} layers a block")
            for (key, _), a, b in zip(groups, x, y, strict=True):
                axis.annotate(f"{key[0].count(',') + 1}", (a, b), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes[0].set(xlabel="MFLOPs a text, forward", ylabel="accuracy on dev, %")
    axes[1].set(xlabel="minutes a run")
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", default="funnel-transformer/small")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    parser.add_argument("--inits", nargs="+", default=["identity", "copy"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--length", type=int, default=13, help="tokens of a text, for its FLOPs (default: SST-2's mean)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--report", action="store_true", help="start no run; report those that are done")
    parser.add_argument("--plot", type=Path, help="picture to write (needs the extra plot)")
    args = parser.parse_args()
    results: list[Any] = []
    for seed, layout, init in itertools.product(args.seeds, args.layouts, args.inits):
        parse_layout(layout)
        folder = folder_of(args.out, layout, init, seed)
        if read(folder, args.length) is None and not args.report:
            run(folder, layout, init, seed, args)
        results.append(read(folder, args.length))
    done = sorted((r for r in results if r), key=lambda r: (len(r.layout), r.layout, r.init, r.seed))
    print(f"\n{len(done)} of {len(results)} runs are done\n\n{table(done)}")
    if args.plot and done:
        draw(done, args.plot)


if __name__ == "__main__":
    main()

"""How a classifier's time and memory grow with the length of a text and with the layout, measured and in FLOPs.

    pip install -c constraints.txt -e '.[bench,plot]'
    python -m benchmarks.growth --plot docs/growth.png

One text, forward pass, width 768, float32; time is the median of three runs, memory the peak over the weights of a run in
a process of its own. Prints a Markdown table.
"""

import argparse
import os
import statistics
from pathlib import Path

import torch

from benchmarks.speed.compare import config_of, device_name, inputs_of, peak_mib, seconds
from funnel.model.flops import total_flops
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training import optim as training

LAYOUTS = {"4,4,4": "4,4,4", "7 x 2": "2,2,2,2,2,2,2", "7 x 4": "4,4,4,4,4,4,4", "12 (no pooling)": "12"}
LENGTHS = (16, 64, 256, 1024, 2048, 4096, 8192)


def measure(layout: str, length: int, device: torch.device) -> tuple[float, float, float]:
    """TFLOPs, seconds and MiB of one forward pass."""
    config = config_of(layout)
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(config).eval().to(device)
    ids, mask, types, _ = inputs_of((1, length), device)
    with torch.no_grad():
        runs = [seconds(lambda: model(ids, mask, types), device) for _ in range(2 if length > 2000 else 4)][1:]
    memory = peak_mib("ours", "forward", "fp32", (1, length), layout, device)
    return total_flops(config, length) / 1e12, statistics.median(runs), memory


def draw(results: dict[str, dict[int, tuple[float, float, float]]], path: Path, machine: str) -> None:
    """Time and memory against length, a line a layout; dotted lines are FLOPs at the speed of the longest text."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, by_length in results.items():
        lengths = list(by_length)
        (line,) = axes[0].plot(lengths, [v[1] for v in by_length.values()], marker="o", label=name)
        last = by_length[lengths[-1]]
        speed = last[0] / last[1]
        axes[0].plot(lengths, [v[0] / speed for v in by_length.values()], ":", color=line.get_color())
        axes[1].plot(lengths, [max(v[2], 0.1) for v in by_length.values()], marker="o", label=name)
    for axis, title in zip(axes, ("seconds (dotted: FLOPs)", "MiB over the weights"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="tokens of the text", title=title)
        axis.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"One text, forward, H768, float32, {machine}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="picture to write (needs the extra plot)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--device", type=training.choose_device, default=training.choose_device(None))
    args = parser.parse_args()
    training.keep_freed_memory()
    machine = f"{device_name(args.device)}, {os.cpu_count()} cores"
    print(machine)
    results: dict[str, dict[int, tuple[float, float, float]]] = {}
    print(f"\n| layout | | {' | '.join(map(str, args.lengths))} |\n|---|---|{'---|' * len(args.lengths)}")
    for name, layout in LAYOUTS.items():
        results[name] = {length: measure(layout, length, args.device) for length in args.lengths}
        for row, unit in enumerate(("TFLOPs", "seconds", "MiB")):
            values = " | ".join(f"{v[row]:.3g}" for v in results[name].values())
            print(f"| {name if row == 0 else ''} | {unit} | {values} |", flush=True)
    if args.plot:
        draw(results, args.plot, machine)


if __name__ == "__main__":
    main()

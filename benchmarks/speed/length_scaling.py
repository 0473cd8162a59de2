"""How the time, memory and FLOPs of a classifier grow with the sequence length, for several layouts.

    pip install -c constraints.txt -e '.[bench,plot]'
    python -m benchmarks.speed.length_scaling --plot docs/growth.png

Forward pass of one text, width 768, float32. Time is the median of three runs (one for long texts). Memory is the peak
beyond the weights, measured in a separate process. Prints a Markdown table.
"""

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.speed.measure import device_name, time_call
from benchmarks.speed.models import logits_function, random_batch, small_config
from benchmarks.speed.peak_memory import PeakMemory
from funnel.model.flops import total_flops
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training.device import choose_device, keep_freed_memory

LAYOUTS = {"4,4,4": "4,4,4", "7 x 2": "2,2,2,2,2,2,2", "7 x 4": "4,4,4,4,4,4,4", "12 (no pooling)": "12"}
LENGTHS = (16, 64, 256, 1024, 2048, 4096, 8192)


class Cost(NamedTuple):
    """The cost of one forward pass."""

    tflops: float
    seconds: float
    mib: float


def measure(layout: str, length: int, device: torch.device) -> Cost:
    """Measures one forward pass."""
    config = small_config(layout)
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(config).eval().to(device)
    logits = logits_function(model, random_batch((1, length), device))
    with torch.no_grad():
        times = [time_call(logits, device) for _ in range(2 if length > 2000 else 4)]
    memory = PeakMemory("funnel", "forward", "fp32", 1, length, layout, device.type).measure()
    return Cost(total_flops(config, length) / 1e12, statistics.median(times[1:]), memory)  # the first run warms up


def plot(results: dict[str, dict[int, Cost]], path: Path, machine: str) -> None:
    """Draws time and memory against length. Dotted lines are FLOPs, scaled to meet the time of the longest text."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, costs in results.items():
        lengths, longest = list(costs), costs[max(costs)]
        (line,) = axes[0].plot(lengths, [cost.seconds for cost in costs.values()], marker="o", label=name)
        scaled = [cost.tflops * longest.seconds / longest.tflops for cost in costs.values()]
        axes[0].plot(lengths, scaled, ":", color=line.get_color())
        axes[1].plot(lengths, [max(cost.mib, 0.1) for cost in costs.values()], marker="o", label=name)
    for axis, title in zip(axes, ("seconds (dotted: FLOPs)", "MiB beyond the weights"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="sequence length in tokens", title=title)
        axis.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"Forward pass of one text, width 768, float32, {machine}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="image to write (needs the extra plot)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--device", type=choose_device, default=choose_device(None))
    args = parser.parse_args()
    keep_freed_memory()
    machine = device_name(args.device)
    print(machine)
    print(f"\n| layout | | {' | '.join(map(str, args.lengths))} |\n|---|---|{'---|' * len(args.lengths)}")
    results: dict[str, dict[int, Cost]] = {}
    for name, layout in LAYOUTS.items():
        results[name] = {length: measure(layout, length, args.device) for length in args.lengths}
        for row, (unit, values) in enumerate(
            zip(("TFLOPs", "seconds", "MiB"), zip(*results[name].values(), strict=True), strict=True)
        ):
            cells = " | ".join(f"{value:.3g}" for value in values)
            print(f"| {'' if row else name} | {unit} | {cells} |", flush=True)
    if args.plot:
        plot(results, args.plot, machine)


if __name__ == "__main__":
    main()

"""Checks a long run of train.py for leaks: memory and open files over time.

    python -m benchmarks.speed.endurance --steps 5000

Trains on the demo task, with an evaluation and a checkpoint every 100 steps. Linux only (reads /proc).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

TRAIN_SCRIPT = Path(__file__).parents[2] / "train.py"
NUM_EXAMPLES = 9594  # of the demo task's training set
TABLE_ROWS = 12


class Sample(NamedTuple):
    """The state of a running process."""

    step: int
    memory: int  # bytes
    open_files: int


def monitor(process: subprocess.Popen[bytes], log: Path) -> list[Sample]:
    """Samples a run's process at each new step in its metrics.jsonl, until the process ends."""
    samples: list[Sample] = []
    proc = Path("/proc") / str(process.pid)
    while process.poll() is None:
        time.sleep(0.2)
        step = last_step(log)
        if step <= (samples[-1].step if samples else 0):
            continue
        try:
            memory = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            samples.append(Sample(step, memory, len(list((proc / "fd").iterdir()))))
        except OSError:  # the process has just ended
            break
    return samples


def last_step(log: Path) -> int:
    """The last step in metrics.jsonl, or 0."""
    try:
        return int(json.loads(log.read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--blocks", default="2,2,2")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    epochs = args.steps * args.batch_size / NUM_EXAMPLES
    command = [sys.executable, str(TRAIN_SCRIPT), "--blocks", args.blocks, "--batch-size", str(args.batch_size)]
    command += ["--epochs", str(epochs), "--eval-every", "100"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        with subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL) as process:
            samples = monitor(process, out / "metrics.jsonl")
    if process.returncode or not samples:
        sys.exit(process.returncode or "the run was too short to be sampled")
    print("| step | memory, MiB | open files |\n|---|---|---|")
    for sample in samples[:: max(1, len(samples) // TABLE_ROWS)] + samples[-1:]:
        print(f"| {sample.step:,} | {sample.memory / 2**20:.1f} | {sample.open_files} |")
    last = samples[-1]
    first = next(sample for sample in samples if sample.step >= last.step / 5)  # after warm-up: every code path has run
    growth = (last.memory - first.memory) / 2**20
    print(f"\nfrom step {first.step:,} to {last.step:,}: {growth:+.1f} MiB, {last.open_files - first.open_files:+d} open files")


if __name__ == "__main__":
    main()

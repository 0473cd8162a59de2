"""Training throughput on an idle and on a busy machine, by how long OpenMP's threads spin.

    python -m benchmarks.speed.busy_neighbor                                            # the demo task, random weights
    python -m benchmarks.speed.busy_neighbor --weights MINILM --blocks 2,2,2 --steps 10

Waiting OpenMP threads spin, which is fast on an idle machine. On busy cores, a spinning thread takes time from the thread it
waits for. GOMP_SPINCOUNT limits the spinning; libgomp's default is 300,000 iterations. Each setting trains in a separate
process, alternately on the idle machine and with one busy process per core.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SETTINGS = {
    "spin 300000 (default)": {"GOMP_SPINCOUNT": "300000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "spin 1000 (train.py)": {"GOMP_SPINCOUNT": "1000"},
    "spin 0": {"GOMP_SPINCOUNT": "0"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BUSY_LOOP = "while True: pass"


def measure_rates(args: argparse.Namespace) -> list[tuple[float, float]]:
    """Examples per second of this process in alternating rounds: (idle, with one busy process per core)."""
    import train
    from benchmarks.speed.models import funnel_trainer
    from funnel.training.device import choose_dtype, keep_freed_memory
    from funnel.training.distributed import init_distributed
    from funnel.training.run_dir import RunDir

    keep_freed_memory()
    with init_distributed("cpu", fsdp=False) as dist:
        train_args = train.TrainArgs(weights=args.weights, blocks=args.blocks)
        train_args, _, _, built, sets = train.load(train_args, dist, RunDir(Path()))
        model = built.model.train()
        trainer = funnel_trainer(model, train_args, choose_dtype(None, dist.device, model.config.d_model))
        batches = sets["train"].batches(train_args.batch_size, train_args.seed)

        def measure() -> float:
            started, examples = time.perf_counter(), 0
            for batch in itertools.islice(batches, args.steps):
                trainer.step(batch)
                examples += batch.n_examples
            return examples / (time.perf_counter() - started)

        measure()  # warm-up
        return [(measure(), measure_while_busy(measure)) for _ in range(args.rounds)]


def measure_while_busy(measure: Callable[[], float]) -> float:
    """Calls a measurement while one busy process per core runs."""
    jobs = [subprocess.Popen([sys.executable, "-c", BUSY_LOOP]) for _ in os.sched_getaffinity(0)]
    try:
        return measure()
    finally:
        for job in jobs:
            job.kill()
            job.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="none", metavar="SOURCE")
    parser.add_argument("--blocks", default="2,2,2,2,2,2,2", metavar="LAYOUT")
    parser.add_argument("--steps", type=int, default=60, help="steps per measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        rates = measure_rates(args)
        print(json.dumps(rates))
        return
    print("| setting | idle | busy |\n|---|---|---|")
    reference = 0.0
    for name, variables in SETTINGS.items():
        command = [sys.executable, "-m", "benchmarks.speed.busy_neighbor", "--worker", *sys.argv[1:]]
        output = subprocess.run(command, env={**os.environ, **variables}, check=True, stdout=subprocess.PIPE, text=True).stdout
        idle, busy = (statistics.median(rates) for rates in zip(*json.loads(output.splitlines()[-1]), strict=True))
        reference = reference or idle
        print(f"| {name} | {idle:.0f} examples/s ({idle / reference:.2f}) | {busy:.0f} ({busy / reference:.2f}) |", flush=True)


if __name__ == "__main__":
    main()

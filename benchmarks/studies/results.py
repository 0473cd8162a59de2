"""Runs of a study: starts train.py, and appends the result of each run to a .jsonl file as soon as it ends."""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from funnel.io import read_json
from funnel.model.config import FunnelConfig, parse_blocks

Run = TypeVar("Run")
ROOT = Path(__file__).parents[2]
MINILM = FunnelConfig(  # sizes of all-MiniLM-L6-v2, with which the stored results were measured
    blocks=parse_blocks("6"),
    num_decoder_layers=0,
    d_model=384,
    n_head=12,
    d_head=32,
    d_inner=1536,
    relative_attention=False,
    position_embeddings=512,
    token_type_embeddings=2,
)


def run_all(run: Callable[[Run], Any], runs: Iterable[Run], jobs: int, path: Path) -> list[Any]:
    """Calls `run` for each element of `runs`, `jobs` at a time, and appends each result to a .jsonl file.

    After a failure or Ctrl-C, no further run starts; those in progress finish and are stored.

    Args:
        run: returns a NamedTuple.
    """
    lock, stop = threading.Lock(), threading.Event()

    def run_and_store(argument: Run) -> Any:
        if stop.is_set():
            return None
        try:
            result = run(argument)
        except BaseException:
            stop.set()
            raise
        with lock, path.open("a") as file:
            file.write(json.dumps(result._asdict()) + "\n")
        print(result, file=sys.stderr, flush=True)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_and_store, argument) for argument in runs]
        try:
            return [future.result() for future in as_completed(futures)]
        finally:
            stop.set()


def read_results(path: Path) -> list[dict[str, Any]]:
    """The stored results; an empty list if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def describe_scores(metric: str, values: list[float]) -> str:
    """Mean and standard error in percent."""
    error = f" ± {100 * statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{metric} {statistics.mean(values) * 100:.1f}{error}"


def train(arguments: Sequence[str], folder: Path, jobs: int) -> dict[str, float]:
    """Runs train.py in a separate process and returns the last evaluation on dev.

    Args:
        folder: of the run; removed before it starts, unless it is resumed.
        jobs: number of runs at a time, which share the cores.
    """
    command = [sys.executable, str(ROOT / "train.py"), *arguments, "--out", str(folder)]
    if "--resume" not in arguments:
        shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
    print("+ " + " ".join(command[1:]), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment(jobs))
    num_steps = read_json(folder / "run.json")["settings"]["steps"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last: dict[str, float] = next(line for line in lines if line["split"] == "dev" and line["step"] == num_steps)
    return last


def run_module(command: Sequence[str], jobs: int) -> Any:
    """Runs a module in a separate process and returns the last line that it prints, parsed as JSON.

    Args:
        command: name of the module, and its arguments.
        jobs: number of runs at a time, which share the cores.
    """
    arguments = [sys.executable, "-m", *command]
    process = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True, env=environment(jobs), cwd=ROOT)
    return json.loads(process.stdout.splitlines()[-1])


def environment(jobs: int) -> dict[str, str]:
    """Environment variables of one of `jobs` processes that share the cores."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}

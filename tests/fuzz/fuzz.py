"""Damages files at random and checks that reading them ends in a result or a FunnelError.

    python tests/fuzz/fuzz.py --minutes 60
    python tests/fuzz/fuzz.py --target config.json --seed 7 --first 41 --cases 1     # reproduce one case

A case is a copy of a valid file (see targets.py) with one to four mutations: bytes and chunks are changed, duplicated,
removed or inserted; in JSON, values are replaced by unusual ones. Cases run in a separate process. A case fails if it raises
another exception, takes longer than --seconds, kills the process, uses more than 64 MiB plus 50 times the file's size, or
creates a file. Files of failed cases are kept in --failures.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent.parent), str(Path(__file__).parent.parent)]

import pytest  # noqa: E402
import torch  # noqa: E402
from targets import TARGETS  # noqa: E402

from funnel.errors import FunnelError  # noqa: E402

RESULT, ERROR, FAILURE = "result", "error", "failure"  # outcomes of a case
MAX_MESSAGE_LENGTH = 2000
BYTES = [
    *(b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x1b[31m"),
    *(b"\r", b"\n", b'"', b"'", b",", b"\t", b"\\", b"{", b"}", b"[", b"]", b":", b" " * 70000, b"a," * 5000),
    *(b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"9" * 400, b"9" * 5000, b"null", b"true", b'"\\ud800"', b"../../x"),
    *(b"[" * 3000, b'{"a":' * 3000),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 999, 10**6, 10**7, 10**9, 2**31, 2**63, 2**64, 10**30, -(10**30)),
    *(0.5, 1e-300, 1e308, float("nan"), float("inf"), "", "0", "a", "../../x", "/etc/passwd", "\0", "\ud800", "é" * 3),
    *("a" * 9999, "none", "mean", "gelu", "0.0", "9.9", [], {}, [[]], [1], [0, 0, 0], ["a"], [999] * 9, [1] * 5000),
    *({"a": 1}, {"": {}}),
]


# --- mutations --------------------------------------------------------------------------------------------------------


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Damages a file's content: as JSON if it is JSON (usually), else as bytes."""
    with contextlib.suppress(ValueError):
        if rng.random() < 0.7 and len(content) < 10**6:
            value = json.loads(content)
            for _ in range(rng.randint(1, 3)):
                value = mutate_json(value, rng)
            return json.dumps(value).encode()
    for _ in range(rng.randint(1, 4)):
        content = mutate_bytes(content, rng)
    return content


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Applies one mutation at a random position."""
    start, size = rng.randrange(len(content) + 1), int(2 ** rng.uniform(0, 10))
    before, chunk, after = content[:start], content[start : start + size], content[start + size :]
    match rng.choice(["flip", "flip", "insert", "insert", "delete", "duplicate", "truncate", "move", "zero"]):
        case "flip" if chunk:
            return before + bytes([chunk[0] ^ 1 << rng.randrange(8)]) + chunk[1:] + after
        case "insert":
            return before + rng.choice(BYTES) + chunk + after
        case "delete":
            return before + after
        case "duplicate":
            return before + chunk + chunk * rng.choice([1, 1, 50]) + after
        case "truncate":
            return before
        case "move":
            to = rng.randrange(len(content) + 1)
            return content[:to] + chunk + content[to:]
        case "zero":
            return before + bytes(len(chunk)) + after
    return content


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Replaces, removes or inserts something at a random depth of a JSON value."""
    if not isinstance(value, dict | list) or not value or rng.random() >= 0.9:
        return rng.choice(VALUES)
    copy: Any = value.copy()
    key: Any = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    kind = rng.random()
    if kind < 0.1:
        del copy[key]
    elif kind < 0.15 and isinstance(copy, dict):
        copy[rng.choice(["", "x", "0", key + "x"])] = copy[key]
    elif kind < 0.2 and isinstance(copy, list):
        copy.insert(key, copy[key])
    else:
        copy[key] = mutate_json(copy[key], rng)
    return copy


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Campaign:
    """The cases of one target.

    Attributes:
        target: a key of `TARGETS`.
        seed: of the mutations, together with target and case number.
        first, cases: number of the first case, and how many there are.
        deadline: of `time.monotonic()`; no case starts later.
        seconds: time limit per case.
        failures: folder for the files of failed cases.
    """

    target: str
    seed: int
    first: int
    cases: int
    deadline: float
    seconds: float
    failures: Path


def list_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def run_case(name: str, rng: random.Random, valid: Path, work: Path) -> tuple[str, str]:
    """Damages a copy of the folder `valid` and reads it. Returns the outcome and a message."""
    target = TARGETS[name]
    folder = work / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(valid, folder)
    content = mutate((folder / target.file).read_bytes(), rng)
    (folder / target.file).write_bytes(content)
    files_before, siblings_before = list_files(folder), set(os.listdir(work))
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        target.read(folder)
        outcome, message = RESULT, ""
    except FunnelError as error:
        outcome, message = ERROR, str(error)
        if len(message) > MAX_MESSAGE_LENGTH:
            outcome, message = FAILURE, f"a message of {len(message)} characters: {message[:300]}"
    except Exception:
        outcome, message = FAILURE, traceback.format_exc()
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before) * 1024
    if memory > 2**26 + 50 * len(content):
        outcome, message = FAILURE, f"{memory / 2**20:.0f} MiB for a file of {len(content)} bytes; {message}"
    new_files = (list_files(folder) - files_before) | (set(os.listdir(work)) - siblings_before)
    if outcome != FAILURE and new_files:
        outcome, message = FAILURE, f"created {new_files}"
    return outcome, message


def serve_cases(pipe: Connection, campaign: Campaign, valid: str, work: str) -> None:
    """Runs the cases whose numbers arrive through the pipe; the main function of the worker process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["FUNNEL_CACHE"] = str(Path(work).parent / "cache")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # discards warnings about damaged checkpoints
    name = campaign.target
    shutil.copytree(valid, Path(work, "case"), dirs_exist_ok=True)
    TARGETS[name].read(Path(work, "case"))  # so that memory for lazy imports is not attributed to a case
    while (number := pipe.recv()) is not None:
        pipe.send(run_case(name, random.Random(f"{name} {campaign.seed} {number}"), Path(valid), Path(work)))


class Worker:
    """A process that runs the cases of a campaign, one at a time."""

    def __init__(self, campaign: Campaign, valid: Path, work: Path) -> None:
        context = multiprocessing.get_context("forkserver")  # forking this process, which may have threads, could hang
        context.set_forkserver_preload(["targets"])
        self.seconds = campaign.seconds
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=serve_cases, args=(child_pipe, campaign, str(valid), str(work)))
        self.process.start()
        child_pipe.close()

    def run(self, number: int) -> tuple[str, str]:
        """Outcome and message of a case."""
        try:
            self.pipe.send(number)
            if self.pipe.poll(self.seconds):
                outcome, message = self.pipe.recv()
                return outcome, message
            return FAILURE, f"takes longer than {self.seconds} s"
        except (EOFError, OSError):
            self.process.join()
            return FAILURE, f"the process died with status {self.process.exitcode}"

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.join()


def fuzz(campaign: Campaign) -> Counter[str]:
    """Runs the cases of one target and counts their outcomes; none if the target is unavailable."""
    counts: Counter[str] = Counter()
    target = TARGETS[campaign.target]
    with tempfile.TemporaryDirectory() as folder:
        valid, work = Path(folder, "valid"), Path(folder, "work")
        valid.mkdir()
        work.mkdir()
        try:
            target.make(valid)
        except pytest.skip.Exception as reason:
            print(f"{campaign.target}: skipped ({reason})")
            return counts
        worker = None
        for number in range(campaign.first, campaign.first + campaign.cases):
            if time.monotonic() > campaign.deadline:
                break
            worker = worker or Worker(campaign, valid, work)
            outcome, message = worker.run(number)
            counts[outcome] += 1
            if outcome == FAILURE:
                print(f"{campaign.target} --seed {campaign.seed} --first {number}: {message}", flush=True)
                keep_file(work / "case" / target.file, campaign, number)
                worker.stop()
                worker = None
        if worker is not None:
            worker.stop()
    return counts


def keep_file(path: Path, campaign: Campaign, number: int) -> None:
    """Copies the file of a failed case into the folder of failures."""
    campaign.failures.mkdir(parents=True, exist_ok=True)
    if path.exists():
        shutil.copy(path, campaign.failures / f"{campaign.target.replace(' ', '_')}-{campaign.seed}-{number}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="total time (default: %(default)s)")
    parser.add_argument("--target", action="append", choices=TARGETS, help="(default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=10**9, help="maximum number of cases per target")
    parser.add_argument("--seconds", type=float, default=20.0, help="time limit per case (default: %(default)s)")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="(default: %(default)s)")
    args = parser.parse_args()
    total: Counter[str] = Counter()
    names = args.target or list(TARGETS)
    print("| file | cases | results | clear errors | failures |\n|---|---|---|---|---|", flush=True)
    for name in names:
        deadline = time.monotonic() + args.minutes * 60 / len(names)
        counts = fuzz(Campaign(name, args.seed, args.first, args.cases, deadline, args.seconds, args.failures))
        total += counts
        print(format_row(name, counts), flush=True)
    print(format_row("all", total))
    return 1 if total[FAILURE] else 0


def format_row(name: str, counts: Counter[str]) -> str:
    return f"| {name} | {counts.total():,} | {counts[RESULT]:,} | {counts[ERROR]:,} | {counts[FAILURE]:,} |"


if __name__ == "__main__":
    sys.exit(main())

"""Damages files in random ways and sees to it that nothing but a result or a FunnelError comes of them.

    python tests/faults/fuzz.py --minutes 60
    python tests/faults/fuzz.py --target config.json --seed 7 --first 41 --cases 1     # one case again

Each target of targets.py gets its turn. A case is a copy of a good file with one to four damages: bytes and pieces that
are changed, doubled, lost or put in, and, in JSON, values that are swapped for strange ones. Cases run in a process of
their own that is watched: a traceback, a case of more than --seconds, a process that dies, memory of more than 64 MiB
and 50 times the file, or a file beside the ones that were there are failures, and the file is kept in --failures.
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent.parent), str(Path(__file__).parent.parent)]

import pytest  # noqa: E402
import torch  # noqa: E402
from targets import TARGETS  # noqa: E402

from funnel.errors import FunnelError  # noqa: E402

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


def damage(content: bytes, chance: random.Random) -> bytes:
    """A file's content with something wrong in it."""
    with contextlib.suppress(ValueError):
        if chance.random() < 0.7 and len(content) < 10**6:
            values = json.loads(content)
            for _ in range(chance.randint(1, 3)):
                values = swap(values, chance)
            return json.dumps(values).encode()
    for _ in range(chance.randint(1, 4)):
        start, size = chance.randrange(len(content) + 1), int(2 ** chance.uniform(0, 10))
        kind = chance.choice(["flip", "flip", "put", "put", "lose", "double", "cut", "move", "zero"])
        piece = content[start : start + size]
        if kind == "flip" and piece:
            content = content[:start] + bytes([piece[0] ^ 1 << chance.randrange(8)]) + content[start + 1 :]
        elif kind == "put":
            content = content[:start] + chance.choice(BYTES) + content[start:]
        elif kind == "lose":
            content = content[:start] + content[start + size :]
        elif kind == "double":
            content = content[: start + size] + piece * chance.choice([1, 1, 50]) + content[start + size :]
        elif kind == "cut":
            content = content[:start]
        elif kind == "move":
            to = chance.randrange(len(content) + 1)
            content = content[:to] + piece + content[to:]
        elif kind == "zero":
            content = content[:start] + bytes(len(piece)) + content[start + size :]
    return content


def swap(values: Any, chance: random.Random) -> Any:
    """A JSON value with something in it replaced, removed, or put in."""
    if isinstance(values, (dict, list)) and values and chance.random() < 0.9:
        copy: Any = values.copy()
        key: Any = chance.choice(list(copy)) if isinstance(copy, dict) else chance.randrange(len(copy))
        kind = chance.random()
        if kind < 0.1:
            del copy[key]
        elif kind < 0.15 and isinstance(copy, dict):
            copy[chance.choice(["", "x", "0", key + "x"])] = copy[key]
        elif kind < 0.2 and isinstance(copy, list):
            copy.insert(key, copy[key])
        else:
            copy[key] = swap(copy[key], chance)
        return copy
    return chance.choice(VALUES)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def case(name: str, seed: int, number: int, good: Path, work: Path) -> tuple[str, str]:
    """Runs one case. Returns "result", "error" or "failure", and what there is to say."""
    target = TARGETS[name]
    folder = work / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    content = damage((folder / target.file).read_bytes(), random.Random(f"{name} {seed} {number}"))
    (folder / target.file).write_bytes(content)
    before, around = files_of(folder), set(os.listdir(work))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        target.use(folder)
        outcome, said = "result", ""
    except FunnelError as error:
        outcome, said = "error", str(error)
        if len(said) > 2000:
            outcome, said = "failure", f"a message of {len(said)} letters: {said[:300]}"
    except Exception:
        outcome, said = "failure", traceback.format_exc()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    if grown > 2**26 + 50 * len(content):
        outcome, said = "failure", f"{grown / 2**20:.0f} MiB for a file of {len(content)} bytes; {said}"
    if outcome != "failure" and (files_of(folder) - before or set(os.listdir(work)) - around):
        outcome, said = "failure", f"wrote {files_of(folder) - before} {set(os.listdir(work)) - around}"
    return outcome, said


def serve(pipe: Connection, name: str, seed: int, good: str, work: str) -> None:
    """Runs the cases whose numbers come in."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["FUNNEL_CACHE"] = str(Path(work).parent / "cache")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what is told of checkpoints that are passed over
    shutil.copytree(good, Path(work, "case"), dirs_exist_ok=True)
    TARGETS[name].use(Path(work, "case"))  # what is loaded only now is no case's memory
    while (number := pipe.recv()) is not None:
        pipe.send(case(name, seed, number, Path(good), Path(work)))


def fuzz(name: str, seed: int, first: int, cases: int, end: float, seconds: float, failures: Path) -> Counter[str]:
    """Runs cases of one target. Returns how many there were of each outcome."""
    context = multiprocessing.get_context("forkserver")  # a copy of this process could hang: it may have threads
    context.set_forkserver_preload(["targets"])
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        good, work = Path(folder, "good"), Path(folder, "work")
        good.mkdir()
        work.mkdir()
        try:
            TARGETS[name].make(good)
        except pytest.skip.Exception as reason:
            print(f"{name}: skipped ({reason})")
            return counts
        process, pipe = None, None
        for number in range(first, first + cases):
            if time.monotonic() > end:
                break
            if process is None:
                pipe, other = context.Pipe()
                process = context.Process(target=serve, args=(other, name, seed, str(good), str(work)))
                process.start()
                other.close()
            assert pipe is not None
            try:
                pipe.send(number)
                outcome, said = pipe.recv() if pipe.poll(seconds) else ("failure", f"takes more than {seconds} s")
            except (EOFError, OSError):
                process.join()
                outcome, said = "failure", f"the process died with status {process.exitcode}"
            counts[outcome] += 1
            if outcome == "failure":
                print(f"{name} --seed {seed} --first {number}: {said}", flush=True)
                failures.mkdir(parents=True, exist_ok=True)
                source = work / "case" / TARGETS[name].file
                if source.exists():
                    shutil.copy(source, failures / f"{name.replace(' ', '_')}-{seed}-{number}")
                process.kill()
                process.join()
                process = None
        if process is not None:
            process.kill()
            process.join()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="for all targets main_process_first (default: %(default)s)")
    parser.add_argument("--target", action="append", choices=TARGETS, help="(default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=10**9, help="of each target at most")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a case at most (default: %(default)s)")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    args = parser.parse_args()
    total: Counter[str] = Counter()
    names = args.target or list(TARGETS)
    print("| file | cases | results | clear errors | failures |\n|---|---|---|---|---|", flush=True)
    for name in names:
        left = args.minutes * 60 / len(names)
        counts = fuzz(name, args.seed, args.first, args.cases, time.monotonic() + left, args.seconds, args.failures)
        total += counts
        print(
            f"| {name} | {sum(counts.values()):,} | {counts['result']:,} | {counts['error']:,} | {counts['failure']:,} |",
            flush=True,
        )
    print(f"| all | {sum(total.values()):,} | {total['result']:,} | {total['error']:,} | {total['failure']:,} |")
    return 1 if total["failure"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""How fast a large file of texts is read and encoded, and in how much memory.

    python -m benchmarks.encoding --rows 1000000 [--words 80] [--weights DIR]

Writes a csv file of made-up reviews, encodes it as train.py does (in a process of its own, whose peak memory counts), and
opens it once more from the cache. Without --weights the vocabulary is the demo task's, which spells most words.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.speed.compare import device_name, resident
from funnel.data import demo
from funnel.data.dataset import encode
from funnel.data.files import ExampleFile
from funnel.data.tokenizer import FunnelTokenizer


def make_file(path: Path, rows: int, words: int) -> None:
    """Reviews of about `words` words, quoted as Zhang et al.'s are, as a generator writes them."""
    dice = np.random.default_rng(0)
    vocabulary = sorted({word for text in demo.examples()[0].texts for word in text.split()})
    with path.open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        for start in range(0, rows, 1000):
            lengths = dice.poisson(words, min(1000, rows - start))
            drawn = iter(dice.integers(0, len(vocabulary), int(lengths.sum())))
            for row, length in enumerate(lengths):
                writer.writerow(
                    [row % 2 + 1, f'a "title", {start + row}', " ".join(vocabulary[next(drawn)] for _ in range(length))]
                )


def measure(path: Path, weights: str | None) -> dict[str, float]:
    """Seconds and peak memory of encoding, over what the process held before; and seconds of opening it again."""
    tokenizer = FunnelTokenizer.load(Path(weights)) if weights else FunnelTokenizer.train(demo.examples()[0].texts)
    source = ExampleFile(path, (1, 2), 0, joined=True, escaped=True)
    before, result = resident("VmRSS"), {}
    for name in ("first", "again"):
        started = time.perf_counter()
        dataset = encode(source, {"1": 0, "2": 1}, tokenizer, 512)
        result[name] = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result | {"rows": len(dataset), "tokens": int(dataset.lengths.sum()), "peak": peak - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=80, help="in a text, on average (default: %(default)s)")
    parser.add_argument("--weights", help="checkpoint folder with a tokenizer")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.file:
        print(json.dumps(measure(args.file, args.weights)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.csv"
        make_file(path, args.rows, args.words)
        command = [sys.executable, "-m", "benchmarks.encoding", "--file", str(path)]
        command += ["--weights", args.weights] if args.weights else []
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "FUNNEL_CACHE": folder})
        found, size = json.loads(done.stdout), path.stat().st_size
    print(f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores\n\n| | |\n|---|---|")
    print(f"| file | {found['rows']:,} rows, {found['tokens']:,} tokens, {size / 2**20:,.0f} MiB |")
    print(f"| read and encoded | {found['first']:.0f} s, {found['rows'] / found['first']:,.0f} rows a second |")
    print(f"| opened from the cache | {found['again']:.1f} s (the file's checksum) |")
    print(f"| ids on disk | {found['tokens'] * 2 / 2**20:,.0f} MiB |")
    print(f"| peak memory | {found['peak'] / 2**20:,.0f} MiB over what the process held before |")


if __name__ == "__main__":
    main()

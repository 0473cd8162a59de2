"""Time and peak memory of reading and tokenizing a large file.

    python -m benchmarks.speed.encoding --rows 1000000 [--words 80] [--weights DIR]

Writes a csv file of generated reviews with the demo task's words, encodes it as train.py does, in a separate process, and opens
it again from the cache. Without --weights, the tokenizer is trained on the demo task. Linux only.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.speed.measure import device_name, process_memory
from funnel.data import demo
from funnel.data.encoding import TextEncoder, encode_examples
from funnel.data.files import ExampleFile
from funnel.data.tokenizer import FunnelTokenizer

MAX_LENGTH = 512


def write_reviews(path: Path, num_rows: int, mean_words: int) -> None:
    """Writes a csv file with class, title and text, every field quoted, as in the data sets of Zhang et al. (2015)."""
    random = np.random.default_rng(0)
    vocabulary = sorted({word for text in demo.examples()[0].texts for word in text.split()})
    with path.open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        for start in range(0, num_rows, 1000):
            lengths = random.poisson(mean_words, min(1000, num_rows - start))
            words = iter(random.integers(0, len(vocabulary), int(lengths.sum())))
            for row, length in enumerate(lengths):
                text = " ".join(vocabulary[next(words)] for _ in range(length))
                writer.writerow([row % 2 + 1, f'a "title", {start + row}', text])


def measure(path: Path, weights: str | None) -> dict[str, float]:
    """Encodes a file twice; returns the seconds of both calls, numbers of rows and tokens, and the growth of peak memory."""
    tokenizer = FunnelTokenizer.load(weights) if weights else FunnelTokenizer.train(demo.examples()[0].texts)
    source = ExampleFile(path, (1, 2), 0, joined=True, escaped=True)
    memory_before = process_memory("VmRSS")
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        dataset = encode_examples(source, TextEncoder({"1": 0, "2": 1}), tokenizer, MAX_LENGTH)
        seconds.append(time.perf_counter() - started)
    return {
        "encoding": seconds[0],
        "opening": seconds[1],
        "rows": len(dataset),
        "tokens": int(dataset.lengths.sum()),
        "memory": process_memory("VmHWM") - memory_before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=80, help="mean number of words per text (default: %(default)s)")
    parser.add_argument("--weights", help="checkpoint folder with a tokenizer")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)  # measure this file, in this process
    args = parser.parse_args()
    if args.file:
        print(json.dumps(measure(args.file, args.weights)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.csv"
        write_reviews(path, args.rows, args.words)
        command = [sys.executable, "-m", "benchmarks.speed.encoding", "--file", str(path)]
        command += ["--weights", args.weights] if args.weights else []
        environment = {**os.environ, "FUNNEL_CACHE": folder}
        process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        result, file_size = json.loads(process.stdout), path.stat().st_size
    rows, tokens, seconds = result["rows"], result["tokens"], result["encoding"]
    print(f"{device_name(torch.device('cpu'))}\n\n| | |\n|---|---|")
    print(f"| file | {rows:,} rows, {tokens:,} tokens, {file_size / 2**20:,.0f} MiB |")
    print(f"| reading and encoding | {seconds:.0f} s, {rows / seconds:,.0f} rows per second |")
    print(f"| opening from the cache | {result['opening']:.1f} s (checksum of the file) |")
    print(f"| token ids on disk | {tokens * 2 / 2**20:,.0f} MiB |")
    print(f"| peak memory | {result['memory'] / 2**20:,.0f} MiB above the initial size of the process |")


if __name__ == "__main__":
    main()

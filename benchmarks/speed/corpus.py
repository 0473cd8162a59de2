"""How fast pretrain.py reads a corpus: tokenizing it once, and making batches without a model.

    python -m benchmarks.speed.corpus --corpus wiki.txt.xz --tokenizer MINILM

Compare the sequences per second with the examples per second that a run of pretrain.py prints.
"""

import argparse
import os
import resource
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from funnel.data.tokenizer import FunnelTokenizer
from funnel.pretraining.batches import PretrainBatches, PretrainData, SequenceFormat
from funnel.pretraining.corpus import prepare_corpus
from funnel.pretraining.masking import Masking

FORMATS: dict[str, dict[str, Any]] = {
    "no masks": {},
    "masks": {"masking": Masking()},
    "masks, pairs": {"masking": Masking(), "pairs": True},
    "whole words": {"masking": Masking(whole_words=True)},
}


def sequences_per_second(batches: PretrainBatches, batch_size: int, count: int) -> tuple[float, float]:
    """Sequences per second, and the share of padding."""
    iterator = batches(batch_size, seed=0)
    next(iterator)
    started = time.perf_counter()
    masks = [batch.attention_mask for batch in islice(iterator, count)]
    seconds = time.perf_counter() - started
    return count * batch_size / seconds, 1 - float(np.mean([mask.float().mean() for mask in masks]))


def main() -> None:
    """Prints one line per measurement."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, nargs="+", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with a tokenizer")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=200)
    options = parser.parse_args()
    tokenizer = FunnelTokenizer.load(options.tokenizer)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FUNNEL_CACHE"] = cache
        for name in ("tokenized", "read again from the cache"):
            wall, cpu = time.perf_counter(), time.process_time()
            corpus = prepare_corpus(options.corpus, tokenizer)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            print(f"{corpus.n_documents:,} documents, {corpus.n_tokens:,} tokens {name} in {wall:.1f} s ({cpu:.1f} s CPU)")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file()) / 1e6
        print(f"peak memory {peak:.0f} MiB, cache {size:.1f} MB")
        for name, settings in FORMATS.items():
            format = SequenceFormat(tokenizer, options.max_length, **settings)
            data = PretrainData.from_corpus(corpus, format, options.batch_size)
            batches = data.batches(data.train_set, torch.device("cpu"))
            rate, padding = sequences_per_second(batches, options.batch_size, options.batches)
            print(f"{name}: {rate:,.0f} sequences/s, {padding:.1%} padding")


if __name__ == "__main__":
    main()

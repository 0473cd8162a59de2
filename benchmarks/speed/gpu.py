"""Speed on a GPU: training steps and attention, compared with transformers, in one command of a few minutes.

    python -m benchmarks.speed.gpu                      # needs a CUDA device, PyTorch, Triton and transformers; no network
    python -m benchmarks.speed.gpu --json rows.jsonl    # also writes the rows, for benchmarks.speed.roofline

A step is what train.py does by default on a GPU (bf16, dropout, clipping, fused AdamW, learning-rate schedule, seeds), on
random token ids. Mode "graphs" captures the step as a CUDA graph, train.py's default; "compiled" adds --compile; "eager" is
--no-cuda-graphs. transformers runs eagerly with the same weights, batches, optimizer and clipping. Times are medians. MFU:
three times the FLOPs of a forward pass, divided by the step's time and by the peak in matrix products, measured here.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.speed.measure import median_timer, synchronize
from benchmarks.speed.models import LoopTrainer, Trainer, funnel_trainer, logits_function, random_batch, transformers_copy
from funnel.data.batches import Batch
from funnel.data.dataset import Dataset, Rows, Truncation
from funnel.data.device_batches import TrainingBatches
from funnel.model.attention_backends import BACKENDS, attention_backend
from funnel.model.attention_terms import AttentionTerms, RelativeTerms
from funnel.model.config import FunnelConfig, parse_blocks
from funnel.model.flops import total_flops
from funnel.model.heads import FunnelForSequenceClassification
from funnel.weights.build import RANDOM_CONFIG
from train import TrainArgs

DEVICE = torch.device("cuda")
NOMINAL_TFLOPS = 989  # bf16 with dense matrices, H100 and H200 SXM
SHAPES = ((32, 128), (128, 128), (16, 512), (8, 2048))  # texts, tokens
ATTENTION_SHAPES = ((128, 128), (16, 512), (8, 2048))
# Number of SST-2's training texts by length: 3 tokens, 4 tokens, … (BERT's uncased vocabulary).
SST2_LENGTHS = (
    "1978 5322 6065 5345 4749 4155 3713 3267 2947 2650 2413 2138 1950 1777 1661 1515 1373 1285 1132 1106 1046 909 820 806 733"
    " 692 628 538 491 442 448 400 337 304 286 242 195 203 192 155 148 130 89 82 85 73 55 42 50 40 36 19 21 22 15 8 6 3 2 5 5 1"
    " 2 2"
)
SMALL = FunnelConfig(blocks=parse_blocks("4,4,4"), num_decoder_layers=0)
MINI = FunnelConfig(blocks=parse_blocks("2,2,2"), num_decoder_layers=0, d_model=384, n_head=12, d_head=32, d_inner=1536)
DEMO = replace(RANDOM_CONFIG, blocks=parse_blocks("2,2,2,2,2,2,2"))
Row = dict[str, Any]


class Settings(NamedTuple):
    """Settings shared by all tables.

    Attributes:
        peak: TFLOP/s of matrix products.
        modes: keys of `MODES`.
        profile: whether to print the kernels of each step of `steps`.
    """

    peak: float
    modes: list[str]
    profile: bool = False


# Modes of a step of funnel: arguments of train.py.
MODES = {"eager": TrainArgs(no_cuda_graphs=True), "graphs": TrainArgs(), "compiled": TrainArgs(compile=True)}


def median_ms(function: Callable[[], Any], repeats: int = 10, warmup: int = 3) -> float:
    """Median time of a call in milliseconds, including the work that it starts on the device."""
    for _ in range(warmup):
        function()
    return 1000 * median_timer(function, DEVICE, repeats)()


def matmul_peak(size: int = 8192) -> float:
    """TFLOP/s of a bf16 matrix product."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: a @ b) / 1e9


def copy_bandwidth() -> float:
    """GB/s read and written by a copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e6


def peak_beyond_state(take_step: Callable[[], Any]) -> float:
    """Peak memory of a step in MiB beyond weights and optimizer state: activations and gradients."""
    take_step()  # creates the optimizer state
    synchronize(DEVICE)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    take_step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def new_model(config: FunnelConfig) -> FunnelForSequenceClassification:
    """A model with random weights, in training mode."""
    torch.manual_seed(0)
    return FunnelForSequenceClassification(config).to(DEVICE).train()


# --- tables -----------------------------------------------------------------------------------------------------------


def attention(settings: Settings) -> Iterator[Row]:
    """Attention alone, as CUDA graphs: 12 heads of 64 channels, bf16, without padding."""
    for batch, length in ATTENTION_SHAPES:
        for scores in ("relative", "content"):
            terms, inputs = random_terms(batch, length, scores == "relative")
            gradient = torch.randn_like(terms.q)
            for name in ("sdpa", "fused") if scores == "relative" and "fused" in BACKENDS else ("sdpa",):
                backend = partial(BACKENDS[name], terms)
                forward = median_ms(graphed(torch.no_grad()(partial(backend, 0.0))))
                both = median_ms(graphed(partial(_backward, backend, inputs, gradient)))
                row = {"table": "attention", "scores": scores, "batch": batch, "length": length, "backend": name}
                yield {**row, "forward_ms": forward, "forward_backward_ms": both}


def _backward(backend: Callable[[float], torch.Tensor], inputs: list[torch.Tensor], gradient: torch.Tensor) -> None:
    torch.autograd.grad(backend(0.1), inputs, gradient)


def random_terms(batch: int, length: int, is_relative: bool) -> tuple[AttentionTerms, list[torch.Tensor]]:
    """Random operands of attention, and those that have a gradient."""
    h, c = 12, 64

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    q, k, v = (random(batch, length, h, c) for _ in range(3))
    q = (q.detach() * c**-0.5).requires_grad_()
    mask = torch.ones(batch, length, dtype=torch.bool, device="cuda")
    if not is_relative:
        return AttentionTerms(q, k, v, mask), [q, k, v]
    r, w_bias, r_bias, segments = random(2 * length, h, c), random(h, c), random(h, c), random(batch, length, h, 4)
    key_segments = torch.ones(batch, length, 4, device="cuda", dtype=torch.bfloat16)
    relative = RelativeTerms(r, w_bias, r_bias, segments, key_segments, 1, True)
    return AttentionTerms(q, k, v, mask, None, relative), [q, k, v, r, w_bias, r_bias, segments]


def graphed(function: Callable[[], Any]) -> Callable[[], None]:
    """The function as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def steps(settings: Settings) -> Iterator[Row]:
    """Training steps of `4,4,4` H768."""
    reference = transformers_copy(new_model(SMALL)).to(DEVICE).train()
    baseline: dict[tuple[int, int], float] = {}
    for shape in SHAPES:
        batch = random_batch(shape, DEVICE)
        peer = Trainer.create(reference, DEVICE, "bf16")
        take_step = partial(peer.step, logits_function(reference, batch), batch.labels)
        memory = peak_beyond_state(take_step)
        baseline[shape] = median_ms(take_step, repeats=7)
        yield step_row("transformers", shape, baseline[shape], settings) | {"memory_mib": memory}
    del reference, peer, take_step
    for name in settings.modes:
        trainer = funnel_trainer(new_model(SMALL), MODES[name], "bf16")  # compiling changes the model
        for shape in SHAPES:
            batch = random_batch(shape, DEVICE)
            started = time.perf_counter()
            memory = peak_beyond_state(partial(trainer.step_without_graph, batch))
            for _ in range(2):  # the second step is captured
                trainer.step(batch)
            synchronize(DEVICE)
            ready = time.perf_counter() - started
            ms = median_ms(partial(trainer.step, batch))
            row = {"ratio": baseline[shape] / ms, "memory_mib": memory, "ready_s": ready}
            yield step_row(name, shape, ms, settings) | row
            if settings.profile:
                print_kernels(partial(trainer.step, batch))


def print_kernels(take_step: Callable[[], None], count: int = 16) -> None:
    """Prints the kernels that take most of a step's time on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        take_step()
        synchronize(DEVICE)
    events = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)
    total = sum(event.device_time_total for event in events)
    print(f"      {total / 1000:.2f} ms in {sum(event.count for event in events)} kernels")
    for event in events[:count]:
        print(f"      {event.device_time_total / 1000:7.3f} ms, {event.count:3d} x {event.key[:100]}")


def step_row(side: str, shape: tuple[int, int], ms: float, settings: Settings) -> Row:
    """One row of `steps`."""
    batch, length = shape
    tflops = 3 * total_flops(SMALL, length, batch) * batch / ms / 1e9
    model = {"blocks": SMALL.layout, "d_model": SMALL.d_model}
    rate = {"ms": ms, "mfu": tflops / settings.peak, "mfu_nominal": tflops / NOMINAL_TFLOPS}
    return {"table": "step", "side": side, **model, "batch": batch, "length": length, **rate}


def real_lengths(settings: Settings) -> Iterator[Row]:
    """Texts with the lengths of SST-2's, batch 32, `2,2,2` H384: texts per second, making the batches included."""
    data = sst2_like()
    reference = transformers_copy(new_model(MINI)).to(DEVICE).train()
    peer = Trainer.create(reference, DEVICE, "bf16")
    batches = TrainingBatches(data, DEVICE)(32, seed=0)

    def train_reference(count: int) -> None:
        for batch in islice(batches, count):
            peer.step(logits_function(reference, batch), batch.labels)

    baseline = 1000 * 32 * 100 / median_ms(partial(train_reference, 100), repeats=3, warmup=1)
    yield {"table": "SST-2 lengths", "side": "transformers", "texts_per_s": baseline}
    for name in settings.modes:
        trainer = funnel_trainer(new_model(MINI), MODES[name], "bf16")
        train_funnel = partial(train_batches, trainer, TrainingBatches(data, DEVICE)(32, seed=0))
        train_funnel(300)  # captures most graphs
        rate = 1000 * 32 * 400 / median_ms(partial(train_funnel, 400), repeats=3, warmup=0)
        row = {"table": "SST-2 lengths", "side": name, "texts_per_s": rate, "ratio": rate / baseline}
        yield {**row, "graphs": trainer.runner.description}


def train_batches(trainer: LoopTrainer, batches: Iterator[Batch], count: int) -> None:
    """Takes steps on the next batches."""
    for batch in islice(batches, count):
        trainer.step(batch)


def sst2_like() -> Dataset:
    """Random token ids with the lengths of SST-2's training set."""
    random = np.random.default_rng(0)
    counts = [int(count) for count in SST2_LENGTHS.split()]
    lengths = random.permutation(np.repeat(np.arange(3, 3 + len(counts)), counts)).astype(np.int32)
    starts = np.concatenate([[0], lengths[:-1].cumsum(dtype=np.int64)])
    labels = random.integers(0, 2, len(lengths)).astype(np.int32)
    rows = Rows(starts, lengths, lengths, labels, np.zeros(len(lengths), np.uint64))
    return Dataset(random.integers(1000, 30000, lengths.sum()).astype(np.uint16), rows, 0, Truncation())


def demo(settings: Settings) -> Iterator[Row]:
    """The demo task: batch 64 x 32, `2,2,2,2,2,2,2` H128."""
    batch = random_batch((64, 32), DEVICE)
    for name in settings.modes:
        ms = median_ms(partial(funnel_trainer(new_model(DEMO), MODES[name], "bf16").step, batch), repeats=20, warmup=5)
        yield {"table": "demo", "side": name, "ms": ms, "steps_per_s": 1000 / ms}


TABLES: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "attention": attention,
    "steps": steps,
    "lengths": real_lengths,
    "demo": demo,
}


def main() -> None:
    """Prints the rows as they are measured."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="modes of a step (default: all)")
    parser.add_argument("--backend", choices=BACKENDS, help="attention backend (default: the GPU's)")
    parser.add_argument("--profile", action="store_true", help="print the kernels that take most of each step's time")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "error: this benchmark needs a CUDA device\n")
    started = time.perf_counter()
    settings = Settings(matmul_peak(), [mode for mode in MODES if mode in options.modes], options.profile)
    machine = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "peak_tflops": settings.peak}
    print(f"{machine['card']}, torch {torch.__version__}: {settings.peak:.0f} TFLOP/s in matrix products, ", end="")
    print(f"{copy_bandwidth():.0f} GB/s in copies")
    with attention_backend(options.backend) if options.backend else contextlib.nullcontext():
        for row in (row for name in options.tables for row in TABLES[name](settings)):
            values = ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
            print(f"[{time.perf_counter() - started:3.0f} s] {values}", flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(machine | row) + "\n")


if __name__ == "__main__":
    main()

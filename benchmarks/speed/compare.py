"""Speed and memory compared with transformers.

    pip install -c constraints.txt -e '.[bench]'
    python -m benchmarks.speed.compare forward                     # logits, and a lower bound from the matrix products
    python -m benchmarks.speed.compare step                        # forward, backward, clipping, AdamW
    python -m benchmarks.speed.compare latency                     # one sentence, all settings, and onnxruntime (extra: onnx)
    python -m benchmarks.speed.compare memory                      # peak beyond the weights, one process per measurement
    python -m benchmarks.speed.compare epoch --data GLUE/SST-2 --weights weights/minilm    # texts per second on real text

Both sides run alternately in one process, with the same weights, inputs, dtype and optimizer. funnel runs with train.py's
memory setting (`keep_freed_memory`), transformers with the C library's defaults; --same-memory uses train.py's setting for
both. "bf16" is autocast with float32 weights, "bf16w" is bfloat16 weights (forward only). --compile adds
torch.compile for both sides, with inductor's freezing in the forward pass; a side that does not compile within
--compile-limit seconds is skipped.

Prints medians and ranges.
"""

import argparse
import contextlib
import json
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.speed.matmul_limit import matmul_limit
from benchmarks.speed.measure import Measurement, alternate, device_name, median_timer, timer
from benchmarks.speed.models import (
    RELEASED_LAYOUT,
    SIDES,
    Logits,
    Trainer,
    build_pair,
    logits_function,
    mixed_precision,
    random_batch,
)
from benchmarks.speed.onnx_models import onnx_runs
from benchmarks.speed.peak_memory import PeakMemory
from benchmarks.speed.real_text import BATCH_SIZE, RealText
from funnel.data.batches import Batch
from funnel.training.device import choose_device
from funnel.weights.build import WeightsArgs

SHAPES = "1,16 1,128 32,16 32,128 8,512 1,4096"
LIMIT = "funnel, matrix products alone"
DISPLAY = {"seconds": (1e3, "ms"), "texts/s": (1.0, "texts/s"), "MiB": (1.0, "MiB")}  # factor and unit by unit


@dataclass(frozen=True)
class Options:
    """The command line; see `parse_arguments`."""

    shapes: list[tuple[int, int]]
    dtypes: list[str]
    blocks: str | None
    rounds: int
    compile: bool
    compile_limit: int
    same_memory: bool
    device: torch.device
    data: Path | None
    weights: str
    steps: int
    trainer_steps: int


class Result(NamedTuple):
    """The measurements of one setting, by side."""

    mode: str
    shape: tuple[int | str, ...]
    dtype: str
    unit: str
    values: dict[str, list[float]]


# --- modes ------------------------------------------------------------------------------------------------------------


def forward(options: Options) -> Iterator[Result]:
    """Times the logits of a classifier."""
    models = build_pair(options.blocks or RELEASED_LAYOUT, options.device)
    for dtype in options.dtypes:
        for shape in options.shapes:
            batch = random_batch(shape, options.device)
            with torch.no_grad(), mixed_precision(options.device, dtype):
                functions = forward_functions(models, batch, dtype, options)
                sides = {side: timer(function, options.device) for side, function in functions.items()}
                sides[LIMIT] = matmul_limit(functions["funnel"], options.device)
                yield Result("forward", shape, dtype, "seconds", alternate(options.rounds, sides, options.same_memory))


def forward_functions(models: dict[str, nn.Module], batch: Batch, dtype: str, options: Options) -> dict[str, Logits]:
    """The functions that compute the logits, eager and, with `options.compile`, compiled. Casts the models for "bf16w"."""
    functions: dict[str, Logits] = {}
    torch._dynamo.reset()  # not between the sides: it would discard the first one's code
    for side, model in models.items():
        model.to(torch.bfloat16 if dtype == "bf16w" else torch.float32)
        functions[side] = logits_function(model, batch)
        if options.compile and (compiled := compile_within(functions[side], options.compile_limit)):
            functions[f"{side}, compiled"] = compiled
    return functions


def step(options: Options) -> Iterator[Result]:
    """Times a training step: forward, backward, clipping, AdamW."""
    for dtype in options.dtypes:
        if dtype == "bf16w":
            continue
        for shape in options.shapes:
            batch = random_batch(shape, options.device)
            sides: dict[str, Measurement] = {}
            torch._dynamo.reset()
            for side, model in build_pair(options.blocks or RELEASED_LAYOUT, options.device).items():
                logits = logits_function(model.train(), batch)
                sides[side] = time_step(model, logits, batch.labels, options.device, dtype)
                if options.compile and (compiled := compile_within(logits, options.compile_limit)):
                    sides[f"{side}, compiled"] = time_step(model, compiled, batch.labels, options.device, dtype)
            yield Result("step", shape, dtype, "seconds", alternate(options.rounds, sides, options.same_memory))


def time_step(model: nn.Module, logits: Logits, labels: torch.Tensor, device: torch.device, dtype: str) -> Measurement:
    """The measurement that times one training step."""
    trainer = Trainer.create(model, device, dtype)
    return timer(lambda: trainer.step(logits, labels), device)


def latency(options: Options) -> Iterator[Result]:
    """Times one sentence of 16 tokens in all settings, to compare the best setting of each side, and onnxruntime."""
    options, shape = replace(options, compile=True), (1, 16)
    batch = random_batch(shape, options.device)
    if options.device.type == "cpu":
        for precision, runs in onnx_runs(build_pair(options.blocks or RELEASED_LAYOUT, options.device), batch).items():
            yield Result("latency, onnxruntime", shape, precision, "seconds", time_latency(runs, options))
    values: dict[str, list[float]] = {}
    with torch.no_grad():
        for dtype in options.dtypes:
            models = build_pair(options.blocks or RELEASED_LAYOUT, options.device)
            with mixed_precision(options.device, dtype):
                times = time_latency(forward_functions(models, batch, dtype, options), options)
            values |= {f"{side}, {dtype}": seconds for side, seconds in times.items()}
    yield Result("latency, PyTorch", shape, "any", "seconds", values)


def time_latency(functions: Mapping[str, Callable[[], Any]], options: Options) -> dict[str, list[float]]:
    """Times functions as they run when nothing else does: several calls in a row."""
    sides = {side: median_timer(function, options.device) for side, function in functions.items()}
    return alternate(options.rounds, sides, options.same_memory)


def memory(options: Options) -> Iterator[Result]:
    """Measures peak memory beyond the weights."""
    layout = options.blocks or RELEASED_LAYOUT
    for mode, dtype, shape in (("forward", "fp32", (1, 4096)), ("step", "bf16", (8, 512)), ("step", "bf16", (32, 128))):
        peaks = {}
        for side in SIDES:
            peaks[side] = [PeakMemory(side, mode, dtype, *shape, layout, options.device.type).measure()]
        yield Result(f"memory, {mode}", shape, dtype, "MiB", peaks)


def epoch(options: Options) -> Iterator[Result]:
    """Measures texts per second in training on real text; see `benchmarks.speed.real_text`."""
    weights = WeightsArgs(options.weights, options.blocks)
    text = RealText.load(options.data, weights, options.device)
    sides = text.measurements(options.steps, options.trainer_steps)
    values = alternate(options.rounds, sides, options.same_memory)
    yield Result(f"training, {text.task.name}", (BATCH_SIZE, "real"), text.dtype, "texts/s", values)


MODES: dict[str, Callable[[Options], Iterator[Result]]] = {
    "forward": forward,
    "step": step,
    "latency": latency,
    "memory": memory,
    "epoch": epoch,
}


# --- compilation ------------------------------------------------------------------------------------------------------


def compile_within(function: Logits, limit: int) -> Logits | None:
    """The compiled function, or None if compiling takes longer than `limit` seconds or fails."""
    import torch._inductor.config as inductor

    compiled: Logits = torch.compile(function)
    try:
        with time_limit(limit), inductor.patch(freezing=not torch.is_grad_enabled()):
            compiled()
    except BaseException as error:  # the compiler wraps TimeoutError in exceptions of its own
        if isinstance(error, KeyboardInterrupt):
            raise
        print(f"  does not compile within {limit} s: {type(error).__name__}", file=sys.stderr)
        return None
    return compiled


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError if the context takes longer than `seconds`; Unix only."""

    def on_alarm(*_: Any) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


# --- command line -----------------------------------------------------------------------------------------------------


def report(result: Result) -> None:
    """Prints one line per side: median, range, and the comparison with funnel's best setting."""
    is_rate = result.unit == "texts/s"
    scale, unit = DISPLAY[result.unit]
    medians = {side: statistics.median(values) for side, values in result.values.items()}
    candidates = [median for side, median in medians.items() if side.startswith("funnel") and side != LIMIT]
    best = max(candidates) if is_rate else min(candidates)
    print(f"\n{result.mode} [{', '.join(map(str, result.shape))}] {result.dtype}", flush=True)
    for side, values in result.values.items():
        median = medians[side]
        ratio = best / median if is_rate else median / best
        if side == LIMIT:
            note = f"   {ratio:.0%} of funnel's time"
        elif side.startswith("funnel"):
            note = ""
        else:
            note = f"   {ratio:.2f}x as much as funnel" if unit == "MiB" else f"   funnel is {ratio:.2f}x as fast"
        low, high = min(values) * scale, max(values) * scale
        print(f"  {side:34s} {median * scale:9.4g} {unit} ({low:.4g} to {high:.4g}){note}")


def parse_shape(text: str) -> tuple[int, int]:
    """ "32,128" -> (32, 128)"""
    texts, length = map(int, text.split(","))
    return texts, length


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--shapes", type=parse_shape, nargs="+", default=[parse_shape(s) for s in SHAPES.split()],
                        help=f"texts,tokens (default: {SHAPES})")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16", "bf16w"), default=["fp32", "bf16", "bf16w"])
    parser.add_argument("--blocks", help=f"layout (default: {RELEASED_LAYOUT}, or that of --weights)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements per side (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    parser.add_argument("--compile-limit", type=int, default=300, help="seconds (default: %(default)s)")
    parser.add_argument("--same-memory", action="store_true", help="use train.py's memory setting on both sides")
    parser.add_argument("--device", type=choose_device, default=choose_device(None))
    parser.add_argument("--data", type=Path, help="epoch: folder with SST-2 (default: the demo task)")
    parser.add_argument("--weights", default="none", help="epoch: as for train.py (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="epoch: steps per measurement (default: %(default)s)")
    parser.add_argument("--trainer-steps", type=int, default=4, help="epoch: the same for the Trainer (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to append the results to, one line each")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    machine = device_name(args.device)
    print(f"{machine}, torch {torch.__version__}")
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    for result in MODES[args.mode](options):
        report(result)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps({"machine": machine, "torch": torch.__version__, **result._asdict()}) + "\n")


if __name__ == "__main__":
    main()

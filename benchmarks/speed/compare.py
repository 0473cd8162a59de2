"""Speed and memory beside transformers: both sides in one process, in turn, medians of several runs.

    pip install -c constraints.txt -e '.[bench]'
    python -m benchmarks.bench forward                       # a classifier's logits, and the limit (products alone)
    python -m benchmarks.bench step                          # forward, backward, clipping, AdamW
    python -m benchmarks.bench latency                       # one sentence, each side's best setting
    python -m benchmarks.bench memory                        # peak over the weights, each run in a process of its own
    python -m benchmarks.bench epoch --data GLUE/SST-2 --weights weights/minilm   # texts a second on real text

Both sides have the same weights, inputs, dtype and optimizer. What differs: ours runs as train.py runs it, with
`training.keep_freed_memory`; transformers with the C library's own memory setting, as everyone runs it. "bf16" is autocast over
float32 weights, "bf16w" is bfloat16 weights (prediction only). The limit is the time of our forward's matrix products
alone, operands and results in place. --compile adds torch.compile for both sides (a side that does not compile within
--compile-limit seconds is given up); ours is compiled with inductor's freezing, transformers' too.

Results are printed as a table and appended to --json as a line each.
"""

import argparse
import contextlib
import ctypes
import functools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from funnel.data.dataset import Batch, encode
from funnel.data.tasks import get_task, locate_files
from funnel.model.checkpoint import Checkpoint
from funnel.model.config import FunnelConfig, parse_blocks
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training import optim as training
from funnel.weights import huggingface
from funnel.weights.build import build_classifier

SHAPES = "1,16 1,128 32,16 32,128 8,512 1,4096"
Side = Callable[[], float]


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes, the device's work included."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def alternate(rounds: int, sides: dict[str, Side], same_memory: bool = False) -> dict[str, list[float]]:
    """Calls the sides in turn, `rounds` times each, and collects what they return.

    Each call that counts follows one that does not: by then a side has the memory again that its setting keeps.
    """
    results: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            set_memory(reuse=same_memory or name.startswith("ours"))
            side()
            results[name].append(side())
    return results


def set_memory(reuse: bool) -> None:
    """Train.py's memory setting, or the C library's own, without what was kept under the former."""
    training.keep_freed_memory(reuse)
    if not reuse:
        give_memory_back()


def give_memory_back() -> None:
    """Hands freed memory back to the system, where the C library can."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def transformers_twin(model: FunnelForSequenceClassification) -> Any:
    """transformers' model with the same weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        saved = Checkpoint(model.config, model.state_dict(), "FunnelForSequenceClassification")
        huggingface.write(Path(folder), saved)
        return transformers.FunnelForSequenceClassification.from_pretrained(folder)


def inputs_of(shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random ids without padding, [b, l], mask, token types, and labels [b]."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, shape, generator=generator)
    types = torch.zeros_like(ids)
    types[:, 0] = 2
    labels = torch.randint(0, 2, shape[:1], generator=generator)
    return ids.to(device), torch.ones_like(ids).to(device), types.to(device), labels.to(device)


def callers(model: Any, peer: Any, inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], Tensor]]:
    """How each side computes logits."""
    ids, mask, types, _ = inputs
    return {
        "ours": lambda: model(ids, mask, types),
        "transformers": lambda: peer(ids, attention_mask=mask, token_type_ids=types).logits,
    }


def in_dtype(model: torch.nn.Module, dtype: str) -> torch.nn.Module:
    return model.bfloat16() if dtype == "bf16w" else model.float()


def context(device: torch.device, dtype: str) -> Any:
    return training.autocast(device, "bf16" if dtype == "bf16" else "fp32")


def compiled(call: Callable[[], Tensor], limit: int) -> Callable[[], Tensor] | None:
    """The call through torch.compile, or None if that takes too long or fails."""
    import torch._inductor.config as inductor

    def stop(*_: Any) -> None:
        raise TimeoutError

    torch._dynamo.reset()
    fast = torch.compile(call)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        with inductor.patch(freezing=not torch.is_grad_enabled()):
            fast()
            return fast
    except BaseException as error:  # TimeoutError comes wrapped in the compiler's own
        if isinstance(error, KeyboardInterrupt):
            raise
        print(f"  does not compile within {limit} s: {type(error).__name__}", file=sys.stderr)
        return None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Products(TorchDispatchMode):
    """Counts the matrix products of what runs within it, by operator, shapes, strides and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm_):
            a, b = args[-2:]
            self.found[(a.shape, a.stride(), b.shape, b.stride(), a.dtype)] += 1
        return func(*args, **(kwargs or {}))


def limit_of(call: Callable[[], Tensor], device: torch.device) -> Side:
    """A side that computes the call's matrix products and nothing else."""
    with Products() as products:
        call()
    work: list[Callable[[], Any]] = []
    for (a_shape, a_stride, b_shape, b_stride, dtype), count in products.found.items():
        product = torch.mm if len(a_shape) == 2 else torch.bmm
        out = None
        for number in range(count):
            if number < 16:  # operands of their own: weights come from memory, not from the cache
                a = torch.empty_strided(a_shape, a_stride, dtype=dtype, device=device).fill_(0.5)
                b = torch.empty_strided(b_shape, b_stride, dtype=dtype, device=device).fill_(0.5)
            out = torch.matmul(a, b) if out is None else out
            work.append(functools.partial(product, a, b, out=out))

    def run() -> None:
        for product in work:
            product()

    return lambda: seconds(run, device)


def forward(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A classifier's logits."""
    model, peer = build(args)
    for dtype in args.dtypes:
        in_dtype(model, dtype), in_dtype(peer, dtype)
        for shape in args.shapes:
            calls = callers(model, peer, inputs_of(shape, args.device))
            with torch.no_grad(), context(args.device, dtype):
                sides = {name: timed(call, args.device) for name, call in calls.items()}
                if args.kind == "forward":
                    sides["ours: limit"] = limit_of(calls["ours"], args.device)
                if args.compile:
                    sides |= {
                        f"{name}, compiled": timed(fast, args.device)
                        for name, call in calls.items()
                        if (fast := compiled(call, args.compile_limit))
                    }
                yield {
                    "what": "forward",
                    "shape": shape,
                    "dtype": dtype,
                    "seconds": alternate(args.rounds, sides, args.same_memory),
                }


def timed(call: Callable[[], Any], device: torch.device) -> Side:
    return lambda: seconds(call, device)


def step(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A training step: forward, backward, clipping, AdamW."""
    for dtype in args.dtypes:
        if dtype == "bf16w":
            continue
        for shape in args.shapes:
            model, peer = build(args)
            sides = {}
            for name, call in callers(model.train(), peer.train(), inputs := inputs_of(shape, args.device)).items():
                module = model if name == "ours" else peer
                sides[name] = timed(stepper(call, module, inputs[3], args.device, dtype), args.device)
                if args.compile and (fast := compiled(call, args.compile_limit)):
                    fast_step = stepper(fast, module, inputs[3], args.device, dtype)
                    sides[f"{name}, compiled"] = timed(fast_step, args.device)
            yield {"what": "step", "shape": shape, "dtype": dtype, "seconds": alternate(args.rounds, sides, args.same_memory)}


def stepper(
    call: Callable[[], Tensor], module: torch.nn.Module, labels: Tensor, device: torch.device, dtype: str
) -> Callable[[], None]:
    """What a step of train.py does, with the same optimizer on both sides."""
    optimizer = torch.optim.AdamW(training.param_groups(module, 0.01), lr=1e-5, eps=1e-6, fused=True)

    return lambda: train_step(call, module, optimizer, labels, device, dtype)


def train_step(
    call: Callable[[], Tensor],
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    labels: Tensor,
    device: torch.device,
    dtype: str,
) -> None:
    with training.autocast(device, dtype):
        logits = call()
    training.loss_function(logits, labels).backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def latency(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One sentence of 16 tokens in every setting; the best one of each side is compared."""
    args.shapes, args.compile = [(1, 16)], True
    results: dict[str, list[float]] = {}
    for result in forward(args):
        results |= {f"{name}, {result['dtype']}": values for name, values in result["seconds"].items()}
    yield {"what": "latency", "shape": (1, 16), "dtype": "any", "seconds": results}


def memory(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Peak memory over the weights, each in a process of its own; of a step, forward and backward, gradients counted.

    The optimizer's state, 8 bytes a weight on either side, is not in it.
    """
    for what, dtype, shape in (("forward", "fp32", (1, 4096)), ("step", "bf16", (8, 512)), ("step", "bf16", (32, 128))):
        peaks = {}
        for side in ("ours", "transformers"):
            peaks[side] = [peak_mib(side, what, dtype, shape, args.blocks, args.device)]
        yield {"what": f"memory, {what}", "shape": shape, "dtype": dtype, "MiB": peaks}


def peak_mib(side: str, what: str, dtype: str, shape: tuple[int, int], blocks: str, device: torch.device) -> float:
    """`peak` in a process of its own, in MiB."""
    command = [sys.executable, "-m", "benchmarks.bench", "peak", "--side", side, "--what", what, "--dtypes", dtype]
    command += ["--shapes", ",".join(map(str, shape)), "--blocks", blocks, "--device", device.type]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) / 2**20


def peak(args: argparse.Namespace) -> int:
    """Bytes at most in use during one run of one side, over what its model held before."""
    model, peer = build(args)
    module = model if args.side == "ours" else peer
    shape, dtype = args.shapes[0], args.dtypes[0]
    training.keep_freed_memory(args.side == "ours")

    def prepare(shape: tuple[int, int]) -> Callable[[], Any]:
        inputs = inputs_of(shape, args.device)
        call = callers(model, peer, inputs)[args.side]
        if args.what == "step":
            module.train()

            def run() -> None:
                with training.autocast(args.device, dtype):
                    logits = call()
                training.loss_function(logits, inputs[3]).backward()
                module.zero_grad(set_to_none=True)

            return run

        def predict() -> None:
            with torch.no_grad(), context(args.device, dtype):
                call()

        return predict

    prepare((2, 8 if args.what == "step" else 64))()  # what is loaded and set up once is no part of it
    run = prepare(shape)
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    give_memory_back()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    run()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of memory that this process has (VmRSS) or had at most (VmHWM); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def epoch(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Texts a second in training on real text: train.py's loop, transformers fed the same batches, and the usual recipe.

    The usual recipe is transformers' Trainer with every text padded to 128, in float32.
    """
    import transformers

    task = locate_files(get_task("sst2" if args.data else "demo"), args.data)
    examples = task.files["train"]
    classes = list((task.labels or {}).values())
    model, tokenizer, *_ = build_classifier(args.weights, classes, args.blocks, texts=examples.iter_texts())
    peer, other = transformers_twin(model).train().to(args.device), transformers_twin(model).to(args.device)
    model.train().to(args.device)
    dataset = encode(examples, task.label_ids, tokenizer, task.max_length)
    dtype = training.choose_dtype(None, args.device, model.config.d_model)
    batches = dataset.training_batches(32, 0, 0)

    def texts_per_second(name: str) -> Side:
        module = model if name == "ours" else peer
        optimizer = torch.optim.AdamW(training.param_groups(module, 0.01), lr=1e-5, eps=1e-6, fused=True)
        ours = list(batches)

        def run() -> float:
            synchronize(args.device)
            started, seen = time.perf_counter(), 0
            for index in [ours.pop() for _ in range(args.steps)]:
                batch = dataset.batch(index).to(args.device)
                if name == "transformers":  # it fails on batches shorter than that
                    short = max(0, 2 ** len(model.config.block_sizes) - batch.input_ids.shape[1])
                    ids, mask, types = (torch.nn.functional.pad(x, (0, short)) for x in batch[:3])
                    batch = Batch(ids, mask, types, batch.labels)
                call = callers(model, peer, tuple(batch))[name]
                train_step(call, module, optimizer, batch.labels, args.device, dtype)
                seen += len(index)
            synchronize(args.device)
            return seen / (time.perf_counter() - started)

        return run

    padded = []
    for row in range(args.trainer_steps * 32):
        ids, mask, types, labels = (
            torch.nn.functional.pad(x[0], (0, 128 - len(x[0]))) if x.dim() > 1 else x[0] for x in dataset.batch(np.array([row]))
        )
        padded.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": labels})

    def usual() -> float:
        with tempfile.TemporaryDirectory() as folder:
            settings = transformers.TrainingArguments(
                folder, num_train_epochs=1, per_device_train_batch_size=32, learning_rate=1e-5, report_to=[],
                save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=args.device.type == "cpu",
            )  # fmt: skip
            trainer = transformers.Trainer(model=other, args=settings, train_dataset=padded)
            trainer.remove_callback(transformers.PrinterCallback)
            return float(trainer.train().metrics["train_samples_per_second"])

    sides = {"ours": texts_per_second("ours"), "transformers, our batches": texts_per_second("transformers")}
    results = alternate(args.rounds, sides | {"transformers, Trainer": usual}, args.same_memory)
    yield {"what": f"training, {task.name}", "shape": (32, "real"), "dtype": dtype, "texts/s": results}


def build(args: argparse.Namespace) -> tuple[FunnelForSequenceClassification, Any]:
    """Both sides' model, of the released small size in the wanted layout."""
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(config_of(args.blocks or "4,4,4"))
    peer = transformers_twin(model)
    return model.eval().to(args.device), peer.eval().to(args.device)


def config_of(layout: str) -> FunnelConfig:
    """The released small size in another layout, without decoder."""
    sizes, repeats = parse_blocks(layout)
    return FunnelConfig(block_sizes=sizes, block_repeats=repeats, num_decoder_layers=0)


def device_name(device: torch.device) -> str:
    """The processor's name, as far as PyTorch or Python can tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(capabilities.get("cpu_name") or platform.processor() or platform.machine())


def report(result: dict[str, Any], file: Path | None) -> None:
    """Prints a line a side (median, range, and how it compares with the best of transformers) and appends all to a file."""
    unit = next(u for u in ("seconds", "texts/s", "MiB") if u in result)
    values: dict[str, list[float]] = result[unit]
    scale, shown = (1e3, "ms") if unit == "seconds" else (1.0, unit)
    better: Callable[..., float] = max if unit == "texts/s" else min
    mine = better(statistics.median(v) for n, v in values.items() if n.startswith("ours") and "limit" not in n)
    print(f"\n{result['what']} {list(result['shape'])} {result['dtype']}".replace("'", ""), flush=True)
    for name, runs in values.items():
        median = statistics.median(runs)
        ratio = median / mine if better is min else mine / median
        note = "" if name.startswith("ours") and "limit" not in name else f"   ours, at best: {ratio:.2f}x"
        if "limit" in name:
            note = f"   {ratio:.0%} of ours"
        print(f"  {name:34s} {median * scale:9.4g} {shown} ({min(runs) * scale:.4g} to {max(runs) * scale:.4g}){note}")
    if file:
        with file.open("a") as out:
            out.write(json.dumps(result) + "\n")


def shape_of(text: str) -> tuple[int, int]:
    texts, length = map(int, text.split(","))
    return texts, length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {"forward": forward, "step": step, "latency": latency, "memory": memory, "epoch": epoch}
    parser.add_argument("kind", choices=(*kinds, "peak"))
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=[shape_of(s) for s in SHAPES.split()],
                        help=f"texts,tokens (default: {SHAPES})")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16", "bf16w"), default=["fp32", "bf16", "bf16w"])
    parser.add_argument("--blocks", default="", help="layout (default: 4,4,4, or that of --weights)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--compile-limit", type=int, default=300, help="seconds (default: %(default)s)")
    parser.add_argument("--same-memory", action="store_true", help="transformers too runs with our memory setting")
    parser.add_argument("--device", type=training.choose_device, default=training.choose_device(None))
    parser.add_argument("--data", type=Path, help="epoch: SST-2's folder (default: the demo task's sentences)")
    parser.add_argument("--weights", default="none", help="epoch: as train.py takes them")
    parser.add_argument("--steps", type=int, default=40, help="epoch: steps a round (default: %(default)s)")
    parser.add_argument("--trainer-steps", type=int, default=4, help="epoch: Trainer's steps a round (default: %(default)s)")
    parser.add_argument("--side", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=("forward", "step"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="file that gets a line a result")
    args = parser.parse_args()
    if args.kind == "peak":
        print(peak(args))
        return
    print(f"{device_name(args.device)}, {os.cpu_count()} cores, torch {torch.__version__}")
    for result in kinds[args.kind](args):
        report({"machine": device_name(args.device), "torch": torch.__version__, **result}, args.json)


if __name__ == "__main__":
    main()

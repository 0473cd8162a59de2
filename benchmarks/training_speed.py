"""Training speed beside transformers, in one process, alternating, medians of several runs.

    pip install -c constraints.txt -e '.[bench]'
    python -m benchmarks.training_speed step                        # a training step of 4,4,4 H768 at [32, 128]
    python -m benchmarks.training_speed recipe --data DIR --weights DIR # SST-2: our loop and the usual recipe

`step` takes the same weights, inputs, dtype and optimizer on both sides. `recipe` is what each side's user gets by
default: transformers' Trainer with every text padded to 128 in float32, and train.py's batches and dtype.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import train
from funnel import training
from funnel.checkpoint import Checkpoint
from funnel.config import FunnelConfig
from funnel.convert import huggingface
from funnel.data import Dataset
from funnel.heads import FunnelForSequenceClassification
from funnel.tasks import get_task

CPU = torch.device("cpu")


def alternate(rounds: int, *sides: Callable[[], float]) -> list[list[float]]:
    """Calls the sides in turn, `rounds` times each after one call that does not count, and collects what they return."""
    results: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds + 1):
        for side, values in zip(sides, results, strict=True):
            value = side()
            if turn:
                values.append(value)
    return results


def peer_of(model: FunnelForSequenceClassification) -> Any:
    """transformers' model with the same weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        saved = Checkpoint(model.config, model.state_dict(), "FunnelForSequenceClassification")
        huggingface.write(Path(folder), saved)
        return transformers.FunnelForSequenceClassification.from_pretrained(folder)


def step(rounds: int) -> None:
    """A training step, forward, backward and optimizer, of the released small layout."""
    torch.manual_seed(0)
    ours = FunnelForSequenceClassification(FunnelConfig(num_decoder_layers=0)).train()
    theirs = peer_of(ours).train()
    ids = torch.randint(1000, 30000, (32, 128))
    mask, labels = torch.ones_like(ids), torch.randint(0, 2, (32,))
    types = torch.zeros_like(ids)
    types[:, 0] = 2
    for dtype in ("fp32", "bf16"):

        def stepper(forward: Callable[[], torch.Tensor], model: torch.nn.Module, dtype: str = dtype) -> Callable[[], float]:
            optimizer = torch.optim.AdamW(training.parameter_groups(model, 0.01), lr=1e-5, eps=1e-6, fused=True)

            def run() -> float:
                started = time.perf_counter()
                with training.autocast(CPU, dtype):
                    logits = forward()
                training.loss_function(logits, labels).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                return time.perf_counter() - started

            return run

        mine, peers = alternate(
            rounds,
            stepper(lambda: ours(ids, mask, types), ours),
            stepper(lambda: theirs(ids, attention_mask=mask, token_type_ids=types).logits, theirs),
        )
        report(f"step [32, 128], 4,4,4 H768, {dtype}", "s", mine, peers, statistics.median(peers) / statistics.median(mine))


def recipe(data: Path | None, weights: str, rounds: int) -> None:
    """Examples a second in training: our loop's batches and dtype, and transformers' Trainer padding to 128 in float32."""
    import transformers

    training.reuse_memory()
    task = get_task("sst2" if data else "demo")
    examples, _ = task.load(data)
    model, tokenizer, _ = train.start_model(weights, task, None, "identity", examples.texts)
    theirs = peer_of(model)
    dataset = Dataset(examples, tokenizer, task.max_length)
    dtype = training.choose_dtype(None, CPU, model.config.d_model)
    optimizer = torch.optim.AdamW(training.parameter_groups(model, 0.01), lr=1e-5, eps=1e-6, fused=True)
    batches = dataset.training_batches(32, 0, 0)
    padded = []
    for row in range(6 * 32):
        encoding = tokenizer.encode([examples.texts[row]], max_length=128)[0]
        fill = 128 - len(encoding.input_ids)
        padded.append(
            {
                "input_ids": encoding.input_ids + [tokenizer.pad_id] * fill,
                "token_type_ids": encoding.token_type_ids + [0] * fill,
                "attention_mask": [1] * len(encoding.input_ids) + [0] * fill,
                "labels": examples.labels[row],
            }
        )

    def ours() -> float:
        model.train()
        started, seen = time.perf_counter(), 0
        for index in [batches.pop() for _ in range(40)]:
            batch = dataset.batch(index)
            with training.autocast(CPU, dtype):
                logits = model(batch.input_ids, batch.attention_mask, batch.token_type_ids)
            training.loss_function(logits, batch.labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen += len(index)
        return seen / (time.perf_counter() - started)

    def usual() -> float:
        with tempfile.TemporaryDirectory() as folder:
            settings = transformers.TrainingArguments(
                folder, num_train_epochs=1, per_device_train_batch_size=32, learning_rate=1e-5, report_to=[],
                save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
            )  # fmt: skip
            trainer = transformers.Trainer(model=theirs, args=settings, train_dataset=padded)
            trainer.remove_callback(transformers.PrinterCallback)
            return float(trainer.train().metrics["train_samples_per_second"])

    mine, peers = alternate(rounds, ours, usual)
    ratio = statistics.median(mine) / statistics.median(peers)
    report(
        f"{task.name}, {model.config.layout} H{model.config.d_model}, ours {dtype}, Trainer fp32",
        "texts/s",
        mine,
        peers,
        ratio,
    )


def cpu_name() -> str:
    """The processor's name, as far as PyTorch or Python can tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(capabilities.get("cpu_name") or platform.processor() or platform.machine())


def report(title: str, unit: str, ours: list[float], theirs: list[float], ratio: float) -> None:
    """One line a comparison: median and range of both sides, and how many times faster ours is."""
    sides = [f"{statistics.median(v):.3g} {unit} ({min(v):.3g} to {max(v):.3g})" for v in (ours, theirs)]
    print(f"{title}: ours {sides[0]}, transformers {sides[1]}; ours is {ratio:.2f}x as fast", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "recipe"))
    parser.add_argument("--data", type=Path, help="SST-2's folder (default: the demo task's sentences)")
    parser.add_argument("--weights", default="none", help="as train.py takes them")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}")
    step(args.rounds) if args.what == "step" else recipe(args.data, args.weights, args.rounds)


if __name__ == "__main__":
    main()

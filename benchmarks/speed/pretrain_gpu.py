"""Tokens per second and MFU of pretraining a base-size model, in one command of a few minutes.

    python -m benchmarks.speed.pretrain_gpu                    # needs PyTorch and a CUDA device; no network, no corpus
    python -m benchmarks.speed.pretrain_gpu --device cpu --d-model 128 --vocab 8000 --batch-size 8
    python -m benchmarks.speed.pretrain_gpu --assume-tflops 132   # measures nothing: the paper's runs at this rate

Steps are those of pretrain.py (bf16, dropout, clipping, fused AdamW, CUDA graphs on a GPU), on random token ids without
padding. The teacher of the distillation is a BERT of the same width with as many layers. MFU: the FLOPs of a step's matrix
products (three times those of the forward pass; for the teacher, once), divided by its time and by the peak of matrix products,
measured here. Below each row, an extrapolation to the paper's runs.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.measure import median_timer, synchronize
from benchmarks.speed.models import LoopTrainer
from funnel.data.batches import Batch
from funnel.model.attention_backends import attention_backend
from funnel.model.config import FunnelConfig, parse_blocks
from funnel.model.heads import FunnelForMaskedLM, FunnelForPreTraining, FunnelModel
from funnel.pretraining.distill import Distillation
from funnel.pretraining.electra import Electra
from funnel.pretraining.mlm import MaskedLanguageModel
from funnel.pretraining.objective import Objective, objective_loss
from pretrain import PretrainArgs, train_step

MASK_SHARE = 0.15
PAPER_TOKENS = 1_000_000 * 256 * 512  # of a pretraining run (paper, table 7: steps, batch size, length)
GPUS = 8  # of the estimate


def build(name: str, config: FunnelConfig) -> Objective:
    """An objective for a model of this size."""
    torch.manual_seed(0)
    if name == "electra":
        return Electra(FunnelForPreTraining(config))
    if name == "mlm":
        return MaskedLanguageModel(FunnelForMaskedLM(config.replace(lm_head_transform=True)))
    layers = sum(block.runs for block in config.blocks)
    bert = {"relative_attention": False, "position_embeddings": 512, "token_type_embeddings": 2, "num_decoder_layers": 0}
    return Distillation(FunnelModel(config), FunnelModel(config.replace(blocks=str(layers), **bert)))


def random_batch(shape: tuple[int, int], vocab_size: int) -> Batch:
    """A batch in the form that `funnel.pretraining.objective` describes. Shape: sequences, tokens."""
    b, length = shape
    m = round(MASK_SHARE * (length - 2))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size // 10, vocab_size, shape, generator=generator)
    types = torch.zeros_like(ids)
    types[:, 0] = 2
    positions = torch.stack([torch.randperm(length - 2, generator=generator)[:m].sort().values + 1 for _ in range(b)])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": types,
        "token_weights": torch.full(shape, 1 / ids.numel()),
        "masked_ids": ids.scatter(1, positions, 3),
        "positions": positions,
        "position_weights": torch.full(positions.shape, 1 / positions.numel()),
        "uniforms": torch.rand(positions.shape, generator=generator),
    }
    return Batch(inputs, ids.gather(1, positions))


def training_flops(objective: Objective, batch: Batch) -> int:
    """FLOPs of a training step: three times those of the forward pass, once for modules that are not trained."""
    total, forward_only = 0, 0
    with torch.no_grad(), FlopCounterMode(display=False) as counter, attention_backend("eager"):
        objective_loss(objective, batch)
    total = counter.get_total_flops()
    if isinstance(objective, Distillation):
        inputs = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
        with FlopCounterMode(display=False) as counter, attention_backend("eager"):
            objective.teacher(inputs, with_decoder=True)
        forward_only = counter.get_total_flops()
    return 3 * (total - forward_only) + forward_only


def median_seconds(function: Callable[[], Any], device: torch.device, repeats: int = 7, warmup: int = 3) -> float:
    """Median time of a call, including the work that it starts on the device."""
    for _ in range(warmup):
        function()
    return median_timer(function, device, repeats)()


def matmul_peak(device: torch.device) -> float:
    """FLOP/s of a bf16 matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, device)


def count_flops(name: str, options: argparse.Namespace) -> tuple[FunnelConfig, int]:
    """The model's sizes, and the FLOPs of a training step."""
    config = FunnelConfig(
        vocab_size=options.vocab,
        blocks=parse_blocks(options.blocks),
        d_model=options.d_model,
        n_head=max(1, options.d_model // 64),
        d_inner=4 * options.d_model,
    )
    batch = random_batch((options.batch_size, options.length), config.vocab_size).map(lambda t: t.to("meta"))
    with torch.device("meta"):
        return config, training_flops(build(name, config), batch)


def estimate(tokens_per_s: float) -> str:
    """How long the paper's pretraining takes at this rate per device."""
    days = PAPER_TOKENS / tokens_per_s / 86400
    return f"  1M steps x 256 x 512 tokens: {days:.1f} days on one device, {days / GPUS:.1f} on {GPUS} with linear scaling"


def measure(name: str, options: argparse.Namespace, peak: float) -> dict[str, Any]:
    """Times the training step of one objective."""
    config, flops = count_flops(name, options)
    device, shape = torch.device(options.device), (options.batch_size, options.length)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    args = PretrainArgs(objective="mlm", corpus=(Path("unused"),), dtype="bf16", compile=options.compile)
    started = time.perf_counter()
    module: nn.Module = build(name, config).to(device).train()
    trainer = LoopTrainer(module, objective_loss, train_step, args)
    batch = random_batch(shape, config.vocab_size).to(device)
    for _ in range(3):  # the second step is captured
        trainer.step(batch)
    synchronize(device)
    ready = time.perf_counter() - started
    seconds = median_seconds(partial(trainer.step, batch), device)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    rate = shape[0] * shape[1] / seconds
    model = {"objective": name, "blocks": options.blocks, "d_model": options.d_model}
    speed = {"ms": 1000 * seconds, "tokens_per_s": rate, "mfu": flops / seconds / peak, "gib": memory, "ready_s": ready}
    return {**model, "batch": shape[0], "length": shape[1], **speed}


def main() -> None:
    """Prints the rows as they are measured."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", choices=("electra", "mlm", "distill"), default=["electra", "mlm", "distill"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", default="4,4,4")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=30522)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    parser.add_argument("--assume-tflops", type=float, help="estimate the paper's runs from this rate of matrix products")
    options = parser.parse_args()
    if options.assume_tflops:
        for name in options.objectives:
            _, flops = count_flops(name, options)
            tokens = options.batch_size * options.length
            print(f"{name}: {flops / tokens / 1e6:.0f} MFLOPs per token")
            print(estimate(options.assume_tflops * 1e12 / flops * tokens))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "error: no CUDA device; try --device cpu with a smaller model\n")
    device = torch.device(options.device)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = matmul_peak(device)
    print(f"{card}, torch {torch.__version__}: {peak / 1e12:.3g} TFLOP/s in bf16 matrix products")
    for name in options.objectives:
        row = measure(name, options, peak)
        print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
        print(estimate(row["tokens_per_s"]), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps({"card": card, "torch": torch.__version__, "peak_tflops": peak / 1e12, **row}) + "\n")


if __name__ == "__main__":
    main()

"""The models that are compared: funnel's classifier, and that of transformers with the same weights."""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funnel.data.dataset import Batch
from funnel.model.checkpoint import Checkpoint
from funnel.model.config import FunnelConfig, parse_blocks
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training.device import autocast
from funnel.training.evaluate import loss_function
from funnel.training.optim import param_groups
from funnel.weights.huggingface import write_huggingface

SIDES = ("funnel", "transformers")
RELEASED_LAYOUT = "4,4,4"
Logits = Callable[[], Tensor]  # computes the logits of a fixed batch


def small_config(layout: str) -> FunnelConfig:
    """`funnel-transformer/small` in any layout, without a decoder."""
    return FunnelConfig(blocks=parse_blocks(layout), num_decoder_layers=0)


def build_pair(layout: str, device: torch.device) -> dict[str, nn.Module]:
    """Both models with the same random weights, in evaluation mode."""
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(small_config(layout))
    return {
        "funnel": model.eval().to(device),
        "transformers": transformers_copy(model).eval().to(device),
    }


def transformers_copy(model: FunnelForSequenceClassification) -> Any:
    """transformers' model with the same weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(model.config, model.state_dict(), "FunnelForSequenceClassification")
        write_huggingface(Path(folder), checkpoint)
        return transformers.FunnelForSequenceClassification.from_pretrained(folder)


def random_batch(shape: tuple[int, int], device: torch.device) -> Batch:
    """Random token ids [b, l] without padding, and random labels [b]."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, shape, generator=generator)
    token_types = torch.zeros_like(ids)
    token_types[:, 0] = 2
    labels = torch.randint(0, 2, shape[:1], generator=generator)
    return Batch(ids, torch.ones_like(ids), token_types, labels).to(device)


def logits_function(model: nn.Module, batch: Batch) -> Logits:
    """The function that computes a side's logits, [b, 2]."""

    def logits() -> Tensor:
        output = model(**batch.inputs)
        return output if isinstance(output, Tensor) else output.logits  # transformers returns an object

    return logits


def mixed_precision(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Autocast for "bf16"; "bf16w" has bfloat16 weights and needs none."""
    return autocast(device, "bf16" if dtype == "bf16" else "fp32")


@dataclass(frozen=True)
class Trainer:
    """A model with the optimizer that both sides use; `step` does what a step of train.py does."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    dtype: str

    @classmethod
    def create(cls, model: nn.Module, device: torch.device, dtype: str) -> "Trainer":
        """A trainer with a new optimizer."""
        optimizer = torch.optim.AdamW(param_groups(model, 0.01), lr=1e-5, eps=1e-6, fused=True)
        return cls(model, optimizer, device, dtype)

    def step(self, logits: Logits, labels: Tensor) -> None:
        """Forward, backward, clipping, AdamW."""
        with autocast(self.device, self.dtype):
            output = logits()
        loss_function(output, labels).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

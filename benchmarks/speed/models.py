"""The models that are compared: funnel's classifier, and that of transformers with the same weights."""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnel.data.batches import Batch, text_batch
from funnel.model.checkpoint import Checkpoint
from funnel.model.config import FunnelConfig, parse_blocks
from funnel.model.heads import FunnelForSequenceClassification, FunnelPreTrainedModel
from funnel.problems.classification import Classification
from funnel.training.args import RunArgs
from funnel.training.cuda_graphs import step_runner
from funnel.training.device import autocast, seed_step
from funnel.training.distributed import Distributed
from funnel.training.divergence import NonFiniteGuard
from funnel.training.loss import TaskLoss
from funnel.training.optim import LinearWarmupDecay, build_adamw, param_groups
from funnel.training.state import TrainComponents, TrainState
from funnel.weights.huggingface import write_huggingface
from train import TrainArgs, train_step

SIDES = ("funnel", "transformers")
RELEASED_LAYOUT = "4,4,4"
Logits = Callable[[], Tensor]  # computes the logits of a fixed batch
Loss = Callable[[nn.Module, Batch], Tensor]  # as in TrainComponents


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


def transformers_copy(model: FunnelPreTrainedModel) -> Any:
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
    return text_batch(ids, torch.ones_like(ids), token_types, labels).to(device)


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
    """A model with the optimizer that both sides use, and a plain training step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    dtype: str

    @classmethod
    def create(cls, model: nn.Module, device: torch.device, dtype: str) -> "Trainer":
        """A trainer with a new optimizer."""
        optimizer = build_adamw(param_groups(model, 0.01), 1e-5)
        return cls(model, optimizer, device, dtype)

    def step(self, logits: Logits, labels: Tensor) -> None:
        """Forward, backward, clipping, AdamW."""
        with autocast(self.device, self.dtype):
            output = logits()
        F.cross_entropy(output.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class LoopTrainer:
    """Takes steps as train.py or pretrain.py does; `step` returns without waiting for the device.

    Args:
        module: what is trained: a classifier, or an objective.
        loss: computes the loss of a batch, as in `TrainComponents`.
        take_step: the script's `train_step`.
        args: the script's arguments.
    """

    def __init__(self, module: nn.Module, loss: Loss, take_step: Callable[..., Tensor], args: RunArgs) -> None:
        device = next(module.parameters()).device
        dist = Distributed(device)
        wrapped = dist.wrap(module, compile=args.compile)
        optimizer = build_adamw(param_groups(module, args.weight_decay), 1e-5, dist.graph_device)
        self.schedule = LinearWarmupDecay(optimizer, 1e-5, range(10**6), 0.1)
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        unused: Any = None  # model and tokenizer, which only evaluations and checkpoints use
        components = TrainComponents(dist, unused, wrapped, unused, optimizer, scaler, args.dtype or "bf16", loss)
        guard = NonFiniteGuard(components, lambda start: iter(()), self.schedule, args)
        self.state = TrainState()
        self.runner = step_runner(partial(take_step, args=args, components=components, guard=guard), components, args)

    def step(self, batch: Batch) -> None:
        """One turn of the loop, without logging."""
        self.schedule.set(self.state.step)
        seed_step(0, self.state.step, 0)
        self.state.record_step(self.runner(batch))

    def step_without_graph(self, batch: Batch) -> None:
        """Runs the step eagerly, to measure its memory; advances neither schedule nor seed."""
        self.runner.step(batch)


def funnel_trainer(model: FunnelPreTrainedModel, args: TrainArgs, dtype: str) -> LoopTrainer:
    """Takes train.py's steps."""
    return LoopTrainer(model, TaskLoss(Classification(model.config)), train_step, replace(args, dtype=dtype))

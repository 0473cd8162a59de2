"""Optimizer settings: parameter groups, learning-rate schedule, gradient clipping."""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: weight matrices with weight decay; biases and LayerNorms without.

    They are distinguished by name, which also works for transformers' models.
    """
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (not_decayed if re.search("bias|norm", name, re.IGNORECASE) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]


def build_adamw(groups: list[dict[str, Any]], lr: float, capture_on: torch.device | None = None) -> torch.optim.AdamW:
    """AdamW whose steps can be skipped on the device, by setting `found_inf`.

    Args:
        groups: as from `param_groups`.
        capture_on: the device of CUDA graphs that may contain its steps; the learning rate is then a tensor, which a graph
            reads at each replay.
    """
    rate = lr if capture_on is None else torch.tensor(lr, device=capture_on)
    optimizer = torch.optim.AdamW(groups, lr=rate, eps=1e-6, fused=True, capturable=capture_on is not None)
    optimizer.register_step_post_hook(_forget_grad_scale)
    return optimizer


def _forget_grad_scale(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Makes a later step without clipping one without a scale."""
    optimizer.grad_scale = None  # type: ignore[attr-defined]


class LinearWarmupDecay:
    """The learning rate: linear warmup from 0 to its peak, then linear decay to 0 (paper, section A.3).

    A function of the step, so resuming needs no state of its own.

    Args:
        lr: peak learning rate.
        steps: the steps of the schedule, counted from 0; they start later if a run is extended.
        warmup: fraction of these steps used for warmup.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, lr: float, steps: range, warmup: float) -> None:
        self.optimizer, self.peak, self.steps = optimizer, lr, steps
        self.warmup_steps = max(1, math.ceil(len(steps) * warmup))

    def at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = (step - self.steps.start + 1) / self.warmup_steps
        fall = (self.steps.stop - step) / max(1, len(self.steps) - self.warmup_steps)
        return self.peak * min(rise, fall)

    @property
    def lr(self) -> float:
        """The current learning rate; waits for the device if it is a tensor there."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set(self, step: int) -> None:
        """Sets the learning rate of all parameter groups; a tensor is filled, without waiting for the device."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.at(step))
            else:
                group["lr"] = self.at(step)


def clip_grad_norm(model: nn.Module, max_norm: float, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    """Limits the gradients' global norm to `max_norm`; returns the norm before clipping, on the device.

    Args:
        optimizer: if given, one from `build_adamw`, which divides the gradients during its next step; otherwise they are scaled
            here, in another pass. So they are on devices whose fused kernels ignore `grad_scale` (MPS).
    """
    if optimizer is None or next(model.parameters()).device.type not in ("cpu", "cuda"):
        return full_tensor(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    norm = full_tensor(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    optimizer.grad_scale = (norm.float() / max_norm).clamp(min=1)  # type: ignore[attr-defined]  # a divisor
    return norm


def full_tensor(tensor: Tensor) -> Tensor:
    """Gathers a sharded tensor from all ranks, which must call this together; returns any other unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

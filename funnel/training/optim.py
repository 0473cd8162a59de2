"""Optimizer settings: parameter groups, learning-rate schedule, gradient clipping."""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

MAX_WARMUP_STEPS = 10_000  # of the default warmup in pretraining (google-research/electra)
LAYER = re.compile(r"(encoder\.blocks\.\d+|decoder\.layers)\.\d+\.")  # prefix of the names of one layer's parameters


def param_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups for AdamW: weight matrices with weight decay; biases and LayerNorms without. There are two, or with layer-wise
    learning-rate decay two per layer.

    They are distinguished by name, which also works for transformers' models. Frozen parameters are in no group.

    Args:
        layer_decay: factor between the learning rates of a layer and of the one after it, so that layers close to the input
            learn more slowly. Each group has its factor of the peak learning rate as `lr_scale`. With 1, the groups have none.
    """
    scales = {} if layer_decay == 1 else layer_lr_scales(model, layer_decay)
    groups: dict[tuple[float | None, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_decayed = re.search("bias|norm", name, re.IGNORECASE) is None
        groups.setdefault((scales.get(name), is_decayed), []).append(parameter)
    return [
        {
            "params": params,
            "weight_decay": weight_decay if is_decayed else 0.0,
            **({} if scale is None else {"lr_scale": scale}),
        }
        for (scale, is_decayed), params in sorted(groups.items(), key=lambda item: (-(item[0][0] or 0), -item[0][1]))
    ]


def layer_lr_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """The factor of the learning rate of each parameter of a Funnel model, by name.

    It is layer_decay ** (n_layers + 2 - depth), as in ELECTRA's code (github.com/google-research/electra, `_get_layer_lrs` in
    model/optimization.py): the embeddings have depth 0, layer i has depth i + 1, the head has depth n_layers + 2. Layers are
    numbered through all blocks and the decoder; the distance bias, which all of them share, counts as an embedding.
    """
    names = [name for name, _ in model.named_parameters()]
    layers = list(dict.fromkeys(match[0] for name in names if (match := LAYER.match(name))))
    depths = {layer: index + 1 for index, layer in enumerate(layers)}
    head = len(layers) + 2

    def depth(name: str) -> int:
        if match := LAYER.match(name):
            return depths[match[0]]
        return 0 if name.startswith(("embeddings.", "encoder.")) else head

    return {name: layer_decay ** (head - depth(name)) for name in names}


def build_adamw(groups: list[dict[str, Any]], lr: float, capture_on: torch.device | None = None) -> torch.optim.AdamW:
    """AdamW whose steps can be skipped on the device, by setting `found_inf`.

    Args:
        groups: as from `param_groups`.
        lr: peak learning rate, multiplied by a group's `lr_scale`.
        capture_on: the device of CUDA graphs that may contain its steps; the learning rates are then tensors, which a graph
            reads at each replay.
    """
    groups = [{**group, "lr": lr * _lr_scale(group)} for group in groups]
    if capture_on is not None:
        groups = [{**group, "lr": torch.tensor(group["lr"], device=capture_on)} for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=groups[0]["lr"], eps=1e-6, fused=True, capturable=capture_on is not None)
    optimizer.register_step_post_hook(_forget_grad_scale)
    return optimizer


def _lr_scale(group: dict[str, Any]) -> float:
    """A parameter group's factor of the learning rate."""
    return float(group.get("lr_scale", 1.0))


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
        """The current learning rate, of the group with the highest one; waits for the device if it is a tensor there."""
        return float(max(self.optimizer.param_groups, key=_lr_scale)["lr"])

    def set(self, step: int) -> None:
        """Sets the learning rate of all parameter groups; a tensor is filled, without waiting for the device."""
        for group in self.optimizer.param_groups:
            lr = self.at(step) * _lr_scale(group)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


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

"""Dropout with a fast CPU implementation.

PyTorch samples CPU masks one Bernoulli variable at a time, which takes a tenth of a training step. Here, each 64-bit random
number provides the mask of four elements, 16 bits each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 65536  # values of 16 random bits


def keep_mask(shape: tuple[int, ...], p: float, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Samples a dropout mask: 0 with probability p, else 1 / (1 - p), in the dtype and on the device of `like`.

    p is rounded to a multiple of 1 / 65536. The scale is that of the rounded p, so the mask's expected value is exactly 1.

    Args:
        generator: random number generator; default: PyTorch's global one.
    """
    dropped = round(p * LEVELS)  # this many of the LEVELS values mean "drop"
    if like.device.type == "cpu":
        size = torch.Size(shape).numel()
        words = torch.empty((size + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        bits = words.view(torch.int16)[:size].view(shape)
    else:
        bits = torch.empty(shape, dtype=torch.int16, device=like.device).random_(-(2**15), 2**15, generator=generator)
    keep = bits.ge_(dropped - LEVELS // 2)  # 0 or 1; the smallest int16 is -LEVELS / 2; slower on CPUs with a boolean result
    return keep.to(like.dtype).mul_(LEVELS / (LEVELS - dropped))


def dropout(x: Tensor, p: float) -> Tensor:
    """Sets elements to zero with probability p and scales the others by 1 / (1 - p).

    Uses `keep_mask` on a CPU, PyTorch's dropout on other devices and under torch.compile.
    """
    if p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return x * keep_mask(x.shape, p, x)


class Dropout(nn.Module):
    """Applies `dropout` in training mode; the identity in evaluation mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x

    def extra_repr(self) -> str:
        return f"p={self.p}"

"""Dropout with masks that cost little on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LANES = 65536  # values of 16 random bits


class Dropout(nn.Module):
    """Sets elements to zero with probability p in training and scales the others by 1 / (1 - p).

    PyTorch draws a CPU mask one Bernoulli number after another, which takes a tenth of a training step. Here one 64-bit
    number serves four elements, 16 bits each; p is rounded to a multiple of 1 / 65536 and the scale is that of the
    rounded p, so the mean is exact. On other devices and under torch.compile it is PyTorch's own.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        dropped = round(self.p * LANES)  # of LANES values
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        lanes = bits.view(torch.int16)[: x.numel()].view(x.shape)
        keep = lanes >= dropped - LANES // 2  # int16 starts at -LANES / 2
        return x * keep.to(x.dtype).mul_(LANES / (LANES - dropped))

    def extra_repr(self) -> str:
        return f"p={self.p}"

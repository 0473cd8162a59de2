"""Dropout with masks that cost little on a CPU, and that do not depend on how many processes share a batch."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LANES = 65536  # values of 16 random bits


class Share(NamedTuple):
    """The rows of a batch that this process computes: those from `first` on, of `total`."""

    first: int
    total: int


_share: Share | None = None


@contextlib.contextmanager
def share_of_batch(first: int, total: int) -> Iterator[None]:
    """Within it, forward and backward are of some rows of a batch only, and CPU masks are those rows of the batch's masks.

    Each process draws the masks of the whole batch and keeps its own rows, so that any number of processes, seeded
    alike, train with the same masks. Masks on other devices are each process's own.
    """
    global _share
    before, _share = _share, Share(first, total)
    try:
        yield
    finally:
        _share = before


def current_share() -> Share | None:
    """The rows that `share_of_batch` says; None for a whole batch."""
    return _share


def keep_mask(shape: tuple[int, ...], p: float, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A mask of dropout: zero with probability p, else 1 / (1 - p), in the dtype and on the device of `like`.

    PyTorch draws a CPU mask one Bernoulli number after another, which takes a tenth of a training step. Here one 64-bit
    number serves four elements, 16 bits each; p is rounded to a multiple of 1 / 65536 and the scale is that of the
    rounded p, so the mean is exact.

    Args:
        generator: draws the numbers; None means PyTorch's common one.
    """
    dropped = round(p * LANES)  # of LANES values
    if like.device.type == "cpu":
        size = torch.Size(shape).numel()
        bits = torch.empty((size + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        lanes = bits.view(torch.int16)[:size].view(shape)
    else:
        lanes = torch.empty(shape, dtype=torch.int16, device=like.device).random_(-(2**15), 2**15, generator=generator)
    keep = lanes >= dropped - LANES // 2  # int16 starts at -LANES / 2
    return keep.to(like.dtype).mul_(LANES / (LANES - dropped))


def dropout(x: Tensor, p: float, by_text: bool = True) -> Tensor:
    """Sets elements to zero with probability p and scales the others by 1 / (1 - p).

    On a CPU with `keep_mask`; on other devices and under torch.compile it is PyTorch's own.

    Args:
        by_text: whether the first dimension is the texts of the batch.
    """
    if p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    if by_text and _share is not None:
        return x * keep_mask((_share.total, *x.shape[1:]), p, x)[_share.first : _share.first + len(x)]
    return x * keep_mask(x.shape, p, x)


class Dropout(nn.Module):
    """`dropout` in training, nothing in evaluation."""

    def __init__(self, p: float, by_text: bool = True) -> None:
        super().__init__()
        self.p, self.by_text = p, by_text

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.by_text) if self.training else x

    def extra_repr(self) -> str:
        return f"p={self.p}"

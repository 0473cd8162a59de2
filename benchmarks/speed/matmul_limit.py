"""Lower bound on the time of a forward pass: its matrix products alone, with operands and results already allocated."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed.measure import Measurement, timer

MATMULS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm_)
MAX_OPERANDS = 16  # pairs of operands allocated per shape


class MatmulCounter(TorchDispatchMode):
    """Counts the matrix products that run within the context, by the operands' shapes, strides and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in MATMULS:
            a, b = args[-2:]
            self.counts[(a.shape, a.stride(), b.shape, b.stride(), a.dtype)] += 1
        return func(*args, **(kwargs or {}))


def matmul_limit(function: Callable[[], Any], device: torch.device) -> Measurement:
    """The measurement that times only the matrix products of a function."""
    with MatmulCounter() as counter:
        function()
    products: list[Callable[[], Any]] = []
    for (a_shape, a_stride, b_shape, b_stride, dtype), count in counter.counts.items():
        matmul = torch.mm if len(a_shape) == 2 else torch.bmm
        out = None
        for number in range(count):
            if number < MAX_OPERANDS:  # separate operands, so that weights come from memory and not from the cache
                a = torch.empty_strided(a_shape, a_stride, dtype=dtype, device=device).fill_(0.5)
                b = torch.empty_strided(b_shape, b_stride, dtype=dtype, device=device).fill_(0.5)
            out = torch.matmul(a, b) if out is None else out
            products.append(functools.partial(matmul, a, b, out=out))

    def run() -> None:
        for product in products:
            product()

    return timer(run, device)

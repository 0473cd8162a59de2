"""Weights stored in 8 or 4 bits, for small files. They are read as float32; computation is not quantized.

Each row of a matrix is stored as integers with a scale, the largest absolute value divided by 127 or 7. A matrix NAME has the
scales NAME.scale, float16 [rows]. 8-bit integers are int8 [rows, columns]; two 4-bit integers share a byte, uint8
[rows, columns / 2], the first in its lower half, each plus 8.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

SCALE = ".scale"
OFFSET = 8  # of 4-bit integers


def quantize(weights: Mapping[str, Tensor], in_4_bits: Collection[str] = ()) -> dict[str, Tensor]:
    """Matrices in 8 or 4 bits, other weights in float16.

    Args:
        in_4_bits: names of matrices with an even number of columns.
    """
    quantized = {}
    for name, tensor in weights.items():
        if tensor.dim() != 2:
            quantized[name] = tensor.half()
            continue
        largest = 7 if name in in_4_bits else 127
        scale = (tensor.float().abs().amax(dim=1) / largest).clamp(min=1e-6).half()
        integers = (tensor.float() / scale.float().unsqueeze(1)).round().clamp(-largest, largest).to(torch.int8)
        if name in in_4_bits:
            low, high = (integers + OFFSET).to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
            integers = low | (high << 4)
        quantized |= {name: integers, name + SCALE: scale}
    return quantized


def dequantize(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undoes `quantize`, up to rounding. Weights that are not quantized stay as they are."""
    scales = {name: weights[name + SCALE] for name in weights if name + SCALE in weights}
    restored = {name: tensor for name, tensor in weights.items() if name.removesuffix(SCALE) not in scales}
    for name, scale in scales.items():
        integers = weights[name]
        if integers.dtype == torch.uint8:
            integers = torch.stack([integers & 15, integers >> 4], dim=2).flatten(1).float() - OFFSET
        restored[name] = integers.float() * scale.float().unsqueeze(1)
    return restored

"""The input of every attention backend, the terms of the attention scores; and the relative shift.

Shapes: b examples, q queries, k keys, h heads, c = d_head, t distances, s segment channels.
"""

from typing import NamedTuple

from torch import Tensor


class RelativeTerms(NamedTuple):
    """The operands of the relative scores (equation in attention.py).

    Attributes:
        r: [t, h, c] with t = k + step * q: projected encodings of the distances, from the largest to the smallest.
        w_bias, r_bias: [h, c], added to the queries for the content and the position scores, divided by sqrt(c).
        segments: [b, q, h, s], the queries' token-type scores, one per segment channel.
        key_segments: [b, k, s], the keys' segment channels.
        step: spacing of the queries in units of the keys' spacing: 2 in a layer that pools its query, otherwise 1.
        separate_cls: set row 0 and column 0 of the position scores to zero.
    """

    r: Tensor
    w_bias: Tensor
    r_bias: Tensor
    segments: Tensor
    key_segments: Tensor
    step: int
    separate_cls: bool


class AttentionTerms(NamedTuple):
    """The operands of the scores (equation in attention.py) and of the weighted sum.

    Attributes:
        q: [b, q, h, c], queries divided by sqrt(c).
        k, v: [b, k, h, c], keys and values.
        key_mask: [b, k], true where a key is not masked; every example has such a key.
        distance_bias: [h, q, k], added to the scores; or None.
        relative: the operands of the relative scores; or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor
    distance_bias: Tensor | None = None
    relative: RelativeTerms | None = None


def relative_shift(table: Tensor, keys: int, step: int) -> Tensor:
    """Turns scores per distance into scores per pair of positions. A view if `table` is contiguous.

    Row i of the result is row i of `table`, starting at column `step * (q - 1 - i)`.

    Args:
        table: [..., q, t] with t = keys + step * q; column c belongs to the c-th largest distance.
        keys: k.
        step: as in `RelativeTerms`.

    Returns:
        [..., q, k].
    """
    q, t = table.shape[-2:]
    # In the flattened table, the start of row i + 1 is t - step elements after the start of row i.
    start = step * (q - 1)
    return table.flatten(-2)[..., start : start + q * (t - step)].unflatten(-1, (q, t - step))[..., :keys]

"""From queries, keys, values and relative terms to attention's result, three ways.

`attend` picks one: "plain", a few lines that PyTorch differentiates, the reference that the others are tested against;
"tiled", which never holds all scores at once, the way on a CPU; "sdpa", PyTorch's fused kernel, the way on other devices.

Shapes: b texts, q queries, k keys, h heads, c = d_head, t distances, s segment channels.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from funnel.errors import FunnelError
from funnel.model.dropout import Share, current_share, dropout, keep_mask

TILE = 2**19  # scores in a tile of `tiled`
TENSORS = 9  # fields of `AttentionTerms` that are tensors; the others follow them
MAX_KEYS_TO_SAVE = (
    128  # keys: up to here a layer's weights take less memory than its other activations, and are kept for backward
)


class AttentionTerms(NamedTuple):
    """What the scores and the result are made of (attention.py has the equation).

    Attributes:
        q: [b, q, h, c], queries divided by sqrt(c).
        k, v: [b, k, h, c].
        r: [t, h, c] with t = k + step * q: encodings of the distances from the largest to the smallest, projected.
        w_bias, r_bias: [h, c], what queries carry for content and for position, divided by sqrt(c).
        segments: [b, q, h, s], what a query gives to every kind of key.
        key_segments: [b, k, s], what kind a key is.
        key_mask: [b, k], true where a key counts.
        step: how many keys one query's step is.
        separate_cls: whether row 0 and column 0 of the position scores are zero.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    r: Tensor
    w_bias: Tensor
    r_bias: Tensor
    segments: Tensor
    key_segments: Tensor
    key_mask: Tensor
    step: int
    separate_cls: bool


def relative_shift(table: Tensor, keys: int, step: int) -> Tensor:
    """Reads scores over distances as scores over pairs of positions. A view where `table` is contiguous.

    Example i of the result is row i of `table` from column `step * (q - 1 - i)` on.

    Args:
        table: [..., q, t] with t = keys + step * q: column c is the c-th largest distance.
        keys: k.
        step: keys a query's step.

    Returns:
        [..., q, k].
    """
    q, t = table.shape[-2:]
    # One row further is t - step columns further in a table that is read as one long row.
    start = step * (q - 1)
    return table.flatten(-2)[..., start : start + q * (t - step)].unflatten(-1, (q, t - step))[..., :keys]


def plain(terms: AttentionTerms, dropout_p: float) -> Tensor:
    """The equation as it stands. Returns [b, q, h, c]."""
    content = torch.einsum("bqhc,bkhc->bhqk", terms.q + terms.w_bias, terms.k)
    scores = content + _relative(terms)
    scores = scores.masked_fill(~terms.key_mask[:, None, None], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if _recorded is not None:
        _recorded.append(weights.detach())
    return torch.einsum("bhqk,bkhc->bqhc", dropout(weights, dropout_p), terms.v)


def sdpa(terms: AttentionTerms, dropout_p: float) -> Tensor:
    """PyTorch's fused kernel for content, softmax and values; the other terms are its bias. Returns [b, q, h, c]."""
    bias = _relative(terms).masked_fill(~terms.key_mask[:, None, None], float("-inf"))
    query, k, v = (x.transpose(1, 2) for x in (terms.q + terms.w_bias, terms.k, terms.v))
    context = F.scaled_dot_product_attention(query, k, v, attn_mask=bias.to(query), dropout_p=dropout_p, scale=1.0)
    return context.transpose(1, 2)


def _relative(terms: AttentionTerms) -> Tensor:
    """Position and token-type scores, [b, h, q, k]."""
    table = torch.einsum("bqhc,thc->bhqt", terms.q + terms.r_bias, terms.r)
    position = relative_shift(table, terms.k.shape[1], terms.step)
    if terms.separate_cls:
        position = F.pad(position[:, :, 1:, 1:], (1, 0, 1, 0))
    return position + torch.einsum("bqhs,bks->bhqk", terms.segments, terms.key_segments)


def tiled(terms: AttentionTerms, dropout_p: float) -> Tensor:
    """Tile by tile, forward and backward. Backward computes the weights of long inputs again. Returns [b, q, h, c].

    A tile is small enough for the processor's cache, where the passes over it (shift, softmax, dropout) cost little, and
    it is all that there ever is of the scores. It needs its own part of the table of distances only, so long inputs
    also save half of the position products.
    """
    with torch.autocast(terms.q.device.type, enabled=False):
        return _Tiled.apply(*terms, dropout_p)


class _Tile(NamedTuple):
    """A tile's heads, texts and queries, and the distances that these queries have to all keys.

    Tiles are cut from the whole batch, also where a process computes some of its texts only: `drawn` texts are in the
    whole tile, number `number`, and `rows` of them are here.
    """

    heads: slice
    texts: slice
    queries: slice
    distances: slice
    number: int
    drawn: int
    rows: slice


def _tiles(terms: AttentionTerms, share: Share | None) -> Iterator[_Tile]:
    """Cuts the work into tiles: all of it where it fits, else by heads, then by texts, then by queries."""
    b, q, h, _ = terms.q.shape
    k = terms.k.shape[1]
    first, total = share or (0, b)
    heads = min(max(TILE // (total * q * k), 1), h)
    texts = min(max(TILE // (q * k), 1), total)
    queries = min(max(TILE // k, 1), q)
    starts = itertools.product(range(0, h, heads), range(0, total, texts), range(0, q, queries))
    for number, (head, text, query) in enumerate(starts):
        end = min(query + queries, q)
        nearest = terms.step * (q - end)
        distances = slice(nearest, nearest + k + terms.step * (end - query))
        last = min(text + texts, total)
        here = slice(max(text, first), min(last, first + b))
        if here.start < here.stop:
            mine, rows = slice(here.start - first, here.stop - first), slice(here.start - text, here.stop - text)
            yield _Tile(slice(head, head + heads), mine, slice(query, end), distances, number, last - text, rows)


class _Operands(NamedTuple):
    """`AttentionTerms` by heads: [h, b, …], ready to be cut into tiles.

    Attributes:
        query: [h, b, q, c + s], queries with their biases, and segments: the operand of content and token types.
        key: [h, b, k, c + s], the other operand.
        v: [h, b, k, c].
        positional: [h, b, q, c], the queries' operand of the position scores; zero for [cls] when it takes no part.
        r: [h, t, c].
        key_bias: [b, 1, k], 0 where a key counts, else the lowest number.
    """

    query: Tensor
    key: Tensor
    v: Tensor
    positional: Tensor
    r: Tensor
    key_bias: Tensor


def _operands(terms: AttentionTerms) -> _Operands:
    h = terms.q.shape[2]
    positional = terms.q + terms.r_bias
    if terms.separate_cls:
        positional[:, 0] = 0
    query = torch.cat([terms.q + terms.w_bias, terms.segments], dim=-1)
    key = torch.cat([terms.k, terms.key_segments.unsqueeze(2).expand(-1, -1, h, -1)], dim=-1)
    key_bias = torch.zeros_like(terms.key_mask, dtype=terms.q.dtype).masked_fill_(
        ~terms.key_mask, torch.finfo(terms.q.dtype).min
    )
    query, key, v, positional = (x.permute(2, 0, 1, 3) for x in (query, key, terms.v, positional))
    return _Operands(query, key, v, positional, terms.r.transpose(0, 1), key_bias.unsqueeze(1))


def _weights(tile: _Tile, x: _Operands, terms: AttentionTerms) -> Tensor:
    """A tile's attention weights before dropout, [heads * texts, queries, k]."""
    query, key = x.query[tile.heads, tile.texts, tile.queries], x.key[tile.heads, tile.texts]
    g, b, q, k = *query.shape[:3], key.shape[2]
    positional = x.positional[tile.heads, tile.texts, tile.queries].flatten(1, 2)  # [g, b * q, c]
    table = torch.bmm(positional, x.r[tile.heads, tile.distances].transpose(1, 2)).unflatten(1, (b, q))
    position = relative_shift(table, k, terms.step)  # [g, b, q, k]
    if terms.separate_cls:
        position[..., 0] = 0
    scores = torch.add(position, x.key_bias[tile.texts]).view(g * b, q, k)
    return scores.baddbmm_(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).softmax(-1)


class _Tiled(torch.autograd.Function):
    """Attention whose backward computes each tile's weights, and its dropout mask, a second time (`MAX_KEYS_TO_SAVE`: or keeps them)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *fields, dropout_p = arguments
        terms = AttentionTerms(*fields)
        # The mask is drawn from a generator of its own, seeded from the common one, so that it can be drawn again.
        seed = int(torch.randint(2**62, ())) if dropout_p else 0
        keeps = any(ctx.needs_input_grad) and terms.k.shape[1] <= MAX_KEYS_TO_SAVE
        kept: list[Tensor] = []  # each tile's weights, and its mask where there is dropout
        share = current_share()
        draw = _mask_source(terms.q, dropout_p, seed)
        x = _operands(terms)
        context = torch.empty_like(terms.q)
        for tile in _tiles(terms, share):
            weights = _weights(tile, x, terms)
            mask = draw(tile, weights) if dropout_p else None
            if keeps:
                kept += [weights] if mask is None else [weights, mask]
            v = x.v[tile.heads, tile.texts]
            part = torch.bmm(_dropped(weights, mask), v.flatten(0, 1)).unflatten(0, v.shape[:2])  # [g, b, q, c]
            context[tile.texts, tile.queries, tile.heads] = part.permute(1, 2, 0, 3)
        ctx.save_for_backward(*terms[:TENSORS], *kept)
        ctx.rest = (*terms[TENSORS:], dropout_p, seed, share)
        return context

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        step, separate_cls, dropout_p, seed, share = ctx.rest
        saved = ctx.saved_tensors
        terms = AttentionTerms._make([*saved[:TENSORS], step, separate_cls])
        kept = iter(saved[TENSORS:])
        draw = _mask_source(terms.q, dropout_p, seed)
        x = _operands(terms)
        c = terms.q.shape[3]
        wide = torch.promote_types(terms.q.dtype, torch.float32)  # for what is summed over several tiles
        whole = all(tile.queries == slice(0, terms.q.shape[1]) for tile in _tiles(terms, share))
        d_query, d_positional = torch.empty_like(x.query), torch.empty_like(x.positional)
        d_key, d_v = (torch.empty_like(y) if whole else torch.zeros_like(y, dtype=wide) for y in (x.key, x.v))
        d_r = torch.zeros_like(x.r, dtype=wide)

        def add(total: Tensor, index: tuple[slice, ...], part: Tensor) -> None:
            if whole:  # then each part of the total gets one addend
                total[index] = part
            else:
                total[index] += part

        d_context = gradient.permute(2, 0, 1, 3)  # [h, b, q, c]
        for tile in _tiles(terms, share):
            if len(saved) > TENSORS:
                weights, mask = next(kept), next(kept) if dropout_p else None
            else:
                weights = _weights(tile, x, terms)
                mask = draw(tile, weights) if dropout_p else None
            rows = (tile.heads, tile.texts, tile.queries)
            keys = (tile.heads, tile.texts)
            d_out = d_context[rows]
            g, b, q, _ = d_out.shape
            d_out = d_out.flatten(0, 1)
            add(d_v, keys, torch.bmm(_dropped(weights, mask).transpose(1, 2), d_out).unflatten(0, (g, b)))
            d_weights = _dropped(torch.bmm(d_out, x.v[keys].flatten(0, 1).transpose(1, 2)), mask)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_query[rows] = torch.bmm(d_scores, x.key[keys].flatten(0, 1)).unflatten(0, (g, b))
            add(d_key, keys, torch.bmm(d_scores.transpose(1, 2), x.query[rows].flatten(0, 1)).unflatten(0, (g, b)))

            k = d_scores.shape[2]
            d_table = d_scores.new_zeros(g, b, q, k + step * q)
            d_position = relative_shift(d_table, k, step)
            d_position.copy_(d_scores.unflatten(0, (g, b)))
            if separate_cls:
                d_position[..., 0] = 0
            d_table = d_table.flatten(1, 2)  # [g, b * q, t]
            distances = (tile.heads, tile.distances)
            d_positional[rows] = torch.bmm(d_table, x.r[distances]).unflatten(1, (b, q))
            d_r[distances] += torch.bmm(d_table.transpose(1, 2), x.positional[rows].flatten(1, 2))
        if separate_cls:
            d_positional[:, :, 0] = 0

        def by_texts(y: Tensor) -> Tensor:  # [h, b, n, c] -> [b, n, h, c]
            return y.to(terms.q.dtype).permute(1, 2, 0, 3)

        return (
            by_texts(d_query[..., :c] + d_positional),
            by_texts(d_key[..., :c]),
            by_texts(d_v),
            d_r.to(terms.r.dtype).transpose(0, 1),
            d_query[..., :c].sum((1, 2)),
            d_positional.sum((1, 2)),
            by_texts(d_query[..., c:]),
            *(None,) * 5,
        )


def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _mask_source(like: Tensor, p: float, seed: int) -> Callable[[_Tile, Tensor], Tensor]:
    """A function that draws a tile's dropout mask, [heads * texts, queries, k], the same one for the same seed."""
    generator = torch.Generator(like.device)

    def draw(tile: _Tile, weights: Tensor) -> Tensor:
        heads = len(weights) // (tile.rows.stop - tile.rows.start)
        generator.manual_seed(seed + tile.number)
        return keep_mask((heads, tile.drawn, *weights.shape[1:]), p, weights, generator)[:, tile.rows].flatten(0, 1)

    return draw


BACKENDS = {"plain": plain, "tiled": tiled, "sdpa": sdpa}
_forced: str | None = None


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    """Within it, `attend` takes the way of that name, one of `BACKENDS`, whatever the device.

    Raises:
        FunnelError: there is no such way.
    """
    global _forced
    if name not in BACKENDS:
        raise FunnelError(f"attention {name!r}: it takes one of {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


_recorded: list[Tensor] | None = None


@contextlib.contextmanager
def recorded() -> Iterator[list[Tensor]]:
    """Within it, `attend` takes the plain way and puts every layer's weights, [b, h, q, k], into the list that this gives."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        with way("plain"):
            yield _recorded
    finally:
        _recorded = before


def attend(terms: AttentionTerms, dropout_p: float) -> Tensor:
    """Attention's result, [b, q, h, c], in the way that suits device and mode.

    Args:
        dropout_p: probability that a weight is dropped; 0 outside training.
    """
    if _forced is not None:
        return BACKENDS[_forced](terms, dropout_p)
    if torch.compiler.is_compiling():  # also on export: the compiler fuses what it sees
        return plain(terms, dropout_p)
    return tiled(terms, dropout_p) if terms.q.device.type == "cpu" else sdpa(terms, dropout_p)

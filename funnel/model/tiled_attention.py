"""Attention for CPUs: tile by tile, with a hand-written backward pass.

A tile fits in the processor's cache, which makes the passes over it (shift, softmax, dropout) cheap. Only one tile of scores
exists at a time, so memory grows linearly with the length (except for a distance bias, which all examples share). A tile that
covers only some of the queries reads only its part of the distance table, which saves half of the position products for long
inputs. The backward pass recomputes the attention weights of long inputs and uses saved ones for short inputs.

Shapes: b examples, q queries, k keys, h heads, c = d_head, t distances, s segment channels; g heads of a tile.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funnel.model.attention_terms import AttentionTerms, RelativeTerms, relative_shift
from funnel.model.dropout import keep_mask

TILE_SIZE = 2**19  # scores per tile
# Up to this many keys, a layer's attention weights take less memory than its other activations and are kept for backward.
MAX_KEYS_TO_SAVE = 128
NUM_TENSORS = 10  # in `_flatten`


def tiled_attention(terms: AttentionTerms, dropout_p: float) -> Tensor:
    """Computes attention tile by tile. Returns [b, q, h, c]."""
    with torch.autocast(terms.q.device.type, enabled=False):
        return _TiledAttention.apply(*_flatten(terms), dropout_p)


def _flatten(terms: AttentionTerms) -> tuple[Any, ...]:
    """The terms as arguments of an autograd function: first the tensors, then step and separate_cls."""
    relative = terms.relative or (None,) * len(RelativeTerms._fields)
    return *terms[:5], *relative


def _unflatten(arguments: Sequence[Any]) -> AttentionTerms:
    """The inverse of `_flatten`."""
    q, k, v, key_mask, distance_bias, *relative = arguments
    return AttentionTerms(q, k, v, key_mask, distance_bias, None if relative[0] is None else RelativeTerms(*relative))


class _Tile(NamedTuple):
    """A tile's heads, examples and queries, and (for relative attention) the distances from these queries to all keys."""

    heads: slice
    examples: slice
    queries: slice
    distances: slice


def _tiles(terms: AttentionTerms) -> list[_Tile]:
    """Splits the scores [h, b, q, k] into tiles: by heads, then by examples, then by queries, as far as necessary.

    An empty batch has no tiles.
    """
    b, q, h, _ = terms.q.shape
    k, step = terms.k.shape[1], 1 if terms.relative is None else terms.relative.step
    heads = min(max(TILE_SIZE // max(b * q * k, 1), 1), h)
    examples = max(min(TILE_SIZE // (q * k), b), 1)
    queries = min(max(TILE_SIZE // k, 1), q)
    tiles = []
    for head, example, query in itertools.product(range(0, h, heads), range(0, b, examples), range(0, q, queries)):
        end = min(query + queries, q)
        first = step * (q - end)  # column of the tile's largest distance
        distances = slice(first, first + k + step * (end - query))
        tiles.append(_Tile(slice(head, head + heads), slice(example, example + examples), slice(query, end), distances))
    return tiles


class _RelativeOperands(NamedTuple):
    """The operands of the position scores.

    Attributes:
        positional: [h, b, q, c], the queries with their bias; zero for a separate [CLS].
        r: [h, t, c].
        step, separate_cls: as in `RelativeTerms`.
    """

    positional: Tensor
    r: Tensor
    step: int
    separate_cls: bool


class _Operands(NamedTuple):
    """`AttentionTerms` with the heads first, ready to be split into tiles.

    Attributes:
        query: [h, b, q, c + s], queries with their bias, and segments: one operand of the content and token-type scores.
            Without relative scores, [h, b, q, c]; the same holds for `key`.
        key: [h, b, k, c + s], the other operand.
        v: [h, b, k, c].
        key_bias: [b, 1, k], 0 where a key is not masked, else the lowest finite number.
        distance_bias: [h, 1, q, k], or None.
        relative: for the position scores; None without relative scores.
    """

    query: Tensor
    key: Tensor
    v: Tensor
    key_bias: Tensor
    distance_bias: Tensor | None
    relative: _RelativeOperands | None


def _operands(terms: AttentionTerms) -> _Operands:
    query, key, relative = terms.q, terms.k, None
    if terms.relative is not None:
        r, w_bias, r_bias, segments, key_segments, step, separate_cls = terms.relative
        positional = terms.q + r_bias
        if separate_cls:
            positional[:, 0] = 0
        relative = _RelativeOperands(positional.permute(2, 0, 1, 3), r.transpose(0, 1), step, separate_cls)
        query = torch.cat([terms.q + w_bias, segments], dim=-1)
        key = torch.cat([terms.k, key_segments.unsqueeze(2).expand(-1, -1, terms.k.shape[2], -1)], dim=-1)
    query, key, v = (x.permute(2, 0, 1, 3) for x in (query, key, terms.v))
    lowest = torch.finfo(terms.q.dtype).min
    key_bias = torch.zeros_like(terms.key_mask, dtype=terms.q.dtype).masked_fill_(~terms.key_mask, lowest)
    distance_bias = None if terms.distance_bias is None else terms.distance_bias.to(terms.q).unsqueeze(1)
    return _Operands(query, key, v, key_bias.unsqueeze(1), distance_bias, relative)


def _tile_weights(tile: _Tile, x: _Operands) -> Tensor:
    """A tile's attention weights before dropout, [g * b, q, k]."""
    query, key = x.query[tile.heads, tile.examples, tile.queries], x.key[tile.heads, tile.examples]
    g, b, q, k = *query.shape[:3], key.shape[2]
    bias = x.key_bias[tile.examples]  # [b, 1, k]
    if x.distance_bias is not None:
        bias = bias + x.distance_bias[tile.heads, :, tile.queries]  # [g, b, q, k]
    if x.relative is not None:
        positional = x.relative.positional[tile.heads, tile.examples, tile.queries].flatten(1, 2)  # [g, b * q, c]
        r = x.relative.r[tile.heads, tile.distances]  # [g, t, c]
        table = torch.bmm(positional, r.transpose(1, 2)).unflatten(1, (b, q))  # [g, b, q, t]
        position = relative_shift(table, k, x.relative.step)  # [g, b, q, k]
        if x.relative.separate_cls:
            position[..., 0] = 0
        bias = position + bias
    elif x.distance_bias is None:
        bias = bias.expand(g, b, q, k).clone(memory_format=torch.contiguous_format)
    return bias.reshape(g * b, q, k).baddbmm_(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).softmax(-1)


def _apply_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


class _Masks:
    """Samples the tiles' dropout masks, one after another: the same ones for the same seed, in forward and backward."""

    def __init__(self, dropout_p: float, seed: int, device: torch.device) -> None:
        self.dropout_p = dropout_p
        self.generator = torch.Generator(device).manual_seed(seed)

    def next(self, weights: Tensor) -> Tensor | None:
        """The next tile's mask, in the shape of its weights; None without dropout."""
        return keep_mask(weights.shape, self.dropout_p, weights, self.generator) if self.dropout_p else None


class _TiledAttention(torch.autograd.Function):
    """Backward recomputes each tile's weights and dropout mask, or reads the saved ones (`MAX_KEYS_TO_SAVE`)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *fields, dropout_p = arguments
        terms = _unflatten(fields)
        seed = int(torch.randint(2**62, ())) if dropout_p else 0  # from the global generator, for reproducibility
        masks = _Masks(dropout_p, seed, terms.q.device)
        save_weights = any(ctx.needs_input_grad) and terms.k.shape[1] <= MAX_KEYS_TO_SAVE
        saved: list[Tensor] = []  # for each tile its weights, and its mask if there is dropout
        x = _operands(terms)
        context = torch.empty_like(terms.q)
        for tile in _tiles(terms):
            weights = _tile_weights(tile, x)
            mask = masks.next(weights)
            if save_weights:
                saved += [weights] if mask is None else [weights, mask]
            v = x.v[tile.heads, tile.examples]
            output = torch.bmm(_apply_mask(weights, mask), v.flatten(0, 1)).unflatten(0, v.shape[:2])  # [g, b, q, c]
            context[tile.examples, tile.queries, tile.heads] = output.permute(1, 2, 0, 3)
        ctx.save_for_backward(*fields[:NUM_TENSORS], *saved)
        ctx.settings = (*fields[NUM_TENSORS:], dropout_p, seed)
        return context

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_context: Tensor) -> tuple[Tensor | None, ...]:
        step, separate_cls, dropout_p, seed = ctx.settings
        tensors = ctx.saved_tensors  # may be read only once under gradient checkpointing
        terms, saved = _unflatten([*tensors[:NUM_TENSORS], step, separate_cls]), iter(tensors[NUM_TENSORS:])
        is_saved = len(tensors) > NUM_TENSORS
        masks = _Masks(dropout_p, seed, terms.q.device)
        x = _operands(terms)
        tiles = _tiles(terms)
        gradients = _Gradients(x, terms, tiles)
        grad_output = grad_context.permute(2, 0, 1, 3)  # [h, b, q, c]
        for tile in tiles:
            if is_saved:
                weights, mask = next(saved), next(saved) if dropout_p else None
            else:
                weights = _tile_weights(tile, x)
                mask = masks.next(weights)
            gradients.add_tile(tile, weights, mask, grad_output[tile.heads, tile.examples, tile.queries])
        return *gradients.term_gradients(), *(None,) * 4  # key_segments, step, separate_cls, dropout_p


class _Gradients:
    """Gradients of the operands, filled tile by tile."""

    def __init__(self, x: _Operands, terms: AttentionTerms, tiles: list[_Tile]) -> None:
        self.x, self.terms = x, terms
        # If no tile splits the queries, each element of the key and value gradients comes from one tile: assign, do not sum.
        self.assign = all(tile.queries == slice(0, terms.q.shape[1]) for tile in tiles)
        sum_dtype = torch.promote_types(terms.q.dtype, torch.float32)
        self.query = torch.empty_like(x.query)
        self.key, self.v = (torch.empty_like(y) if self.assign else torch.zeros_like(y, dtype=sum_dtype) for y in (x.key, x.v))
        self.distance_bias = None if x.distance_bias is None else torch.zeros_like(x.distance_bias, dtype=sum_dtype)
        if x.relative is not None:
            self.positional, self.r = torch.empty_like(x.relative.positional), torch.zeros_like(x.relative.r, dtype=sum_dtype)

    def add_tile(self, tile: _Tile, weights: Tensor, mask: Tensor | None, grad_output: Tensor) -> None:
        """Adds one tile's contribution.

        Args:
            weights, mask: [g * b, q, k].
            grad_output: [g, b, q, c].
        """
        x = self.x
        queries, keys = (tile.heads, tile.examples, tile.queries), (tile.heads, tile.examples)
        g, b, q, _ = grad_output.shape
        k = weights.shape[2]
        grad_output = grad_output.flatten(0, 1)  # [g * b, q, c]
        self._add(self.v, keys, torch.bmm(_apply_mask(weights, mask).transpose(1, 2), grad_output).unflatten(0, (g, b)))
        grad_weights = _apply_mask(torch.bmm(grad_output, x.v[keys].flatten(0, 1).transpose(1, 2)), mask)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)  # [g * b, q, k]
        self.query[queries] = torch.bmm(grad_scores, x.key[keys].flatten(0, 1)).unflatten(0, (g, b))
        self._add(self.key, keys, torch.bmm(grad_scores.transpose(1, 2), x.query[queries].flatten(0, 1)).unflatten(0, (g, b)))

        if self.distance_bias is not None:
            self.distance_bias[tile.heads, 0, tile.queries] += grad_scores.unflatten(0, (g, b)).sum(
                1, dtype=self.distance_bias.dtype
            )
        if x.relative is None:
            return
        step = x.relative.step
        table = grad_scores.new_zeros(g, b, q, k + step * q)  # gradient of the scores per distance
        position = relative_shift(table, k, step)  # a view
        position.copy_(grad_scores.unflatten(0, (g, b)))
        if x.relative.separate_cls:
            position[..., 0] = 0
        table = table.flatten(1, 2)  # [g, b * q, t]
        distances = (tile.heads, tile.distances)
        self.positional[queries] = torch.bmm(table, x.relative.r[distances]).unflatten(1, (b, q))
        self.r[distances] += torch.bmm(table.transpose(1, 2), x.relative.positional[queries].flatten(1, 2))

    def _add(self, total: Tensor, index: tuple[slice, ...], part: Tensor) -> None:
        if self.assign:
            total[index] = part
        else:
            total[index] += part

    def term_gradients(self) -> tuple[Tensor | None, ...]:
        """Gradients of the terms that have one, in the order of `_flatten`: from q to segments."""
        terms, relative, c = self.terms, self.terms.relative, self.terms.q.shape[3]
        key, v = self._examples_first(self.key[..., :c]), self._examples_first(self.v)
        bias = None
        if terms.distance_bias is not None and self.distance_bias is not None:
            bias = self.distance_bias[:, 0].to(terms.distance_bias)
        if relative is None:
            return self._examples_first(self.query), key, v, None, bias, *(None,) * 4
        if relative.separate_cls:
            self.positional[:, :, 0] = 0
        return (
            self._examples_first(self.query[..., :c] + self.positional),
            key,
            v,
            None,
            bias,
            self.r.to(relative.r.dtype).transpose(0, 1),
            self.query[..., :c].sum((1, 2)),
            self.positional.sum((1, 2)),
            self._examples_first(self.query[..., c:]),
        )

    def _examples_first(self, y: Tensor) -> Tensor:
        """[h, b, n, c] -> [b, n, h, c], in the terms' dtype."""
        return y.to(self.terms.q.dtype).permute(1, 2, 0, 3)

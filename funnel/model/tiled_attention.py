"""Attention for CPUs: tile by tile, with a hand-written backward pass.

A tile fits in the processor's cache, which makes the passes over it (shift, softmax, dropout) cheap. Only one tile of scores
exists at a time, so memory grows linearly with the length. A tile that covers only some of the queries reads only its part of
the distance table, which saves half of the position products for long inputs. The backward pass recomputes the attention
weights of long inputs and uses saved ones for short inputs.

Shapes: b examples, q queries, k keys, h heads, c = d_head, t distances, s segment channels; g heads of a tile.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funnel.model.attention_terms import AttentionTerms, relative_shift
from funnel.model.dropout import keep_mask

TILE_SIZE = 2**19  # scores per tile
# Up to this many keys, a layer's attention weights take less memory than its other activations and are kept for backward.
MAX_KEYS_TO_SAVE = 128
NUM_TENSORS = 9  # the tensor fields of `AttentionTerms`, which come first


def tiled_attention(terms: AttentionTerms, dropout_p: float) -> Tensor:
    """Computes attention tile by tile. Returns [b, q, h, c]."""
    with torch.autocast(terms.q.device.type, enabled=False):
        return _TiledAttention.apply(*terms, dropout_p)


class _Tile(NamedTuple):
    """A tile's heads, examples and queries, and the distances from these queries to all keys."""

    heads: slice
    examples: slice
    queries: slice
    distances: slice


def _tiles(terms: AttentionTerms) -> list[_Tile]:
    """Splits the scores [h, b, q, k] into tiles: by heads, then by examples, then by queries, as far as necessary.

    An empty batch has no tiles.
    """
    b, q, h, _ = terms.q.shape
    k = terms.k.shape[1]
    heads = min(max(TILE_SIZE // max(b * q * k, 1), 1), h)
    examples = max(min(TILE_SIZE // (q * k), b), 1)
    queries = min(max(TILE_SIZE // k, 1), q)
    tiles = []
    for head, example, query in itertools.product(range(0, h, heads), range(0, b, examples), range(0, q, queries)):
        end = min(query + queries, q)
        first = terms.step * (q - end)  # column of the tile's largest distance
        distances = slice(first, first + k + terms.step * (end - query))
        tiles.append(_Tile(slice(head, head + heads), slice(example, example + examples), slice(query, end), distances))
    return tiles


class _Operands(NamedTuple):
    """`AttentionTerms` with the heads first, ready to be split into tiles.

    Attributes:
        query: [h, b, q, c + s], queries with their bias, and segments: one operand of the content and token-type scores.
        key: [h, b, k, c + s], the other operand.
        v: [h, b, k, c].
        positional: [h, b, q, c], the queries' operand of the position scores; zero for a separate [CLS].
        r: [h, t, c].
        key_bias: [b, 1, k], 0 where a key is not masked, else the lowest finite number.
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
    lowest = torch.finfo(terms.q.dtype).min
    key_bias = torch.zeros_like(terms.key_mask, dtype=terms.q.dtype).masked_fill_(~terms.key_mask, lowest)
    query, key, v, positional = (x.permute(2, 0, 1, 3) for x in (query, key, terms.v, positional))
    return _Operands(query, key, v, positional, terms.r.transpose(0, 1), key_bias.unsqueeze(1))


def _tile_weights(tile: _Tile, x: _Operands, terms: AttentionTerms) -> Tensor:
    """A tile's attention weights before dropout, [g * b, q, k]."""
    query, key = x.query[tile.heads, tile.examples, tile.queries], x.key[tile.heads, tile.examples]
    g, b, q, k = *query.shape[:3], key.shape[2]
    positional = x.positional[tile.heads, tile.examples, tile.queries].flatten(1, 2)  # [g, b * q, c]
    table = torch.bmm(positional, x.r[tile.heads, tile.distances].transpose(1, 2)).unflatten(1, (b, q))  # [g, b, q, t]
    position = relative_shift(table, k, terms.step)  # [g, b, q, k]
    if terms.separate_cls:
        position[..., 0] = 0
    scores = torch.add(position, x.key_bias[tile.examples]).view(g * b, q, k)
    return scores.baddbmm_(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).softmax(-1)


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
        terms = AttentionTerms(*fields)
        seed = int(torch.randint(2**62, ())) if dropout_p else 0  # from the global generator, for reproducibility
        masks = _Masks(dropout_p, seed, terms.q.device)
        save_weights = any(ctx.needs_input_grad) and terms.k.shape[1] <= MAX_KEYS_TO_SAVE
        saved: list[Tensor] = []  # for each tile its weights, and its mask if there is dropout
        x = _operands(terms)
        context = torch.empty_like(terms.q)
        for tile in _tiles(terms):
            weights = _tile_weights(tile, x, terms)
            mask = masks.next(weights)
            if save_weights:
                saved += [weights] if mask is None else [weights, mask]
            v = x.v[tile.heads, tile.examples]
            output = torch.bmm(_apply_mask(weights, mask), v.flatten(0, 1)).unflatten(0, v.shape[:2])  # [g, b, q, c]
            context[tile.examples, tile.queries, tile.heads] = output.permute(1, 2, 0, 3)
        ctx.save_for_backward(*terms[:NUM_TENSORS], *saved)
        ctx.settings = (*terms[NUM_TENSORS:], dropout_p, seed)
        return context

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_context: Tensor) -> tuple[Tensor | None, ...]:
        step, separate_cls, dropout_p, seed = ctx.settings
        tensors = ctx.saved_tensors  # may be read only once under gradient checkpointing
        terms, saved = AttentionTerms._make([*tensors[:NUM_TENSORS], step, separate_cls]), iter(tensors[NUM_TENSORS:])
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
                weights = _tile_weights(tile, x, terms)
                mask = masks.next(weights)
            gradients.add_tile(tile, weights, mask, grad_output[tile.heads, tile.examples, tile.queries])
        return *gradients.term_gradients(), *(None,) * 5  # key_segments, key_mask, step, separate_cls, dropout_p


class _Gradients:
    """Gradients of the operands, filled tile by tile."""

    def __init__(self, x: _Operands, terms: AttentionTerms, tiles: list[_Tile]) -> None:
        self.x, self.terms = x, terms
        # If no tile splits the queries, each element of the key and value gradients comes from one tile: assign, do not sum.
        self.assign = all(tile.queries == slice(0, terms.q.shape[1]) for tile in tiles)
        sum_dtype = torch.promote_types(terms.q.dtype, torch.float32)
        self.query, self.positional = torch.empty_like(x.query), torch.empty_like(x.positional)
        self.key, self.v = (torch.empty_like(y) if self.assign else torch.zeros_like(y, dtype=sum_dtype) for y in (x.key, x.v))
        self.r = torch.zeros_like(x.r, dtype=sum_dtype)

    def add_tile(self, tile: _Tile, weights: Tensor, mask: Tensor | None, grad_output: Tensor) -> None:
        """Adds one tile's contribution.

        Args:
            weights, mask: [g * b, q, k].
            grad_output: [g, b, q, c].
        """
        x, step = self.x, self.terms.step
        queries, keys = (tile.heads, tile.examples, tile.queries), (tile.heads, tile.examples)
        g, b, q, _ = grad_output.shape
        k = weights.shape[2]
        grad_output = grad_output.flatten(0, 1)  # [g * b, q, c]
        self._add(self.v, keys, torch.bmm(_apply_mask(weights, mask).transpose(1, 2), grad_output).unflatten(0, (g, b)))
        grad_weights = _apply_mask(torch.bmm(grad_output, x.v[keys].flatten(0, 1).transpose(1, 2)), mask)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)  # [g * b, q, k]
        self.query[queries] = torch.bmm(grad_scores, x.key[keys].flatten(0, 1)).unflatten(0, (g, b))
        self._add(self.key, keys, torch.bmm(grad_scores.transpose(1, 2), x.query[queries].flatten(0, 1)).unflatten(0, (g, b)))

        table = grad_scores.new_zeros(g, b, q, k + step * q)  # gradient of the scores per distance
        position = relative_shift(table, k, step)  # a view
        position.copy_(grad_scores.unflatten(0, (g, b)))
        if self.terms.separate_cls:
            position[..., 0] = 0
        table = table.flatten(1, 2)  # [g, b * q, t]
        distances = (tile.heads, tile.distances)
        self.positional[queries] = torch.bmm(table, x.r[distances]).unflatten(1, (b, q))
        self.r[distances] += torch.bmm(table.transpose(1, 2), x.positional[queries].flatten(1, 2))

    def _add(self, total: Tensor, index: tuple[slice, ...], part: Tensor) -> None:
        if self.assign:
            total[index] = part
        else:
            total[index] += part

    def term_gradients(self) -> tuple[Tensor, ...]:
        """Gradients of the first seven `AttentionTerms`, from q to segments."""
        c = self.terms.q.shape[3]
        if self.terms.separate_cls:
            self.positional[:, :, 0] = 0
        return (
            self._examples_first(self.query[..., :c] + self.positional),
            self._examples_first(self.key[..., :c]),
            self._examples_first(self.v),
            self.r.to(self.terms.r.dtype).transpose(0, 1),
            self.query[..., :c].sum((1, 2)),
            self.positional.sum((1, 2)),
            self._examples_first(self.query[..., c:]),
        )

    def _examples_first(self, y: Tensor) -> Tensor:
        """[h, b, n, c] -> [b, n, h, c], in the terms' dtype."""
        return y.to(self.terms.q.dtype).permute(1, 2, 0, 3)

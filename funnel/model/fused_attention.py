"""Attention for GPUs: Triton kernels that never materialize the attention weights, with relative positions and dropout.

The position scores are one matrix product, a table of the scores per query and distance. In principle, the scores of query i
start at column `step * (q - 1 - i)` of row i (`relative_shift`), so the kernels read the shifted scores directly. In memory,
rows are grouped by i modulo 8 and shifted so that their scores start at a multiple of 8 (`phases_first`): then the kernels can
load 16 bytes at a time. Each score has one place in the table; the backward pass writes its gradient there, and the gradients
of queries and distances are matrix products again. There are no atomic operations, so results do not depend on the order of
execution.

Long inputs are processed in chunks of examples and queries, which bounds the size of the tables.

The operator is registered with PyTorch, so it works under torch.compile, in CUDA graphs and with gradient checkpointing.
Triton's interpreter runs the kernels on a CPU (`TRITON_INTERPRET=1`), as the tests do.

Shapes: b examples, q queries, k keys, h heads, c = d_head, t distances, s = 4 segment channels.
"""

import math
import os
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from funnel.errors import error_reason
from funnel.model.attention_terms import AttentionTerms
from funnel.model.fused_kernels import backward_kernel, forward_kernel, query_kernel, shift_kernel, unshift_kernel

TABLE_BYTES = 2**28  # of the position scores of a chunk
CHUNK_QUERIES = 512  # at most, so that a chunk's table has few unused columns
MAX_HEAD_SIZE = 64
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter multiplies bfloat16 matrices incorrectly.
DTYPES = (torch.float32, torch.float16) if IS_INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)


def _has_device() -> bool:
    """Whether the kernels can run on this machine; warns if only Triton is the reason why they cannot."""
    if IS_INTERPRETED or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return IS_INTERPRETED
    try:
        triton.runtime.driver.active.get_current_target()  # compiles Triton's driver
    except Exception as error:
        reason = f"Triton does not work here ({error_reason(error)}); it needs a C compiler and Python's headers"
        warnings.warn(f"{reason}. Attention uses PyTorch's kernels, which are slower", stacklevel=2)
        return False
    return True


HAS_DEVICE = _has_device()


class _Operands(NamedTuple):
    """The tensors of `AttentionTerms`.

    Attributes:
        q: [b, q, h, c], queries of the position scores, with their bias.
        bias: [h, c], float32, what has to be added to them for the content scores.
    """

    q: Tensor
    bias: Tensor
    k: Tensor
    v: Tensor
    r: Tensor
    segments: Tensor
    key_segments: Tensor
    key_mask: Tensor


def is_supported(terms: AttentionTerms) -> bool:
    """Whether the kernels can compute these terms.

    They need relative scores without a distance bias, float32 or a 16-bit dtype, heads of at most `MAX_HEAD_SIZE` channels,
    and a GPU of the Ampere generation or later: older ones have too little shared memory.
    """
    is_relative = terms.relative is not None and terms.distance_bias is None
    return HAS_DEVICE and is_relative and terms.q.dtype in DTYPES and terms.q.shape[3] <= MAX_HEAD_SIZE


def fused_attention(terms: AttentionTerms, dropout_p: float) -> Tensor:
    """Computes attention with the Triton kernels. Returns [b, q, h, c]. Has first derivatives only.

    Requires relative scores and no distance bias (`is_supported`).
    """
    relative = terms.relative
    assert relative is not None
    operands = _Operands(
        terms.q + relative.r_bias,
        relative.w_bias.float() - relative.r_bias.float(),
        terms.k,
        terms.v,
        relative.r,
        relative.segments,
        relative.key_segments,
        terms.key_mask,
    )
    output: Tensor = _attention(list(operands), relative.step, relative.separate_cls, dropout_p)[0]
    return output


class _Tiles(NamedTuple):
    """Tile sizes and launch settings, by kernel."""

    forward: dict[str, int]
    backward: dict[str, int]
    query: dict[str, int]


TILES = {  # by bytes per element
    2: _Tiles(
        {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3},
        {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 1},
        {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    ),
    4: _Tiles(
        {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 1},
        {"BM": 32, "BN": 32, "num_warps": 4, "num_stages": 1},
        {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 1},
    ),
}


class _Chunk(NamedTuple):
    """Some examples and queries, and the distances from these queries to all keys."""

    examples: slice
    queries: slice
    distances: slice


_Settings = tuple[int, bool, float]  # step, separate_cls, dropout_p


class _Problem(NamedTuple):
    """Sizes of one call, and what follows from them."""

    b: int
    q: int
    k: int
    h: int
    c: int
    item_size: int
    step: int
    separate_cls: bool
    dropout_p: float

    @classmethod
    def create(cls, q: Tensor, k: Tensor, settings: _Settings) -> "_Problem":
        b, num_queries, h, c = q.shape
        return cls(b, num_queries, k.shape[1], h, c, q.element_size(), *settings)

    def table_shape(self, examples: int, queries: int) -> tuple[int, int, int]:
        """The shape of a table, [8 * h, b * ceil(q / 8), t]: t distances and up to 7 columns of shift, rounded up to 16."""
        columns = (self.k + self.step * queries + 7 + 15) // 16 * 16
        return 8 * self.h, examples * ((queries + 7) // 8), columns

    def chunks(self) -> list[_Chunk]:
        """Splits the queries so that a table has at most `TABLE_BYTES`, if it has more than one example."""
        queries = min(self.q, CHUNK_QUERIES)
        examples = max(1, TABLE_BYTES // (math.prod(self.table_shape(1, queries)) * self.item_size))
        chunks = []
        for example in range(0, self.b, examples):
            for query in range(0, self.q, queries):
                end = min(query + queries, self.q)
                first = self.step * (self.q - end)
                distances = slice(first, first + self.k + self.step * (end - query))
                chunks.append(_Chunk(slice(example, min(example + examples, self.b)), slice(query, end), distances))
        return chunks

    def launch(self, kernel: Any, tile: int, rows: int, groups: int) -> Any:
        """The kernel with its grid: one program per tile of rows, group (example or phase) and head."""
        return kernel[(groups * self.h * triton.cdiv(rows, tile),)]

    def shifted_distances(self, r: Tensor, chunk: _Chunk) -> Tensor:
        """The encodings of a chunk's distances by phase (`shift_kernel`), [8 * h, t, c]."""
        r, queries = r[chunk.distances], chunk.queries.stop - chunk.queries.start
        columns = self.table_shape(1, queries)[2]
        shifted = r.new_empty(8 * self.h, columns, self.c)
        arguments = r, shifted, *r.stride()[:2], self.h, queries, len(r), columns
        self.launch(shift_kernel, 64, columns, 8)(*arguments, **self.constants, BN=64)
        return shifted

    def add_unshifted(self, shifted: Tensor, r: Tensor, chunk: _Chunk) -> None:
        """Adds gradients of `shifted_distances` to those of r."""
        r, queries = r[chunk.distances], chunk.queries.stop - chunk.queries.start
        arguments = shifted, r, *r.stride()[:2], self.h, queries, len(r), shifted.shape[1]
        self.launch(unshift_kernel, 64, len(r), 1)(*arguments, **self.constants, BN=64)

    @property
    def constants(self) -> dict[str, Any]:
        """Arguments of every kernel that are known at compile time."""
        return {"STEP": self.step, "C": self.c, "CP": max(16, triton.next_power_of_2(self.c))}

    @property
    def score_constants(self) -> dict[str, Any]:
        """Further constants of the kernels that compute scores."""
        return {"SEPARATE_CLS": self.separate_cls, "DROPOUT": self.dropout_p > 0}

    @property
    def dropout_arguments(self) -> tuple[int, float]:
        """Threshold of the 32-bit hash, and the factor of kept weights."""
        return min(round(self.dropout_p * 2**32), 2**32 - 1), 1 / max(1 - self.dropout_p, 2**-32)


def phases_first(x: Tensor) -> Tensor:
    """Groups queries by their number modulo 8, [b, q, h, c] -> [8 * h, b * ceil(q / 8), c]; a view if q is a multiple of 8.

    Queries of the same phase have scores whose distance in the table is a multiple of 8, and `shift_kernel` moves all scores
    to multiples of 8, so the kernels access them 16 bytes at a time.
    """
    b, q, h, c = x.shape
    if q % 8:
        x = F.pad(x, (0, 0, 0, 0, 0, -q % 8))
    return x.reshape(b * ((q + 7) // 8), 8 * h, c).transpose(0, 1)


def _with_adjacent_channels(x: Tensor) -> Tensor:
    """The tensor, or a copy in which the last dimension has stride 1, as the kernels require."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("funnel::fused_attention", mutates_args=())
def _attention(operands: list[Tensor], step: int, separate_cls: bool, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass, of `_Operands`.

    Returns:
        The output [b, q, h, c]; log2 of the sum of the exponentiated scores, [b, h, q]; the seed of the dropout mask, [1].
    """
    q, bias, k, v, r, *others = (_with_adjacent_channels(x) for x in operands)
    segments, key_segments, key_mask = (x.contiguous() for x in others)
    p = _Problem.create(q, k, (step, separate_cls, dropout_p))
    output = q.new_empty(p.b, p.q, p.h, p.c)
    lse = torch.empty((p.b, p.h, p.q), dtype=torch.float32, device=q.device)
    seed = torch.randint(2**62, (1,), device=q.device) if dropout_p else torch.zeros(1, dtype=torch.int64, device=q.device)
    tiles = TILES[p.item_size].forward
    for chunk in p.chunks():
        e, n, _ = chunk
        queries, ke, va, out, seg = q[e, n], k[e], v[e], output[e, n], segments[e, n]
        table = torch.bmm(phases_first(queries), p.shifted_distances(r, chunk).transpose(1, 2))
        examples, count = queries.shape[:2]
        p.launch(forward_kernel, tiles["BM"], count, examples)(
            queries, bias, ke, va, table, seg, key_segments[e], key_mask[e], seed, out, lse[e, :, n],
            *queries.stride()[:3], *ke.stride()[:3], *va.stride()[:3], *out.stride()[:3], *seg.stride()[:3], p.q,
            examples, p.h, count, p.k, table.shape[2], n.start, e.start, *p.dropout_arguments,
            **p.constants, **p.score_constants, **tiles,
        )  # fmt: skip
    return output, lse, seed


@_attention.register_fake
def _(operands: list[Tensor], step: int, separate_cls: bool, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    q = operands[0]
    b, n, h, c = q.shape
    return q.new_empty(b, n, h, c), q.new_empty((b, h, n), dtype=torch.float32), q.new_empty(1, dtype=torch.int64)


@torch.library.custom_op("funnel::fused_attention_backward", mutates_args=())
def _attention_backward(
    tensors: list[Tensor], step: int, separate_cls: bool, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward pass.

    Args:
        tensors: the gradient of the output, and the operands and results of `_attention`.

    Returns:
        Gradients of q, bias, k, v, r and segments.
    """
    d_output, q, bias, k, v, r, *others, output, lse, seed = (_with_adjacent_channels(x) for x in tensors)
    d_output, (segments, key_segments, key_mask) = d_output.contiguous(), (x.contiguous() for x in others)
    p = _Problem.create(q, k, (step, separate_cls, dropout_p))
    tiles, query_tiles = TILES[p.item_size].backward, TILES[p.item_size].query
    d_q, d_segments = torch.empty_like(output), torch.empty_like(segments)
    # Sums over chunks are in float32.
    sum_dtype = torch.float32 if p.q > CHUNK_QUERIES else q.dtype
    d_keys, d_values = (x.new_empty(x.shape, dtype=sum_dtype) for x in (k, v))
    d_r, d_bias = r.new_zeros(r.shape, dtype=torch.float32), bias.new_zeros(bias.shape, dtype=torch.float32)
    for chunk in p.chunks():
        e, n, _ = chunk
        queries, ke, va, out, seg, grad = q[e, n], k[e], v[e], output[e, n], segments[e, n], d_output[e, n]
        dq, dk, dv, dseg = d_q[e, n], d_keys[e], d_values[e], d_segments[e, n]
        examples, count = queries.shape[:2]
        position, distances = phases_first(queries), p.shifted_distances(r, chunk)
        table = torch.bmm(position, distances.transpose(1, 2))
        d_table = torch.empty_like(table)
        p.launch(backward_kernel, tiles["BN"], p.k, examples)(
            queries, bias, ke, va, table, seg, key_segments[e], key_mask[e], seed, out, lse[e, :, n], grad, dk, dv, d_table,
            *queries.stride()[:3], *ke.stride()[:3], *va.stride()[:3], *out.stride()[:3], *seg.stride()[:3], p.q,
            *grad.stride()[:3], *dk.stride()[:3],
            examples, p.h, count, p.k, table.shape[2], n.start, e.start, *p.dropout_arguments,
            ADD=n.start > 0, **p.constants, **p.score_constants, **tiles,
        )  # fmt: skip
        del table
        partial_bias = torch.empty(examples, p.h, triton.cdiv(count, query_tiles["BM"]), p.c, device=q.device)
        p.launch(query_kernel, query_tiles["BM"], count, examples)(
            ke, key_segments[e], d_table, dq, partial_bias, dseg,
            *ke.stride()[:3], *dq.stride()[:3], *dseg.stride()[:3],
            examples, p.h, count, p.k, d_table.shape[2], n.start, SEPARATE_CLS=separate_cls, **p.constants, **query_tiles,
        )  # fmt: skip
        d_bias += partial_bias.sum((0, 2))
        if dq.is_contiguous() and count % 8 == 0:
            phases_first(dq).baddbmm_(d_table, distances)
        else:
            dq += torch.bmm(d_table, distances).transpose(0, 1).reshape(examples, -1, p.h, p.c)[:, :count]
        p.add_unshifted(torch.bmm(d_table.transpose(1, 2), position), d_r, chunk)
    return d_q, d_bias.to(bias.dtype), d_keys.to(k.dtype), d_values.to(v.dtype), d_r.to(r.dtype), d_segments


@_attention_backward.register_fake
def _(
    tensors: list[Tensor], step: int, separate_cls: bool, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_q, d_bias, d_keys, d_values, d_r, d_segments = (x.new_empty(x.shape) for x in tensors[1:7])
    return d_q, d_bias, d_keys, d_values, d_r, d_segments


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, *ctx.settings = inputs
    ctx.save_for_backward(*operands, *output)


def _backward(ctx: Any, d_output: Tensor, *_: Tensor) -> tuple[Any, ...]:
    gradients = _attention_backward([d_output, *ctx.saved_tensors], *ctx.settings)
    return [*gradients, None, None], None, None, None


_attention.register_autograd(_backward, setup_context=_save)

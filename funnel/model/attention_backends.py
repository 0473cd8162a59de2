"""Attention backends: implementations of one function, from `AttentionTerms` to the attention's output.

eager  plain PyTorch operations; the reference that the others are tested against
sdpa   PyTorch's scaled_dot_product_attention; the default on accelerators where `fused` is not available
fused  Triton kernels (fused_attention.py), where Triton is installed; the default for relative attention on GPUs
tiled  tile by tile, with a hand-written backward pass (tiled_attention.py); the default on CPUs

Shapes: b examples, q queries, k keys, h heads, c = d_head.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from funnel.errors import FunnelError
from funnel.model.attention_terms import AttentionTerms, RelativeTerms, relative_shift
from funnel.model.dropout import dropout
from funnel.model.tiled_attention import tiled_attention

Backend = Callable[[AttentionTerms, float], Tensor]


def eager(terms: AttentionTerms, dropout_p: float) -> Tensor:
    """Computes the scores term by term. Returns [b, q, h, c]."""
    return _weighted_sum(_attention_weights(terms), terms, dropout_p)


def sdpa(terms: AttentionTerms, dropout_p: float) -> Tensor:
    """Uses scaled_dot_product_attention; scores other than the content's are an additive mask. Returns [b, q, h, c]."""
    q, mask = _content_queries(terms), terms.key_mask[:, None, None]  # [b, 1, 1, k]
    bias = _additional_scores(terms)
    if bias is not None:
        mask = bias.to(q).masked_fill(~mask, float("-inf"))
    query, k, v = (x.transpose(1, 2) for x in (q, terms.k, terms.v))
    context = F.scaled_dot_product_attention(query, k, v, attn_mask=mask, dropout_p=dropout_p, scale=1.0)
    return context.transpose(1, 2)


def fused(terms: AttentionTerms, dropout_p: float) -> Tensor:
    """Uses the Triton kernels for relative attention without a distance bias, otherwise `sdpa`. Returns [b, q, h, c]."""
    if terms.relative is None:
        return sdpa(terms, dropout_p)
    from funnel.model import fused_attention  # requires Triton

    if fused_attention.is_supported(terms):
        return fused_attention.fused_attention(terms, dropout_p)
    return sdpa(terms, dropout_p)


def _attention_weights(terms: AttentionTerms) -> Tensor:
    """Softmax of the scores, [b, h, q, k]."""
    scores = torch.einsum("bqhc,bkhc->bhqk", _content_queries(terms), terms.k)
    bias = _additional_scores(terms)
    if bias is not None:
        scores = scores + bias
    return scores.masked_fill(~terms.key_mask[:, None, None], torch.finfo(scores.dtype).min).softmax(-1)


def _content_queries(terms: AttentionTerms) -> Tensor:
    """Queries of the content scores, with their bias, [b, q, h, c]."""
    return terms.q if terms.relative is None else terms.q + terms.relative.w_bias


def _additional_scores(terms: AttentionTerms) -> Tensor | None:
    """Relative scores and distance bias, [b or 1, h, q, k]; None if there are none."""
    bias = None if terms.distance_bias is None else terms.distance_bias.unsqueeze(0).to(terms.q)
    if terms.relative is None:
        return bias
    scores = _relative_scores(terms.q, terms.relative, terms.k.shape[1])
    return scores if bias is None else scores + bias


def _relative_scores(q: Tensor, relative: RelativeTerms, keys: int) -> Tensor:
    """Position and token-type scores, [b, h, q, k]."""
    table = torch.einsum("bqhc,thc->bhqt", q + relative.r_bias, relative.r)
    position = relative_shift(table, keys, relative.step)
    if relative.separate_cls:
        position = F.pad(position[:, :, 1:, 1:], (1, 0, 1, 0))
    return position + torch.einsum("bqhs,bks->bhqk", relative.segments, relative.key_segments)


def _weighted_sum(weights: Tensor, terms: AttentionTerms, dropout_p: float) -> Tensor:
    """Applies dropout to the weights and sums the values. Returns [b, q, h, c]."""
    return torch.einsum("bhqk,bkhc->bqhc", dropout(weights, dropout_p), terms.v)


BACKENDS: dict[str, Backend] = {"eager": eager, "sdpa": sdpa, "tiled": tiled_attention}
if importlib.util.find_spec("triton") is not None:
    BACKENDS["fused"] = fused
_GPU_BACKEND = BACKENDS.get("fused", sdpa)

# Set by the context managers below. Process-wide rather than per thread or context, because gradient checkpointing
# recomputes the forward in autograd's own threads.
_override: Backend | None = None


@contextlib.contextmanager
def _use_backend(backend: Backend) -> Iterator[None]:
    global _override
    previous, _override = _override, backend
    try:
        yield
    finally:
        _override = previous


@contextlib.contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Makes all attention layers use one of `BACKENDS` within the context, on any device.

    Raises:
        FunnelError: there is no such backend.
    """
    if name not in BACKENDS:
        raise FunnelError(f"unknown attention backend {name!r}; choose from {', '.join(BACKENDS)}")
    with _use_backend(BACKENDS[name]):
        yield


@contextlib.contextmanager
def capture_attention_weights() -> Iterator[list[Tensor]]:
    """Yields a list that receives the attention weights, [b, h, q, k], of every layer executed within the context.

    Attention uses the eager backend within the context. The weights are captured before dropout and detached.
    """
    captured: list[Tensor] = []

    def eager_with_capture(terms: AttentionTerms, dropout_p: float) -> Tensor:
        weights = _attention_weights(terms)
        captured.append(weights.detach())
        return _weighted_sum(weights, terms, dropout_p)

    with _use_backend(eager_with_capture):
        yield captured


def compute_attention(terms: AttentionTerms, dropout_p: float) -> Tensor:
    """Computes attention with the selected backend, or the device's default. Returns [b, q, h, c].

    Args:
        dropout_p: dropout probability of the attention weights; 0 outside training.
    """
    if _override is not None:
        return _override(terms, dropout_p)
    device = terms.q.device.type
    if device == "cuda":
        return _GPU_BACKEND(terms, dropout_p)
    if torch.compiler.is_compiling():  # also during export: the compiler fuses the eager code itself
        return eager(terms, dropout_p)
    return tiled_attention(terms, dropout_p) if device == "cpu" else sdpa(terms, dropout_p)

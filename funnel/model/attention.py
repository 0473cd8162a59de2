"""Relative multi-head attention (paper section A.2): content, position and token-type scores.

The score of query i and key j is, with every term divided by sqrt(d_head):

    (q_i + r_w_bias) . k_j                              content
  + (q_i + r_r_bias) . r_kernel(R(p_i - p_j))           position: R is the sines and cosines of a distance
  + (q_i + r_s_bias) . seg_embed[same segment or not]   token type

The position term is computed once per distance and then read along its diagonals ("relative shift"): queries and keys are
evenly spaced, so the score of (i, j) is at a fixed stride in a table over distances, and the shift is a view. The
token-type term is also a dot product, of the query's scores for the segments and an encoding of the key's segment: a few
additional channels of the content term.

The backends in attention_backends.py combine the terms. Shapes: b examples, q queries, k keys, h heads, t distances,
s segment channels, d = d_model, l tokens of the model's input.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from funnel.model import pooling
from funnel.model.attention_backends import compute_attention
from funnel.model.attention_terms import AttentionTerms
from funnel.model.config import FunnelConfig
from funnel.model.dropout import Dropout
from funnel.model.pooling import Positions

CLS_TOKEN_TYPE = 2


def sinusoids(distances: Tensor, d_model: int) -> tuple[Tensor, Tensor]:
    """Sines and cosines of distances at d_model / 2 frequencies (paper section A.2).

    Args:
        distances: [t], in input tokens.

    Returns:
        Two tensors [t, d_model / 2] in the distances' dtype.
    """
    half = d_model // 2
    exponents = torch.arange(half, device=distances.device, dtype=distances.dtype) / half
    angles = distances.unsqueeze(1) / 10000**exponents
    return angles.sin(), angles.cos()


class DistanceEncodings(nn.Module):
    """Encodes every distance between input tokens, from l down to -l. l -> [2 l + 1, d].

    Computed once per forward pass; a block with spacing s reads every s-th row. Dropout is applied here, as in the
    original code, so that all layers share one dropout mask.
    """

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__()
        self.d_model = config.d_model
        self.sine_dropout = Dropout(config.hidden_dropout)
        self.cosine_dropout = Dropout(config.hidden_dropout)

    def forward(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        angle_dtype = dtype if dtype == torch.float64 else torch.float32  # bfloat16 cannot represent the angles
        distances = torch.arange(length, -length - 1, -1, device=device).to(angle_dtype)
        sines, cosines = sinusoids(distances, self.d_model)
        return torch.cat([self.sine_dropout(sines), self.cosine_dropout(cosines)], dim=1).to(dtype)


class AttentionInputs(NamedTuple):
    """What a layer needs besides the hidden states; shared by the layers of a block.

    Attributes:
        key_mask: [b, k], true where a key is not masked.
        distances: [t, d], encodings of the distances between queries and keys, from the largest to the smallest.
        step: spacing of the queries in units of the keys' spacing: 2 in a layer that pools its query, otherwise 1.
        query_segments, key_segments: [b, q, s] and [b, k, s]. The first channel is 1; the dot product of the others is 1
            if query and key are in the same segment, else 0. All channels of a separate [CLS] are 0.
    """

    key_mask: Tensor
    distances: Tensor
    step: int
    query_segments: Tensor
    key_segments: Tensor


def attention_inputs(
    encodings: Tensor, length: int, queries: Positions, keys: Positions, config: FunnelConfig
) -> AttentionInputs:
    """Builds the inputs of a layer.

    Args:
        encodings: [2 l + 1, d], from `DistanceEncodings`.
        length: l.
        queries: positions of the queries.
        keys: positions of the keys, in the same block as the queries or in the one before.
    """
    num_queries, num_keys = queries.mask.shape[1], keys.mask.shape[1]
    spacing = pooling.spacing(keys.block)
    step = pooling.spacing(queries.block) // spacing
    offset = pooling.first_position(queries.block, config) - pooling.first_position(keys.block, config)
    largest = offset + step * spacing * (num_queries - 1)  # distance from the last query to the first key
    distances = largest - spacing * torch.arange(num_keys + step * num_queries, device=encodings.device)  # [t]
    # Distances are out of range only for a separate [CLS], which has no position scores, and in columns that the shift drops.
    rows = (length - distances).clamp(0, 2 * length)
    return AttentionInputs(
        keys.mask,
        encodings[rows],
        step,
        _segment_channels(queries, config, is_query=True).to(encodings.dtype),
        _segment_channels(keys, config, is_query=False).to(encodings.dtype),
    )


def _segment_channels(positions: Positions, config: FunnelConfig, is_query: bool) -> Tensor:
    """Segment channels of queries or keys (see `AttentionInputs`): one for all keys and one per token type. [b, n, 4]."""
    types = positions.token_type_ids
    channels = types.unsqueeze(2) == torch.arange(3, device=types.device)  # [b, n, 3]
    if is_query and not config.separate_cls:  # [CLS] is in the same segment as every other token
        is_cls = (types == CLS_TOKEN_TYPE).unsqueeze(2)
        channels = torch.cat([channels[..., :CLS_TOKEN_TYPE] | is_cls, torch.ones_like(is_cls)], dim=2)
    channels = torch.cat([torch.ones_like(channels[..., :1]), channels], dim=2)
    if config.separate_cls:
        channels = torch.cat([torch.zeros_like(channels[:, :1]), channels[:, 1:]], dim=1)
    return channels


class RelativeMultiHeadAttention(nn.Module):
    """Attention with relative positions, followed by projection, dropout, residual and LayerNorm.

    Args of forward:
        query: [b, q, d]; also the residual.
        key_value: [b, k, d].
        inputs: from `attention_inputs`.

    Returns:
        [b, q, d].
    """

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__()
        self.n_head, self.d_head = config.n_head, config.d_head
        self.scale = 1 / math.sqrt(config.d_head)
        self.separate_cls = config.separate_cls
        width = config.n_head * config.d_head
        self.q_head = nn.Linear(config.d_model, width, bias=False)  # its bias is r_w_bias
        self.k_head = nn.Linear(config.d_model, width)
        self.v_head = nn.Linear(config.d_model, width)
        self.r_w_bias = nn.Parameter(torch.empty(config.n_head, config.d_head))
        self.r_r_bias = nn.Parameter(torch.empty(config.n_head, config.d_head))
        self.r_s_bias = nn.Parameter(torch.empty(config.n_head, config.d_head))
        self.r_kernel = nn.Parameter(torch.empty(config.d_model, config.n_head, config.d_head))
        self.seg_embed = nn.Parameter(torch.empty(2, config.n_head, config.d_head))  # different, same segment
        self.post_proj = nn.Linear(width, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.attention_dropout = config.attention_dropout
        self.hidden_dropout = Dropout(config.hidden_dropout)

    def forward(self, query: Tensor, key_value: Tensor, inputs: AttentionInputs) -> Tensor:
        # Every term contains the query, so scaling the query and its biases scales the scores.
        q = self._split_heads(self.q_head(query)) * self.scale  # [b, q, h, d_head]
        k, v = self._split_heads(self.k_head(key_value)), self._split_heads(self.v_head(key_value))  # [b, k, h, d_head]
        r = self._split_heads(inputs.distances.to(q) @ self.r_kernel.flatten(1).to(q))  # [t, h, d_head]
        w_bias, r_bias, s_bias = ((bias * self.scale).to(q) for bias in (self.r_w_bias, self.r_r_bias, self.r_s_bias))

        # The first channel gives every key the score of `different`; a matching segment's channel adds `same - different`.
        different, same = self.seg_embed.to(q)
        num_types = inputs.query_segments.shape[2] - 1
        directions = torch.stack([different, *[same - different] * num_types], dim=1)  # [h, s, d_head]
        segments = torch.einsum("bqhc,hsc->bqhs", q + s_bias, directions) * inputs.query_segments.unsqueeze(2).to(q)

        key_segments = inputs.key_segments.to(q)
        terms = AttentionTerms(
            q, k, v, r, w_bias, r_bias, segments, key_segments, inputs.key_mask, inputs.step, self.separate_cls
        )
        dropout_p = self.attention_dropout if self.training else 0.0
        context = compute_attention(terms, dropout_p).flatten(2)  # [b, q, h * d_head]
        return self.layer_norm(query + self.hidden_dropout(self.post_proj(context)))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, self.d_head))

"""Relative multi-head attention (paper section A.2): content, position and token-type scores.

The score of query i and key j is, with every term divided by sqrt(d_head):

    (q_i + r_w_bias) . k_j                              content
  + (q_i + r_r_bias) . r_kernel(R(p_i - p_j))           position: R holds the sines and cosines of a distance
  + (q_i + r_s_bias) . seg_embed[same segment or not]   token type

The position term is computed for every distance once and then read along its diagonals ("relative shift"): queries and
keys are evenly spaced, so the score of (i, j) lies at a fixed stride in a table over distances, and the shift is a view.
The token-type term is a product too, of what a query gives to each kind of key and the kind that a key is: a few more
channels of the content term.

What happens to scores, softmax and values is in attend.py. Shapes: b texts, q queries, k keys, h heads, t distances,
s segment channels, d = d_model.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from funnel.model.attention_backends import AttentionTerms, attend
from funnel.model.config import FunnelConfig
from funnel.model.dropout import Dropout


class AttentionInputs(NamedTuple):
    """What the layers of a block need to know beside the hidden states; built once a batch.

    Attributes:
        key_mask: [b, k], true where a key counts.
        positions: [t, d_model], encodings of the distances from the largest to the smallest, `distances` of the query
            and key positions.
        step: how many keys one query's step is: 2 in a layer that pools its query, otherwise 1.
        query_segments, key_segments: [b, q, s] and [b, k, s]. The first channel is 1, the product of the others is 1
            where query and key are of one segment, else 0. All are 0 for a [cls] that takes no part.
    """

    key_mask: Tensor
    positions: Tensor
    step: int
    query_segments: Tensor
    key_segments: Tensor


def sinusoids(distances: Tensor, d_model: int) -> tuple[Tensor, Tensor]:
    """Sines and cosines of distances at d_model / 2 frequencies (paper section A.2).

    Args:
        distances: [t], in tokens of the input.

    Returns:
        Two tensors [t, d_model / 2] of the distances' dtype.
    """
    half = d_model // 2
    exponents = torch.arange(half, device=distances.device, dtype=distances.dtype) / half
    angles = distances.unsqueeze(1) / 10000**exponents
    return angles.sin(), angles.cos()


class RelativeMultiHeadAttention(nn.Module):
    """Attention with relative positions, then projection, dropout, residual and LayerNorm.

    Args of forward:
        query: [b, q, d]; also the residual.
        key_value: [b, k, d].
        inputs: the block's `AttentionInputs`.

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
        # Every term has the query in it, so scaling the query and its biases scales the scores.
        q = self._heads(self.q_head(query)) * self.scale
        k, v = self._heads(self.k_head(key_value)), self._heads(self.v_head(key_value))
        r = self._heads(inputs.positions.to(q) @ self.r_kernel.flatten(1).to(q))  # [t, h, d_head]
        w_bias, r_bias, s_bias = ((b * self.scale).to(q) for b in (self.r_w_bias, self.r_r_bias, self.r_s_bias))

        # A key of another segment gets the first of these, one of the same segment the sum of both.
        different, same = self.seg_embed.to(q)
        kinds = torch.stack([different, *[same - different] * (inputs.query_segments.shape[2] - 1)], dim=1)  # [h, s, d_head]
        segments = torch.einsum("bqhc,hsc->bqhs", q + s_bias, kinds) * inputs.query_segments.unsqueeze(2).to(q)

        terms = AttentionTerms(
            q, k, v, r, w_bias, r_bias, segments, inputs.key_segments.to(q), inputs.key_mask, inputs.step, self.separate_cls
        )
        context = attend(terms, self.attention_dropout if self.training else 0.0).flatten(2)  # [b, q, h * d_head]
        return self.layer_norm(query + self.hidden_dropout(self.post_proj(context)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, self.d_head))

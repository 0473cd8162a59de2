"""Relative multi-head attention (paper section A.2): content, position and token-type scores.

The score of query i and key j is, with every term divided by sqrt(d_head):

    (q_i + r_w_bias) . k_j                              content
  + (q_i + r_r_bias) . r_kernel(R(p_i - p_j))           position: R holds the sines and cosines of a distance
  + (q_i + r_s_bias) . seg_embed[same segment or not]   token type

The position term is computed for every distance once and then read along its diagonals ("relative shift"): queries and
keys are evenly spaced, so the score of (i, j) lies at a fixed stride in a table over distances, and the shift is a view.

Shapes: b texts, q queries, k keys, h heads, t distances, d = d_model.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnel.config import FunnelConfig
from funnel.dropout import Dropout


class AttentionInputs(NamedTuple):
    """What the layers of a block need to know beside the hidden states; built once a batch.

    Attributes:
        key_mask: [b, k], true where a key counts.
        positions: [t, d_model], encodings of the distances from the largest to the smallest, `distances` of the query
            and key positions.
        step: how many keys one query's step is: 2 in a layer that pools its query, otherwise 1.
        same_segment: [b, q, k], true where query and key are of one segment.
    """

    key_mask: Tensor
    positions: Tensor
    step: int
    same_segment: Tensor


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


def relative_shift(table: Tensor, keys: int, step: int) -> Tensor:
    """Reads scores over distances as scores over pairs of positions. A view where `table` is contiguous.

    Row i of the result is row i of `table` from column `step * (q - 1 - i)` on.

    Args:
        table: [b, h, q, t] with t = keys + step * q: column c is the c-th largest distance.
        keys: k.
        step: keys a query's step.

    Returns:
        [b, h, q, k].
    """
    b, h, q, t = table.shape
    flat = table.reshape(b, h, q * t)
    # One row further is t - step columns further in a table that is read as one long row.
    start = step * (q - 1)
    return flat[..., start : start + q * (t - step)].view(b, h, q, t - step)[..., :keys]


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
        self.attention_dropout = Dropout(config.attention_dropout)
        self.hidden_dropout = Dropout(config.hidden_dropout)

    def forward(self, query: Tensor, key_value: Tensor, inputs: AttentionInputs) -> Tensor:
        # Every term has the query in it, so scaling the query (and its biases) scales the scores.
        q = (self.q_head(query) * self.scale).unflatten(-1, (self.n_head, self.d_head))  # [b, q, h, d_head]
        k = self.k_head(key_value).unflatten(-1, (self.n_head, self.d_head)).transpose(1, 2)  # [b, h, k, d_head]
        v = self.v_head(key_value).unflatten(-1, (self.n_head, self.d_head)).transpose(1, 2)  # [b, h, k, d_head]

        scores = self._biased(q, self.r_w_bias) @ k.transpose(2, 3)  # [b, h, q, k]
        relative = self._relative_scores(q, inputs)
        if self.separate_cls:  # [cls] takes no part in position and token-type scores
            relative = F.pad(relative[:, :, 1:, 1:], (1, 0, 1, 0))
        scores = scores + relative
        scores = scores.masked_fill(~inputs.key_mask[:, None, None], torch.finfo(scores.dtype).min)

        weights = self.attention_dropout(scores.softmax(-1))
        context = (weights @ v).transpose(1, 2).flatten(2)  # [b, q, h * d_head]
        return self.layer_norm(query + self.hidden_dropout(self.post_proj(context)))

    def _biased(self, q: Tensor, bias: Tensor) -> Tensor:
        """The scaled query plus one of its biases, heads first: [b, h, q, d_head]."""
        return (q + (bias * self.scale).to(q)).transpose(1, 2)

    def _relative_scores(self, q: Tensor, inputs: AttentionInputs) -> Tensor:
        """Position and token-type scores. q: [b, q, h, d_head]. Returns [b, h, q, k]."""
        keys = inputs.same_segment.shape[2]
        r = (inputs.positions @ self.r_kernel.flatten(1).to(q)).unflatten(1, (self.n_head, self.d_head))  # [t, h, d_head]
        table = self._biased(q, self.r_r_bias) @ r.permute(1, 2, 0)  # [b, h, q, t]
        position = relative_shift(table, keys, inputs.step)

        segment = self._biased(q, self.r_s_bias) @ self.seg_embed.to(q).permute(1, 2, 0)  # [b, h, q, 2]
        different, same = segment.unbind(-1)
        return position + torch.where(inputs.same_segment.unsqueeze(1), same.unsqueeze(-1), different.unsqueeze(-1))

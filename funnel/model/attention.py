"""Multi-head attention, optionally with relative positions (paper section A.2).

The score of query i and key j is, with the products divided by sqrt(d_head):

    (q_i + r_w_bias) . k_j                              content
  + (q_i + r_r_bias) . r_kernel(R(p_i - p_j))           position: R is the sines and cosines of a distance
  + (q_i + r_s_bias) . seg_embed[same segment or not]   token type
  + distance_bias[bucket of p_i - p_j]                  a learned bias per head (arXiv 1910.10683, section 2.1)

The position and token-type terms require `relative_attention`, the distance bias `distance_buckets`. Without relative
attention, r_w_bias is the bias of q_head; with neither, this is ordinary attention (arXiv 1706.03762).

The position term is computed once per distance and then read along its diagonals ("relative shift"): queries and keys are
evenly spaced, so the score of (i, j) is at a fixed stride in a table over distances, and the shift is a view. The
token-type term is also a dot product, of the query's scores for the segments and an encoding of the key's segment: a few
additional channels of the content term.

The backends in attention_backends.py combine the terms. Shapes: b examples, q queries, k keys, h heads, t distances,
s segment channels, d = d_model, l tokens of the model's input.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnel.model import pooling
from funnel.model.attention_backends import compute_attention
from funnel.model.attention_terms import AttentionTerms, RelativeTerms
from funnel.model.config import FunnelConfig
from funnel.model.dropout import Dropout
from funnel.model.pooling import Positions

CLS_TOKEN_TYPE = 2
MAX_BUCKET_DISTANCE = 128  # of `distance_bucket`, in input tokens


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


def distance_bucket(distances: Tensor, num_buckets: int) -> Tensor:
    """The bucket of each distance, as in T5 and MPNet (arXiv 1910.10683, section 2.1).

    The first half of the buckets is for keys at or before the query, the second half for keys after it. Within a half,
    distances below a quarter of `num_buckets` have a bucket each; the larger ones share the others, at equal ratios up to
    `MAX_BUCKET_DISTANCE`.

    Args:
        distances: in input tokens, positive where the key precedes the query; any shape.

    Returns:
        Integers from 0 to num_buckets - 1, in the shape of `distances`.
    """
    half, num_exact = num_buckets // 2, num_buckets // 4
    size = distances.abs()
    ratio = torch.log(size.clamp(min=1).float() / num_exact) / math.log(MAX_BUCKET_DISTANCE / num_exact)
    shared = (num_exact + (ratio * (half - num_exact)).long()).clamp(max=half - 1)
    return torch.where(size < num_exact, size, shared) + half * (distances < 0)


class PositionContext(NamedTuple):
    """What all layers of a forward pass share.

    Attributes:
        encodings: [2 l + 1, d], from `DistanceEncodings`; None without relative attention.
        distance_bias: [buckets, h], the bias of every bucket of distances; None without `distance_buckets`.
    """

    encodings: Tensor | None
    distance_bias: Tensor | None


class RelativeInputs(NamedTuple):
    """What relative attention needs besides the hidden states.

    Attributes:
        distances: [t, d], encodings of the distances between queries and keys, from the largest to the smallest.
        is_pooled: whether the queries are pooled and the keys are not, so that their spacing is twice that of the keys.
        query_segments, key_segments: [b, q, s] and [b, k, s]. The first channel is 1; the dot product of the others is 1
            if query and key are in the same segment, else 0. All channels of a separate [CLS] are 0.
    """

    distances: Tensor
    is_pooled: bool  # torch.compile treats an int as a variable
    query_segments: Tensor
    key_segments: Tensor


class AttentionInputs(NamedTuple):
    """What a layer needs besides the hidden states; shared by the layers of a block.

    Attributes:
        key_mask: [b, k], true where a key is not masked.
        distance_bias: [h, q, k]; None without `distance_buckets`.
        relative: for the relative scores; None without relative attention.
    """

    key_mask: Tensor
    distance_bias: Tensor | None
    relative: RelativeInputs | None


def attention_inputs(context: PositionContext, queries: Positions, keys: Positions, config: FunnelConfig) -> AttentionInputs:
    """Builds the inputs of a layer.

    Args:
        context: of the forward pass.
        queries: positions of the queries.
        keys: positions of the keys, in the same block as the queries or in the one before.
    """
    bias = relative = None
    if context.distance_bias is not None:
        bias = _distance_bias(context.distance_bias, queries, keys, config)
    if context.encodings is not None:
        relative = _relative_inputs(context.encodings, queries, keys, config)
    return AttentionInputs(keys.mask, bias, relative)


def _distance_bias(table: Tensor, queries: Positions, keys: Positions, config: FunnelConfig) -> Tensor:
    """The bias of every pair of positions. [buckets, h] -> [h, q, k]."""
    query, key = (
        pooling.first_position(p.block, config) + pooling.spacing(p.block) * torch.arange(p.mask.shape[1], device=p.mask.device)
        for p in (queries, keys)
    )
    buckets = distance_bucket(query.unsqueeze(1) - key, config.distance_buckets)  # [q, k]
    return F.embedding(buckets, table).permute(2, 0, 1)


def _relative_inputs(encodings: Tensor, queries: Positions, keys: Positions, config: FunnelConfig) -> RelativeInputs:
    """The inputs of relative attention. encodings: [2 l + 1, d], of the distances from l to -l."""
    num_queries, num_keys = queries.mask.shape[1], keys.mask.shape[1]
    spacing = pooling.spacing(keys.block)
    step = pooling.spacing(queries.block) // spacing
    offset = pooling.first_position(queries.block, config) - pooling.first_position(keys.block, config)
    largest = offset + step * spacing * (num_queries - 1)  # distance from the last query to the first key
    distances = largest - spacing * torch.arange(num_keys + step * num_queries, device=encodings.device)  # [t]
    length = encodings.shape[0] // 2
    # Distances are out of range only for a separate [CLS], which has no position scores, and in columns that the shift drops.
    rows = (length - distances).clamp(0, 2 * length)
    return RelativeInputs(
        encodings[rows],
        step == 2,
        _segment_channels(queries, config, is_query=True).to(encodings.dtype),
        _segment_channels(keys, config, is_query=False).to(encodings.dtype),
    )


def _segment_channels(positions: Positions, config: FunnelConfig, is_query: bool) -> Tensor:
    """Segment channels of queries or keys (see `RelativeInputs`): one for all keys and one per token type. [b, n, 4]."""
    types = positions.token_type_ids
    channels = types.unsqueeze(2) == torch.arange(3, device=types.device)  # [b, n, 3]
    if is_query and not config.separate_cls:  # [CLS] is in the same segment as every other token
        is_cls = (types == CLS_TOKEN_TYPE).unsqueeze(2)
        channels = torch.cat([channels[..., :CLS_TOKEN_TYPE] | is_cls, torch.ones_like(is_cls)], dim=2)
    channels = torch.cat([torch.ones_like(channels[..., :1]), channels], dim=2)
    if config.separate_cls:
        channels = torch.cat([torch.zeros_like(channels[:, :1]), channels[:, 1:]], dim=1)
    return channels


def prefers_joint_products(x: Tensor) -> bool:
    """Whether to join the weights of several products of x into one: faster on accelerators, slower on CPUs.

    False for the meta device, so that only the FLOPs of the equations are counted.
    """
    return x.device.type not in ("cpu", "meta")


def is_plain(*modules: nn.Module) -> bool:
    """Whether only the weights of Linear or LayerNorm modules matter: they have no hooks and are not replaced by an adapter."""
    return all(type(m) in (nn.Linear, nn.LayerNorm) and not m._forward_hooks and not m._forward_pre_hooks for m in modules)


def joint_linear(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, ...]:
    """The outputs of linear layers with the same input, [..., d] -> [..., n] each (views), in one matrix product.

    Args:
        layers: weights [n, d] and biases [n].
    """
    n = len(layers)
    if padding := -sum(weight.shape[0] for weight, _ in layers) % 8:  # fast matrix products require a multiple of 8
        layers = [*layers, (layers[0][0].new_zeros(padding, x.shape[-1]), None)]
    weight = torch.cat([weight for weight, _ in layers])
    bias = torch.cat([weight.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in layers])
    return F.linear(x, weight, bias).split([weight.shape[0] for weight, _ in layers], dim=-1)[:n]


def add_and_normalize(residual: Tensor, update: Tensor, layer_norm: nn.LayerNorm) -> Tensor:
    """The LayerNorm of a sum, [..., d], in the residual's dtype.

    On a GPU, autocast would convert the sum to float32 and LayerNorm would return float32. The kernel computes mean and
    variance in float32 in any case.
    """
    total = residual + update
    if total.device.type != "cuda" or not is_plain(layer_norm):
        return layer_norm(total).to(residual.dtype)
    with torch.autocast("cuda", enabled=False):
        weight, bias = layer_norm.weight.to(total.dtype), layer_norm.bias.to(total.dtype)
        return F.layer_norm(total, layer_norm.normalized_shape, weight, bias, layer_norm.eps).to(residual.dtype)


class FunnelAttention(nn.Module):
    """Multi-head attention, followed by projection, dropout, residual and LayerNorm.

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
        self.separate_cls, self.relative_attention = config.separate_cls, config.relative_attention
        width = config.n_head * config.d_head
        self.q_head = nn.Linear(config.d_model, width, bias=not config.relative_attention)  # relative: its bias is r_w_bias
        self.k_head = nn.Linear(config.d_model, width)
        self.v_head = nn.Linear(config.d_model, width)
        if config.relative_attention:
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
        directions = self._segment_directions() if self.relative_attention else None
        q, k, v, segments = self._project(query, key_value, directions)
        relative = None
        if inputs.relative is not None and segments is not None:
            relative = self._relative_terms(q, segments, inputs.relative)
        terms = AttentionTerms(q, k, v, inputs.key_mask, inputs.distance_bias, relative)
        dropout_p = self.attention_dropout if self.training else 0.0
        context = compute_attention(terms, dropout_p).flatten(2)  # [b, q, h * d_head]
        return add_and_normalize(query, self.hidden_dropout(self.post_proj(context)), self.layer_norm)

    def _segment_directions(self) -> Tensor:
        """Two vectors per head: their dot products with a query (and its bias) are its score for a key in another segment, and
        what a key in the same segment adds. [h, 2, d_head].
        """
        different, same = self.seg_embed  # [h, d_head] each
        return torch.stack([different, same - different], dim=1)

    def _project(
        self, query: Tensor, key_value: Tensor, directions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Projects the inputs; queries and segment scores are divided by sqrt(d_head).

        Returns:
            Queries, keys and values, [b, q or k, h, d_head], and the segment scores [b, q, h, 2]: products of the queries and
            the directions and of the bias and the directions; None without directions.
        """
        segments = None
        if not prefers_joint_products(query) or not is_plain(self.q_head, self.k_head, self.v_head):
            q, k, v = self.q_head(query), self.k_head(key_value), self.v_head(key_value)
            if directions is not None:
                segments = torch.einsum("bqhc,hsc->bqhs", self._split_heads(q), directions.to(q))
        else:
            q_layer, k_layer, v_layer = ((head.weight, head.bias) for head in (self.q_head, self.k_head, self.v_head))
            segment_layers = []
            if directions is not None:  # the products are linear in `query`, too
                weight = directions @ self.q_head.weight.unflatten(0, (self.n_head, self.d_head))  # [h, 2, d]
                segment_layers = [(weight.flatten(0, 1), None)]
            if query is key_value:
                q, k, v, *products = joint_linear(query, [q_layer, k_layer, v_layer, *segment_layers])
            else:
                q, *products = joint_linear(query, [q_layer, *segment_layers])
                k, v = joint_linear(key_value, [k_layer, v_layer])
            if products:
                segments = products[0].unflatten(-1, (self.n_head, 2))
        if segments is not None and directions is not None:
            segments = (segments + (directions @ self.r_s_bias.unsqueeze(2)).squeeze(2).to(segments)) * self.scale
        return self._split_heads(q) * self.scale, self._split_heads(k), self._split_heads(v), segments

    def _relative_terms(self, q: Tensor, segments: Tensor, inputs: RelativeInputs) -> RelativeTerms:
        r = self._split_heads(inputs.distances.to(q) @ self.r_kernel.flatten(1).to(q))  # [t, h, d_head]
        w_bias, r_bias = ((bias * self.scale).to(q) for bias in (self.r_w_bias, self.r_r_bias))
        # The first channel gives every key the score of another segment; a matching segment's channel adds the difference.
        num_types = inputs.query_segments.shape[2] - 1
        channels = torch.cat([segments[..., :1], segments[..., 1:].expand(-1, -1, -1, num_types)], dim=-1)
        channels = channels * inputs.query_segments.unsqueeze(2).to(q)  # [b, q, h, s]
        step = 2 if inputs.is_pooled else 1
        return RelativeTerms(r, w_bias, r_bias, channels, inputs.key_segments.to(q), step, self.separate_cls)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, self.d_head))

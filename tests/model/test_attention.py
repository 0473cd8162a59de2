"""Attention in float64, compared with a literal implementation of its equation, pair by pair, and with PyTorch's."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ABSOLUTE, NONE, padded_batch, tiny_config

from funnel.model import attention, pooling
from funnel.model.attention import FunnelAttention, PositionContext, attention_inputs, distance_bucket, sinusoids
from funnel.model.config import FunnelConfig
from funnel.model.encoder import position_context
from funnel.model.heads import FunnelForSequenceClassification, FunnelModel
from funnel.model.pooling import Positions


def test_sinusoids_follow_the_papers_formula():
    distances = [0, 3, -7]
    sines, cosines = sinusoids(torch.tensor(distances, dtype=torch.float64), 8)
    for t, frequency in itertools.product(range(3), range(4)):
        angle = distances[t] / 10000 ** (2 * frequency / 8)
        assert math.isclose(sines[t, frequency], math.sin(angle), abs_tol=1e-12)
        assert math.isclose(cosines[t, frequency], math.cos(angle), abs_tol=1e-12)


def literal_bucket(distance: int, num_buckets: int) -> int:
    """The bucket of one distance; equation in section 2.1 of arXiv 1910.10683 and in its published code."""
    half, exact, size = num_buckets // 2, num_buckets // 4, abs(distance)
    if size >= exact:
        share = math.log(size / exact) / math.log(128 / exact)  # of the way from the last exact bucket to distance 128
        size = min(exact + int(share * (half - exact)), half - 1)
    return size + (half if distance < 0 else 0)


@pytest.mark.parametrize("num_buckets", [4, 8, 32])
def test_every_distance_has_the_bucket_of_the_published_formula(num_buckets):
    distances = [d for d in range(-600, 601) if abs(d) != 128]  # there, the formula's logarithms are rounded
    expected = [literal_bucket(d, num_buckets) for d in distances]
    assert distance_bucket(torch.tensor(distances), num_buckets).tolist() == expected
    assert set(expected) == set(range(num_buckets)) - {num_buckets // 2}  # distance 0 is in the first half only


def position(block: int, i: int, config: FunnelConfig) -> int:
    """The position of a block's i-th state, in input tokens."""
    return pooling.first_position(block, config) + pooling.spacing(block) * i


def literal_attention(attention, config, states, positions, bias_table):
    """Attention for one example, one pair of positions and one head at a time.

    Args:
        states: query [q, d] and key_value [k, d].
        positions: of queries and keys.
        bias_table: [buckets, h], or None.

    Returns:
        [q, d].
    """
    (query, key_value), (queries, keys) = states, positions
    h, c = config.n_head, config.d_head
    q = attention.q_head(query).view(-1, h, c)
    k = attention.k_head(key_value).view(-1, h, c)
    v = attention.v_head(key_value).view(-1, h, c)
    scores = torch.full((h, len(q), len(k)), -math.inf, dtype=query.dtype)
    for i, j, n in itertools.product(range(len(q)), range(len(k)), range(h)):
        if not keys.mask[0, j]:
            continue
        distance = position(queries.block, i, config) - position(keys.block, j, config)
        score = q[i, n] @ k[j, n]
        if config.relative_attention:
            score = score + attention.r_w_bias[n] @ k[j, n]
            if not (config.separate_cls and (i == 0 or j == 0)):
                encoding = torch.cat(sinusoids(torch.tensor([distance], dtype=query.dtype), config.d_model), 1)[0]
                score = score + (q[i, n] + attention.r_r_bias[n]) @ (encoding @ attention.r_kernel[:, n])
                query_type, key_type = queries.token_type_ids[0, i], keys.token_type_ids[0, j]
                is_same_segment = query_type == key_type or query_type == 2 or key_type == 2
                score = score + (q[i, n] + attention.r_s_bias[n]) @ attention.seg_embed[int(is_same_segment), n]
        scores[n, i, j] = score / math.sqrt(c)
        if bias_table is not None:
            scores[n, i, j] += bias_table[literal_bucket(distance, config.distance_buckets), n]
    context = torch.einsum("hqk,khc->qhc", scores.softmax(-1), v).flatten(1)
    return attention.layer_norm(query + attention.post_proj(context))


@pytest.mark.parametrize("separate_cls", [True, False])
@pytest.mark.parametrize("query_is_pooled", [False, True])
@pytest.mark.parametrize("fields", [{}, {"distance_buckets": 8}, NONE, {**NONE, "distance_buckets": 8}], ids=str)
@torch.no_grad()
def test_attention_follows_its_equation(separate_cls, query_is_pooled, fields):
    torch.manual_seed(0)
    config = tiny_config(blocks="1,1,1", separate_cls=separate_cls, **fields)
    model = FunnelModel(config).double().eval()
    bias_table = model.encoder.bias_table()
    if bias_table is not None:
        torch.nn.init.normal_(bias_table)  # initialized to zero
    for length in (1, 2, 5, 12):
        padded_length = length + 3
        _, mask, types = padded_batch([length], width=padded_length)
        keys = Positions(0, mask.bool(), types)
        for block in (0, 1):
            hidden = torch.randn(1, keys.mask.shape[1], config.d_model, dtype=torch.float64)
            attention = model.encoder.layers(block)[0].attention
            query, queries = hidden, keys
            if query_is_pooled:
                query, queries = pooling.pool_hidden(hidden, keys.mask, config), pooling.pool_positions(keys, config)
            embedded = torch.empty(1, padded_length, config.d_model, dtype=torch.float64)
            context = position_context(embedded, model.encoder.distance_encodings, bias_table)
            actual = attention(query, hidden, attention_inputs(context, queries, keys, config))[0]
            expected = literal_attention(attention, config, (query[0], hidden[0]), (queries, keys), bias_table)
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
            keys = pooling.pool_positions(keys, config)


@pytest.mark.parametrize("query_is_pooled", [False, True])
def test_attention_without_relative_terms_is_multi_head_attention(query_is_pooled):
    torch.manual_seed(0)
    config = tiny_config(**NONE)
    attention = FunnelAttention(config).double().eval()
    reference = torch.nn.MultiheadAttention(config.d_model, config.n_head, batch_first=True).double().eval()
    heads = (attention.q_head, attention.k_head, attention.v_head)
    reference.in_proj_weight.data = torch.cat([head.weight for head in heads])
    reference.in_proj_bias.data = torch.cat([head.bias for head in heads])
    reference.out_proj.load_state_dict(attention.post_proj.state_dict())
    _, mask, types = padded_batch([9, 4, 1])
    keys = queries = Positions(0, mask.bool(), types)
    key_value = query = torch.randn(3, 9, config.d_model, dtype=torch.float64)
    if query_is_pooled:
        query, queries = pooling.pool_hidden(key_value, keys.mask, config), pooling.pool_positions(keys, config)
    actual = attention(query, key_value, attention_inputs(PositionContext(None, None), queries, keys, config))
    expected, _ = reference(query, key_value, key_value, key_padding_mask=~keys.mask)
    torch.testing.assert_close(actual, attention.layer_norm(query + expected), rtol=0, atol=1e-12)


def test_a_separate_cls_has_no_position_and_token_type_scores():
    torch.manual_seed(0)
    model = FunnelModel(tiny_config(blocks="1")).eval()
    attention = model.encoder.layers(0)[0].attention
    only_cls = padded_batch([1])
    expected = model.encode(*only_cls)[0][-1]
    with torch.no_grad():
        attention.r_kernel.mul_(7)
        attention.seg_embed.mul_(7)
    torch.testing.assert_close(model.encode(*only_cls)[0][-1], expected)
    ids, mask, types = padded_batch([6])
    other_types = types.clone()
    other_types[:, 0] = 0
    torch.testing.assert_close(model(ids, mask, types), model(ids, mask, other_types))


# --- joint products ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, ABSOLUTE, {"pool_q_only": False}], ids=str)
def test_joint_products_of_queries_keys_and_values_equal_separate_ones(changes, monkeypatch):
    """GPUs use joint products, CPUs do not."""
    gradients = []
    for joint in (False, True):
        monkeypatch.setattr(attention, "prefers_joint_products", lambda x, joint=joint: joint)
        torch.manual_seed(0)
        model = FunnelForSequenceClassification(tiny_config(blocks="2,2", **changes)).double()
        logits = model(*padded_batch([13, 9]))
        logits.square().sum().backward()
        gradients.append([logits, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["q_head", "k_head", "v_head"])
def test_a_projection_with_a_hook_or_an_adapter_is_not_joined(name, monkeypatch):
    monkeypatch.setattr(attention, "prefers_joint_products", lambda x: True)
    layer = attention.FunnelAttention(tiny_config())
    x, calls = torch.randn(2, 5, layer.post_proj.out_features), []
    getattr(layer, name).register_forward_hook(lambda *_: calls.append(name))
    layer._project(x, x, layer._segment_directions())
    assert calls == [name]


def test_queries_keys_and_values_of_one_sequence_take_one_product(monkeypatch):
    monkeypatch.setattr(attention, "prefers_joint_products", lambda x: True)
    config = tiny_config()
    layer = attention.FunnelAttention(config)
    x = torch.randn(2, 5, config.d_model)
    for key_value, products in ((x, 1), (torch.randn(2, 9, config.d_model), 2)):
        calls = []
        monkeypatch.setattr(F, "linear", lambda *arguments, calls=calls: calls.append(1) or torch._C._nn.linear(*arguments))
        layer._project(x, key_value, layer._segment_directions())
        assert len(calls) == products

"""Relative attention compared with a literal implementation of the paper's equations, pair by pair in float64."""

import itertools
import math

import pytest
import torch
from conftest import padded_batch, tiny_config

from funnel.model import pooling
from funnel.model.attention import attention_inputs, sinusoids
from funnel.model.heads import FunnelModel
from funnel.model.pooling import Positions


def test_sinusoids_follow_the_papers_formula():
    distances = [0, 3, -7]
    sines, cosines = sinusoids(torch.tensor(distances, dtype=torch.float64), 8)
    for t, frequency in itertools.product(range(3), range(4)):
        angle = distances[t] / 10000 ** (2 * frequency / 8)
        assert math.isclose(sines[t, frequency], math.sin(angle), abs_tol=1e-12)
        assert math.isclose(cosines[t, frequency], math.cos(angle), abs_tol=1e-12)


def literal_attention(attention, config, query, key_value, queries: Positions, keys: Positions):
    """Attention for one example, one pair of positions and one head at a time. query [q, d], key_value [k, d] -> [q, d]."""
    h, c = config.n_head, config.d_head
    q = attention.q_head(query).view(-1, h, c)
    k = attention.k_head(key_value).view(-1, h, c)
    v = attention.v_head(key_value).view(-1, h, c)
    scores = torch.full((h, len(q), len(k)), -math.inf, dtype=query.dtype)

    def position(block, i):
        return pooling.first_position(block, config) + pooling.spacing(block) * i

    for i, j, n in itertools.product(range(len(q)), range(len(k)), range(h)):
        if not keys.mask[0, j]:
            continue
        score = (q[i, n] + attention.r_w_bias[n]) @ k[j, n]
        if not (config.separate_cls and (i == 0 or j == 0)):
            distance = torch.tensor([position(queries.block, i) - position(keys.block, j)], dtype=query.dtype)
            encoding = torch.cat(sinusoids(distance, config.d_model), 1)[0]
            score = score + (q[i, n] + attention.r_r_bias[n]) @ (encoding @ attention.r_kernel[:, n])
            query_type, key_type = queries.token_type_ids[0, i], keys.token_type_ids[0, j]
            is_same_segment = query_type == key_type or query_type == 2 or key_type == 2
            score = score + (q[i, n] + attention.r_s_bias[n]) @ attention.seg_embed[int(is_same_segment), n]
        scores[n, i, j] = score / math.sqrt(c)
    context = torch.einsum("hqk,khc->qhc", scores.softmax(-1), v).flatten(1)
    return attention.layer_norm(query + attention.post_proj(context))


@pytest.mark.parametrize("separate_cls", [True, False])
@pytest.mark.parametrize("query_is_pooled", [False, True])
@torch.no_grad()
def test_attention_follows_the_papers_equations(separate_cls, query_is_pooled):
    torch.manual_seed(0)
    config = tiny_config(blocks="1,1,1", separate_cls=separate_cls)
    model = FunnelModel(config).double().eval()
    for length in (1, 2, 5, 12):
        padded_length = length + 3
        _, mask, types = padded_batch([length], width=padded_length)
        encodings = model.encoder.distance_encodings(padded_length, torch.float64, mask.device)
        keys = Positions(0, mask.bool(), types)
        for block in (0, 1):
            hidden = torch.randn(1, keys.mask.shape[1], config.d_model, dtype=torch.float64)
            attention = model.encoder.layers(block)[0].attention
            query, queries = hidden, keys
            if query_is_pooled:
                query, queries = pooling.pool_hidden(hidden, keys.mask, config), pooling.pool_positions(keys, config)
            actual = attention(query, hidden, attention_inputs(encodings, padded_length, queries, keys, config))[0]
            expected = literal_attention(attention, config, query[0], hidden[0], queries, keys)
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
            keys = pooling.pool_positions(keys, config)


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

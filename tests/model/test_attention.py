"""Relative attention against a direct reading of the paper's equations, pair by pair in float64."""

import itertools
import math

import pytest
import torch
from conftest import padded_batch, tiny_config

from funnel.model import pooling
from funnel.model.attention import sinusoids
from funnel.model.heads import FunnelModel


def test_sinusoids_are_those_of_the_paper():
    sines, cosines = sinusoids(torch.tensor([0.0, 3.0, -7.0], dtype=torch.float64), 8)
    for t, k in itertools.product(range(3), range(4)):
        angle = [0, 3, -7][t] / 10000 ** (2 * k / 8)
        assert math.isclose(sines[t, k], math.sin(angle), abs_tol=1e-12)
        assert math.isclose(cosines[t, k], math.cos(angle), abs_tol=1e-12)


def plain_attention(attention, config, query, key_value, query_block, key_block, types_q, types_k, mask):
    """One text, one pair of positions at a time."""
    h, w = config.n_head, config.d_head
    q = attention.q_head(query).view(-1, h, w)
    k = attention.k_head(key_value).view(-1, h, w)
    v = attention.v_head(key_value).view(-1, h, w)
    scores = torch.full((h, len(q), len(k)), -math.inf, dtype=query.dtype)

    def position(block, i):
        return pooling.first_position(block, config) + pooling.spacing(block) * i

    for i, j, n in itertools.product(range(len(q)), range(len(k)), range(h)):
        if not mask[j]:
            continue
        score = (q[i, n] + attention.r_w_bias[n]) @ k[j, n]
        if not (config.separate_cls and (i == 0 or j == 0)):
            distance = torch.tensor([position(query_block, i) - position(key_block, j)], dtype=query.dtype)
            encoding = torch.cat(sinusoids(distance, config.d_model), 1)[0]
            score = score + (q[i, n] + attention.r_r_bias[n]) @ (encoding @ attention.r_kernel[:, n])
            same = types_q[i] == types_k[j] or types_q[i] == 2 or types_k[j] == 2
            score = score + (q[i, n] + attention.r_s_bias[n]) @ attention.seg_embed[int(same), n]
        scores[n, i, j] = score / math.sqrt(w)
    context = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    return attention.layer_norm(query + attention.post_proj(context))


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("pooled", [False, True])
def test_scores_are_those_of_the_equations(separate, pooled):
    torch.manual_seed(0)
    config = tiny_config(block_sizes=(1, 1, 1), separate_cls=separate)
    model = FunnelModel(config).double().eval()
    build = model.encoder.attention_inputs
    for length in (1, 2, 5, 12):
        _, mask, types = padded_batch([length], width=length + 3)
        mask = mask.bool()
        for block in (0, 1):
            hidden = torch.randn(1, mask.shape[1], config.d_model, dtype=torch.float64)
            attention = model.encoder.layers(block)[0].attention
            encodings = build.distances(length + 3, torch.float64, hidden.device)
            query, types_q, query_block = hidden, types, block
            if pooled:
                query = pooling.pool_hidden(hidden, mask, config)
                types_q, query_block = pooling.pool_token_types(types, mask, config), block + 1
            inputs = build.inputs(encodings, (query_block, types_q), (block, types, mask), length + 3)
            found = attention(query, hidden, inputs)[0]
            expected = plain_attention(
                attention, config, query[0], hidden[0], query_block, block, types_q[0], types[0], mask[0]
            )
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
            mask, types = pooling.pool_mask(mask, config), pooling.pool_token_types(types, mask, config)


def test_cls_takes_no_part_in_position_and_type_scores():
    torch.manual_seed(0)
    config = tiny_config(block_sizes=(1,))
    model = FunnelModel(config).eval()
    layer = model.encoder.layers(0)[0]
    ids, mask, types = padded_batch([1])
    before = model.encode(ids, mask, types)[0][-1]
    with torch.no_grad():
        layer.attention.r_kernel.mul_(7)
        layer.attention.seg_embed.mul_(7)
    torch.testing.assert_close(model.encode(ids, mask, types)[0][-1], before)
    ids, mask, types = padded_batch([6])
    changed = types.clone()
    changed[:, 0] = 0
    torch.testing.assert_close(model(ids, mask, types), model(ids, mask, changed))

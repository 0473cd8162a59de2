"""Attention rollout against a computation of its own from transformers' attention weights."""

import numpy as np
import pytest
import torch
from conftest import tiny_config

from funnel.analysis.rollout import describe, explain
from funnel.data.tokenizer import FunnelTokenizer
from funnel.inference import Classifier
from funnel.model import attention_backends
from funnel.model.heads import FunnelForSequenceClassification

WORDS = "a film that was good and bad or so it seems to me now"


@pytest.fixture(scope="module")
def tokenizer():
    return FunnelTokenizer.train([WORDS] * 5)


def classifier(tokenizer, **options):
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config(vocab_size=tokenizer.vocab_size, num_decoder_layers=0, **options))
    for parameter in model.parameters():  # so that attention is not the same everywhere
        torch.nn.init.normal_(parameter, std=0.5)
    return Classifier(model, tokenizer)


def test_rollout_of_transformers_attention(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the peer is not installed: pip install funnel[test]")
    from funnel.model import checkpoint
    from funnel.weights import huggingface

    ours = classifier(tokenizer, block_sizes=(1, 2, 1))
    saved = checkpoint.Checkpoint(ours.model.config, ours.model.state_dict(), "FunnelForSequenceClassification")
    huggingface.write(tmp_path, saved)
    peer = transformers.FunnelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = tokenizer.encode([WORDS])[0].input_ids
    assert len(ids) == 16
    types = [2] + [0] * 15
    with torch.no_grad():
        out = peer(torch.tensor([ids]), torch.ones(1, 16), torch.tensor([types]), output_attentions=True)
    a = [layer[0].double().mean(0).numpy() for layer in out.attentions]  # q x k: 16x16, 8x16, 8x8, 4x8
    assert [layer.shape for layer in a] == [(16, 16), (8, 16), (8, 8), (4, 8)]

    def pool(rows):  # position 0 stays, then pairs, and a last one without a partner is dropped with truncate_seq
        matrix = np.zeros(((rows + 1) // 2, rows))
        matrix[0, 0] = 1
        for i in range(1, len(matrix)):
            matrix[i, [2 * i - 1, 2 * i]] = 0.5
        return matrix

    last = 0.5 * a[3][0] + 0.5 * pool(8)[0]
    middle = (0.5 * a[2] + 0.5 * np.eye(8)) @ (0.5 * a[1] + 0.5 * pool(16))
    expected = [last, last @ (0.5 * a[2] + 0.5 * np.eye(8)), last @ middle, last @ middle @ (0.5 * a[0] + 0.5 * np.eye(16))]
    found = explain(ours, WORDS)
    np.testing.assert_allclose(found.shares, expected[3], atol=1e-6)
    np.testing.assert_allclose([p.share for p in found.blocks[0]], expected[2], atol=1e-6)
    np.testing.assert_allclose([p.share for p in found.blocks[1]], expected[0], atol=1e-6)
    assert [p.share for p in found.blocks[2]] == [1, 0, 0, 0]
    assert [p.tokens for p in found.blocks[1]] == [[0], [1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14]]
    assert [p.tokens for p in found.blocks[2]] == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert found.tokens[:3] == ["<cls>" if "<cls>" in found.tokens else "[CLS]", "a", "film"]


@pytest.mark.parametrize("text", ["", "a", "a film that was", WORDS])
@pytest.mark.parametrize("pair", [None, "so it seems"])
@pytest.mark.parametrize(
    "options",
    [{}, {"pool_q_only": False}, {"pooling_type": "max"}, {"truncate_seq": False}, {"separate_cls": False},
     {"block_sizes": (2, 1, 1, 1, 1), "block_repeats": (1, 2, 1, 2, 1)}],
)  # fmt: skip
def test_shares_of_every_block_sum_to_one(text, pair, options, tokenizer):
    found = explain(classifier(tokenizer, **options), text, pair)
    assert len(found.shares) == len(found.tokens)
    for shares in (found.shares, *([p.share for p in block] for block in found.blocks)):
        assert sum(shares) == pytest.approx(1)
        assert min(shares) >= 0
    said = describe(found)
    for n, block in enumerate(found.blocks):
        assert f"block {n}: {len(block)} position" + "s" * (len(block) > 1) + "\n" in said


def test_the_prediction_is_the_classifiers_own(tokenizer):
    ours = classifier(tokenizer)
    found, expected = explain(ours, WORDS).prediction, ours(WORDS)
    assert found.label == expected.label
    assert found.probability == pytest.approx(expected.probability, abs=1e-6)
    assert attention_backends._recorded is None

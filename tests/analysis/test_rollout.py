"""Attention rollout, compared with a computation from transformers' attention weights."""

import numpy as np
import pytest
import torch
from conftest import tiny_config

from funnel.analysis.rollout import explain
from funnel.cli.explain import format_explanation
from funnel.data.tokenizer import FunnelTokenizer
from funnel.inference.classifier import Classifier
from funnel.model.attention_backends import capture_attention_weights
from funnel.model.heads import FunnelForSequenceClassification

TEXT = "a film that was good and bad or so it seems to me now"


@pytest.fixture(scope="module")
def tokenizer():
    return FunnelTokenizer.train([TEXT] * 5)


def random_classifier(tokenizer, **options) -> Classifier:
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config(vocab_size=tokenizer.vocab_size, num_decoder_layers=0, **options))
    for parameter in model.parameters():  # so that attention is not uniform
        torch.nn.init.normal_(parameter, std=0.5)
    return Classifier(model, tokenizer)


def pooling_matrix(rows: int) -> np.ndarray:
    """Keeps position 0 and averages pairs; with truncate_seq, a last position without a partner is dropped."""
    matrix = np.zeros(((rows + 1) // 2, rows))
    matrix[0, 0] = 1
    for i in range(1, len(matrix)):
        matrix[i, [2 * i - 1, 2 * i]] = 0.5
    return matrix


def test_rollout_matches_transformers_attention(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra test")
    from funnel.model.checkpoint import Checkpoint
    from funnel.weights.huggingface import write_huggingface

    classifier = random_classifier(tokenizer, blocks="1,2,1")
    model = classifier.model
    write_huggingface(tmp_path, Checkpoint(model.config, model.state_dict(), "FunnelForSequenceClassification"))
    peer = transformers.FunnelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = tokenizer.encode([TEXT])[0].input_ids
    assert len(ids) == 16
    types = [2] + [0] * 15
    with torch.no_grad():
        output = peer(torch.tensor([ids]), torch.ones(1, 16), torch.tensor([types]), output_attentions=True)
    a = [layer[0].double().mean(0).numpy() for layer in output.attentions]  # each [q, k]
    assert [layer.shape for layer in a] == [(16, 16), (8, 16), (8, 8), (4, 8)]

    last = 0.5 * a[3][0] + 0.5 * pooling_matrix(8)[0]
    middle = (0.5 * a[2] + 0.5 * np.eye(8)) @ (0.5 * a[1] + 0.5 * pooling_matrix(16))
    after_block_0 = last @ middle
    tokens = after_block_0 @ (0.5 * a[0] + 0.5 * np.eye(16))
    explanation = explain(classifier, TEXT)
    np.testing.assert_allclose(explanation.contributions, tokens, atol=1e-6)
    np.testing.assert_allclose([p.contribution for p in explanation.blocks[0]], after_block_0, atol=1e-6)
    np.testing.assert_allclose([p.contribution for p in explanation.blocks[1]], last, atol=1e-6)
    assert [p.contribution for p in explanation.blocks[2]] == [1, 0, 0, 0]
    pairs = [[0], [1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14]]
    assert [p.tokens for p in explanation.blocks[1]] == pairs
    assert [p.tokens for p in explanation.blocks[2]] == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert explanation.tokens[:3] == [" <cls>", " a", " film"]


@pytest.mark.parametrize("text", ["", "a", "a film that was", TEXT])
@pytest.mark.parametrize("pair", [None, "so it seems"])
@pytest.mark.parametrize(
    "options",
    [{}, {"pool_q_only": False}, {"pooling_type": "max"}, {"truncate_seq": False}, {"separate_cls": False},
     {"blocks": "2,1x2,1,1x2,1"}],
)  # fmt: skip
def test_contributions_sum_to_one_in_every_block(text, pair, options, tokenizer):
    explanation = explain(random_classifier(tokenizer, **options), text, pair)
    assert len(explanation.contributions) == len(explanation.tokens)
    blocks = [[position.contribution for position in block] for block in explanation.blocks]
    for contributions in (explanation.contributions, *blocks):
        assert sum(contributions) == pytest.approx(1)
        assert min(contributions) >= 0
    printed = format_explanation(explanation)
    for number, block in enumerate(explanation.blocks):
        assert f"block {number}: {len(block)} position" + "s" * (len(block) > 1) + "\n" in printed


def test_explanation_contains_the_classifiers_prediction(tokenizer):
    classifier = random_classifier(tokenizer)
    explained, expected = explain(classifier, TEXT).prediction, classifier(TEXT)
    assert explained.label == expected.label
    assert explained.probability == pytest.approx(expected.probability, abs=1e-6)


def test_explain_counts_truncated_texts(tokenizer):
    classifier = random_classifier(tokenizer)
    classifier.inputs = classifier.inputs._replace(max_length=8)
    assert len(explain(classifier, TEXT).tokens) == 8
    assert classifier.n_truncated == 1


def test_attention_is_only_captured_while_explaining(tokenizer):
    classifier = random_classifier(tokenizer)
    explain(classifier, TEXT)
    with capture_attention_weights() as weights:
        pass
    classifier(TEXT)
    assert weights == []

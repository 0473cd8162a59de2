"""Attention rollout through pooled blocks: how much of the final [CLS] state comes from each token.

Rollout (Abnar and Zuidema 2020, arXiv 2005.00928) models a layer as a matrix that mixes positions: half attention, averaged
over heads, and half residual connection. The product of these matrices says how much of each input position ends up in
each output position. In a layer that pools, the residual connection is the pooling itself. Rollout accounts for attention
weights, but not for values and feed-forward layers: treat it as a rough estimate.

Shapes: l tokens, p positions of a block's output, q and k queries and keys of a layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from funnel.data.encoding import encode_texts
from funnel.inference.classifier import Classifier, Prediction
from funnel.model import pooling
from funnel.model.attention_backends import capture_attention_weights
from funnel.model.config import FunnelConfig


class Position(NamedTuple):
    """A position of a block's output.

    Attributes:
        tokens: indices of the tokens that were pooled into it.
        contribution: share of the final [CLS] state that passes through it; those of a block sum to 1.
    """

    tokens: list[int]
    contribution: float


class Explanation(NamedTuple):
    """Attention rollout of one prediction.

    Attributes:
        tokens: text of each token, including special tokens; it starts with a space if the token begins a word.
        contributions: share of the final [CLS] state that comes from each token; they sum to 1.
        blocks: the positions of every block's output.
        prediction: the classifier's.
    """

    tokens: list[str]
    contributions: list[float]
    blocks: list[list[Position]]
    prediction: Prediction


class AttentionRollout(NamedTuple):
    """The matrices that mix positions.

    Attributes:
        layers: for every layer run, [q, k]: how much of each input position is in each output position; rows sum to 1.
        blocks: for every block, [p, l]: how much of each token was pooled into each position.
    """

    layers: list[Tensor]
    blocks: list[Tensor]

    def cls_contributions(self) -> list[Tensor]:
        """Contributions of the positions before every layer run, and after the last one, to the final [CLS] state."""
        contributions = [torch.ones(1, dtype=torch.float64)]  # the last layer only computes [CLS]
        for layer in reversed(self.layers):
            contributions.insert(0, contributions[0] @ layer)
        return contributions


@torch.no_grad()
def explain(classifier: Classifier, text: str, pair: str | None = None) -> Explanation:
    """Computes the attention rollout of one text or pair of texts.

    Raises:
        FunnelError: the text cannot be encoded.
    """
    config, tokenizer = classifier.model.config, classifier.tokenizer
    dataset = encode_texts([text], None if pair is None else [pair], tokenizer, classifier.inputs.max_length)
    classifier.n_truncated += dataset.truncation.texts
    batch = dataset.batch(np.zeros(1, int)).to(classifier.device)
    with capture_attention_weights() as weights:
        logits = classifier.model(**batch.inputs).float().cpu()[0]
    rollout = compute_rollout([w[0].mean(0).double().cpu() for w in weights], batch.attention_mask.bool().cpu(), config)
    contributions = rollout.cls_contributions()
    blocks, n_runs = [], 0
    for block, pooled in zip(config.blocks, rollout.blocks, strict=True):
        n_runs += block.runs
        through = torch.zeros(len(pooled), dtype=torch.float64)  # the last layer computes only [CLS]
        through[: len(contributions[n_runs])] = contributions[n_runs]
        blocks.append([Position(row.nonzero()[:, 0].tolist(), float(c)) for row, c in zip(pooled, through, strict=True)])
    return Explanation(
        tokenizer.token_texts(batch.input_ids[0].tolist()), contributions[0].tolist(), blocks, classifier.to_prediction(logits)
    )


def compute_rollout(attention: Sequence[Tensor], mask: Tensor, config: FunnelConfig) -> AttentionRollout:
    """Combines attention weights, residual connections and pooling.

    Args:
        attention: weights of every layer run, averaged over heads, [q, k], float64.
        mask: [1, l], True for tokens, False for padding.
    """
    attention_of_runs = iter(attention)
    tokens = torch.eye(mask.shape[1], dtype=torch.float64)
    layers, blocks = [], []
    for number, block in enumerate(config.blocks):
        pool = torch.eye(mask.shape[1], dtype=torch.float64)
        if number > 0:
            pool = pooling.pool_hidden(pool.unsqueeze(0), mask, config)[0]
            pool /= pool.sum(1, keepdim=True).clamp(min=1e-12)  # max pooling gives both positions of a pair weight 1
            mask = pooling.pool_mask(mask, config)
            tokens = pool @ tokens
        blocks.append(tokens)
        for run in range(block.runs):
            weights = next(attention_of_runs)
            if run == 0 and number > 0 and config.pool_q_only:  # queries are pooled, keys are not
                layers.append((weights + pool[: len(weights)]) / 2)
                continue
            layer = (weights + torch.eye(weights.shape[1], dtype=torch.float64)[: len(weights)]) / 2
            layers.append(layer @ pool if run == 0 else layer)
    return AttentionRollout(layers, blocks)

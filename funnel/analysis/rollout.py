"""What each block keeps of a text, and how much of it reaches [cls]: attention rollout through the pooled blocks.

Rollout (Abnar and Zuidema 2020, arXiv 2005.00928) takes a layer for a matrix that mixes positions: half of it is
attention, averaged over heads, the other half the residual. Here the residual of a layer that pools is the pooling
itself. A product of such matrices says how much of each position before comes to be in each one after. It follows
where attention looks, not what the values do: a hint, no proof.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from funnel.data.dataset import Dataset
from funnel.inference import Classifier, Prediction
from funnel.model import attention_backends, pooling
from funnel.model.config import FunnelConfig


class Position(NamedTuple):
    """A position of a block's output.

    Attributes:
        tokens: numbers of the tokens that it was pooled from.
        share: of the final [cls] that comes through it; those of a block sum to 1.
    """

    tokens: list[int]
    share: float


class Explanation(NamedTuple):
    """What `explain` finds.

    Attributes:
        tokens: the text as the model sees it, special tokens included.
        shares: of every token in the final [cls], sum 1.
        blocks: the positions of every block's output.
        prediction: what the classifier says.
    """

    tokens: list[str]
    shares: list[float]
    blocks: list[list[Position]]
    prediction: Prediction


@torch.no_grad()
def explain(classifier: Classifier, text: str, pair: str | None = None) -> Explanation:
    """Follows one text (or pair) through the blocks of a classifier.

    Raises:
        FunnelError: the text cannot be encoded.
    """
    config = classifier.model.config
    data = Dataset.of([text], None if pair is None else [pair], classifier.tokenizer, classifier.max_length)
    classifier.cut += data.cut.texts
    ids, mask, types, _ = data.batch(np.zeros(1, int)).to(classifier.device)
    with attention_backends.recorded() as weights:
        logits = classifier.model(ids, mask, types).float().cpu()[0]
    layers, pooled = mixing([w[0].mean(0).double().cpu() for w in weights], mask.bool().cpu(), config)
    runs = [size * repeat for size, repeat in zip(config.block_sizes, config.repeats, strict=True)]
    ends = [sum(runs[: number + 1]) for number in range(len(runs))]
    share = torch.ones(1, dtype=torch.float64)  # of the last layer's only position, [cls]
    shares: dict[int, Tensor] = {}
    for number in range(len(layers), 0, -1):
        shares[number] = share
        share = share @ layers[number - 1]
    blocks = []
    for end, stands_for in zip(ends, pooled, strict=True):
        found = torch.zeros(len(stands_for), dtype=torch.float64)
        found[: len(shares[end])] = shares[end]
        blocks.append([Position(row.nonzero()[:, 0].tolist(), float(s)) for row, s in zip(stands_for, found, strict=True)])
    names = [str(classifier.tokenizer.tokenizer.id_to_token(token)) for token in ids[0].tolist()]
    return Explanation(names, share.tolist(), blocks, classifier.prediction(logits))


def mixing(weights: list[Tensor], mask: Tensor, config: FunnelConfig) -> tuple[list[Tensor], list[Tensor]]:
    """What every layer does to positions, and what every block's positions stand for.

    Args:
        weights: attention of every layer run, the mean over heads, [q, k], float64.
        mask: [1, l], true where a token is real.

    Returns:
        A matrix for every layer run, [positions after, positions before], whose rows sum to 1; and one for every block,
        [its positions, tokens].
    """
    rows = iter(weights)
    stands_for = torch.eye(mask.shape[1], dtype=torch.float64)
    layers, pooled = [], []
    for block, (size, repeat) in enumerate(zip(config.block_sizes, config.repeats, strict=True)):
        pool = torch.eye(mask.shape[1], dtype=torch.float64)
        if block > 0:
            pool = pooling.pool_hidden(pool.unsqueeze(0), mask, config)[0]
            pool /= pool.sum(1, keepdim=True).clamp(min=1e-12)  # a maximum has a whole share of both
            mask = pooling.pool_mask(mask, config)
            stands_for = pool @ stands_for
        pooled.append(stands_for)
        for run in range(size * repeat):
            attention = next(rows)
            if run == 0 and block > 0 and config.pool_q_only:
                layers.append((attention + pool[: len(attention)]) / 2)  # keys are the former block's positions
            else:
                layer = (attention + torch.eye(attention.shape[1], dtype=torch.float64)[: len(attention)]) / 2
                layers.append(layer @ pool if run == 0 else layer)
    return layers, pooled


def describe(explanation: Explanation, width: int = 40) -> str:
    """An explanation as text: a line a position, with a bar of its share."""
    lines = []
    if explanation.prediction.probability is None:
        lines.append(f"{explanation.prediction.label:.4g}")
    else:
        lines.append(f"{explanation.prediction.label} ({explanation.prediction.probability:.1%})")
    first = [Position([number], share) for number, share in enumerate(explanation.shares)]
    for name, positions in [("tokens", first), *((f"block {n}", found) for n, found in enumerate(explanation.blocks))]:
        lines.append(f"\n{name}: {len(positions)} position{'s' * (len(positions) > 1)}")
        largest = max(position.share for position in positions)
        for position in positions:
            words = " ".join(explanation.tokens[number] for number in position.tokens) or "(dropped)"
            bar = "#" * round(width * position.share / largest)
            lines.append(f"  {position.share:6.1%} {bar:<{width}} {words}")
    return "\n".join(lines)

"""Masked language modeling (BERT, arXiv 1810.04805)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from funnel.model.heads import FunnelForMaskedLM
from funnel.pretraining.objective import Objective


class MaskedLanguageModel(Objective):
    """Predicts the masked tokens of texts; the loss is their mean cross-entropy, in nats."""

    names = ("loss", "accuracy")
    model: FunnelForMaskedLM

    def __init__(self, model: FunnelForMaskedLM) -> None:
        super().__init__(model)

    def forward(
        self,
        masked_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        positions: Tensor,
        position_weights: Tensor,
        labels: Tensor,
        **_unused: Tensor,
    ) -> Tensor:
        hidden = self.model.encode_and_decode(masked_ids, attention_mask, token_type_ids)[-1]
        logits = self.model.token_logits(self.gather(hidden, positions)).float()  # [b, m, vocab_size]
        return torch.stack(masked_lm_loss(logits, labels, position_weights))


def masked_lm_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted cross-entropy of masked tokens, and the weighted share of correct predictions.

    Args:
        logits: [b, m, vocab_size], float32.
        labels, weights: [b, m].
    """
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(weights)
    is_correct = logits.detach().argmax(-1) == labels
    return (losses * weights).sum(), (is_correct * weights).sum()

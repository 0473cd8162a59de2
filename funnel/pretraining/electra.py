"""ELECTRA (arXiv 2003.10555): a small generator replaces tokens, and the model, the discriminator, detects which ones.

How the published implementations work, github.com/google-research/electra and tensorflow/pretrain.py in
github.com/laiguokun/Funnel-Transformer: both share the whole embedding layer up to the projection, compute the generator's
logits at masked positions only, sample with Gumbel noise from all tokens, special ones included, count a correct sample as
original, and weight the discriminator's loss by 50, over all real tokens including [CLS] and [SEP]. The Funnel authors'
discriminator predicts 1 for original tokens; ELECTRA's, transformers' and this one predict 1 for replaced ones.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from funnel.errors import FunnelError, format_list
from funnel.model.checkpoint import TOKENIZER, Checkpoint, load_checkpoint, load_weights, save_checkpoint
from funnel.model.config import FunnelConfig
from funnel.model.heads import FunnelForMaskedLM, FunnelForPreTraining
from funnel.pretraining.mlm import masked_lm_loss
from funnel.pretraining.objective import Objective

GENERATOR = "generator"  # its folder in a checkpoint folder
WIDTH_RATIO = 4  # the discriminator's width divided by the generator's
DISCRIMINATOR_WEIGHT = 50.0  # of its loss relative to the generator's (paper, appendix A)


class Electra(Objective):
    """Trains the model to detect tokens that a generator has replaced, and the generator as a masked language model.

    The loss is the generator's plus 50 times the discriminator's. The generator shares the discriminator's embeddings, which
    get gradients from both; no gradient flows through sampling.

    Args:
        model: the discriminator.
    """

    names = (
        "loss",
        "generator_loss",
        "discriminator_loss",
        "generator_accuracy",
        "discriminator_accuracy",
    )
    model: FunnelForPreTraining

    def __init__(self, model: FunnelForPreTraining) -> None:
        super().__init__(model)
        self.generator = FunnelForMaskedLM(generator_config(model.config))
        for name, module in model.embeddings.named_children():
            if name not in ("projection", "dropout"):
                setattr(self.generator.embeddings, name, module)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        token_weights: Tensor,
        masked_ids: Tensor,
        positions: Tensor,
        position_weights: Tensor,
        uniforms: Tensor,
        labels: Tensor,
    ) -> Tensor:
        hidden = self.generator.encode_and_decode(masked_ids, attention_mask, token_type_ids)[-1]
        logits = self.generator.token_logits(self.gather(hidden, positions)).float()  # [b, m, vocab_size]
        generator_loss, generator_accuracy = masked_lm_loss(logits, labels, position_weights)

        replaced_ids = replace(input_ids, positions, sample(logits, uniforms), position_weights > 0)
        is_replaced = replaced_ids != input_ids  # false where the generator sampled the original token
        logits = self.model(replaced_ids, attention_mask, token_type_ids).float()  # [b, l]
        losses = F.binary_cross_entropy_with_logits(logits, is_replaced.float(), reduction="none")
        discriminator_loss = (losses * token_weights).sum()
        discriminator_accuracy = (((logits > 0) == is_replaced) * token_weights).sum()
        loss = generator_loss + DISCRIMINATOR_WEIGHT * discriminator_loss
        metrics = (generator_loss, discriminator_loss, generator_accuracy, discriminator_accuracy)
        return torch.stack([loss, *(value.detach() for value in metrics)])

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes the generator, including the shared embeddings, into `folder`/generator, with the tokenizer of the folder."""

        def copy_tokenizer(temporary: Path) -> None:
            if (folder / TOKENIZER).exists():
                shutil.copy(folder / TOKENIZER, temporary)

        own = self.own_weights(weights, "generator")
        save_checkpoint(folder / GENERATOR, Checkpoint(self.generator.config, own, "FunnelForMaskedLM"), copy_tokenizer)

    def load(self, folder: Path) -> None:
        """Reads what `save` has written.

        Raises:
            FunnelError: a file is missing or damaged, or the generator has another layout or other sizes.
        """
        path = folder / GENERATOR
        saved, blocks = load_checkpoint(path), self.generator.config.layout
        if saved.config.layout != blocks:
            raise FunnelError(
                f"{path}: the generator has blocks {saved.config.layout}, the discriminator {blocks}; use the same "
                "blocks, or move the folder away to start with a new generator"
            )
        if new := load_weights(self.generator, saved.weights, str(path)):
            raise FunnelError(f"{path}: weights and config do not match: missing or of another shape: {format_list(new, 3)}")


def generator_config(config: FunnelConfig) -> FunnelConfig:
    """The config of a discriminator's generator: the same blocks, a quarter of the width and of the heads.

    Its embeddings have the discriminator's width, and are projected if that is not the generator's. Heads keep their size.
    (Both published implementations use a quarter of the width; ELECTRA-base uses a third.)
    """
    width = config.embedding_size or config.d_model
    d_model = max(2, config.d_model // (2 * WIDTH_RATIO) * 2)  # even
    return config.replace(
        d_model=d_model,
        d_inner=max(1, config.d_inner // WIDTH_RATIO),
        n_head=max(1, config.n_head // WIDTH_RATIO),
        embedding_size=None if width == d_model else width,
        lm_head_transform=True,
    )


@torch.no_grad()
def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draws a token from each softmax by inverting its cumulative distribution, in float32. [b, m, vocab_size] -> [b, m].

    The distribution is that of ELECTRA's Gumbel noise. It needs one random number per position instead of one per vocabulary
    entry, so that the numbers can come with the batch and do not depend on the device or on how the batch is split.

    Args:
        uniforms: [b, m], in [0, 1).
    """
    cumulative = logits.float().softmax(-1).cumsum(-1)
    total = cumulative[..., -1:]  # 1 up to rounding; a number above it gives the last token whose probability is not 0
    thresholds = torch.minimum(uniforms.unsqueeze(-1), torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1)  # the first entry above the threshold


def replace(input_ids: Tensor, positions: Tensor, tokens: Tensor, is_used: Tensor) -> Tensor:
    """Replaces tokens of texts. [b, l] -> [b, l].

    Args:
        positions, tokens: [b, m], where, and the new tokens.
        is_used: [b, m]; where false, the token at that position is kept, since unused slots point at [CLS].
    """
    return input_ids.scatter(1, positions, torch.where(is_used, tokens, input_ids.gather(1, positions)))

"""The interface of pretraining objectives."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from funnel.data.batches import Batch
from funnel.model.heads import FunnelPreTrainedModel


class Objective(nn.Module):
    """A pretraining objective: the model that is trained, and whatever else its loss needs.

    Called with the inputs and labels of a batch from `funnel.pretraining.batches`, as in
    `objective(**batch.inputs, labels=batch.labels)`:

        input_ids, attention_mask, token_type_ids: [b, l], as for a model; the unmasked texts.
        token_weights: [b, l], float32: number of ranks / number of real tokens of the global batch, at all real tokens,
            including [CLS] and [SEP]; 0 at padding. A weighted sum over tokens, added over micro-batches and averaged over
            ranks, is therefore the mean over the global batch.
        masked_ids: [b, l], the texts with masks; this and the following only for objectives with masks.
        positions: [b, m], where the m masked tokens of each row are; rows with fewer are padded with 0.
        position_weights: [b, m], like `token_weights`, for the masked tokens of the global batch; 0 at padding.
        uniforms: [b, m], float32 in [0, 1), random numbers for sampling.
        labels: [b, m], the original tokens at `positions`; without masks, [b, 0].

    Returns:
        A float32 tensor [k] with one weighted sum per entry of `names`, the loss first.
    """

    names: tuple[str, ...]

    def __init__(self, model: FunnelPreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def settings(self) -> dict[str, Any]:
        """Settings of a run that a resumed run must share."""
        return {}

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """As `FunnelPreTrainedModel.set_gradient_checkpointing`, for all models that are trained."""
        for module in self.modules():
            if isinstance(module, FunnelPreTrainedModel):
                module.set_gradient_checkpointing(enabled)

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes the weights other than the model's into a checkpoint folder.

        Args:
            weights: the objective's state dict, in full if its parameters are sharded.
        """

    def load(self, folder: Path) -> None:
        """Reads what `save` has written.

        Raises:
            FunnelError: a file is missing or damaged.
        """

    def gather(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """The states at some positions. [b, l, d], [b, m] -> [b, m, d]."""
        return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))

    def own_weights(self, weights: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
        """Selects a submodule's weights from the state dict passed to `save`, and strips the prefix."""
        return {name.removeprefix(f"{module}."): tensor for name, tensor in weights.items() if name.startswith(f"{module}.")}


def objective_loss(module: nn.Module, batch: Batch) -> Tensor:
    """The values of an objective, possibly wrapped for distributed training, on a batch. [k]"""
    values: Tensor = module(**batch.inputs, labels=batch.labels)
    return values

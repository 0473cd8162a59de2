"""Freezing the embeddings and the first layers of a model, so that only the rest is trained.

The backward pass stops above the frozen part: no gradients are computed there and no activations saved, and the optimizer has
no state for it. Dropout stays active in frozen layers, as if they were trained.
"""

from dataclasses import dataclass

from torch import nn

from funnel.errors import FunnelError, plural
from funnel.model.encoder import FunnelLayer
from funnel.model.heads import FunnelPreTrainedModel
from funnel.options import option


@dataclass(frozen=True)
class FreezeArgs:
    """Options for training a part of the model."""

    freeze_embeddings: bool = option(False, "do not train the embeddings")
    freeze_layers: int | None = option(
        None, "do not train the embeddings and the first N layers, counted as in the layout", metavar="N", bounds="[1, inf)"
    )


def freeze(model: FunnelPreTrainedModel, args: FreezeArgs) -> None:
    """Freezes the embeddings and the first layers as chosen; call it before the optimizer is built and the model is wrapped.

    A bias per distance (MPNet) is used by all layers, so it counts as an embedding. Layers below which something is trained
    could not be skipped in the backward pass; so freezing layers always freezes the embeddings, too.

    Raises:
        FunnelError: the model has fewer layers, or the last frozen one shares its weights with the next one.
    """
    count = args.freeze_layers or 0
    if not count and not args.freeze_embeddings:
        return
    runs = layer_runs(model)
    layout = f"the layout {model.config.layout} has {plural(len(runs), 'layer')}"
    if count > len(runs):
        raise FunnelError(f"freeze_layers {count}: {layout}", "freeze_layers")
    if 0 < count < len(runs) and runs[count - 1] is runs[count]:
        start = runs.index(runs[count])
        end = start + runs.count(runs[count])
        choices = f"{start} or {end}" if start else str(end)
        shared = f"layers {start + 1} to {end} of {model.config.layout} share their weights"
        raise FunnelError(f"freeze_layers {count}: {shared}; choose {choices}", "freeze_layers")
    frozen: list[nn.Module] = [model.embeddings, *runs[:count]]
    if model.encoder.distance_bias is not None:
        frozen.append(model.encoder.distance_bias)
    for module in frozen:
        module.requires_grad_(False)


def layer_runs(model: FunnelPreTrainedModel) -> list[FunnelLayer]:
    """The encoder's layers in order of execution; one that runs several times in a row occurs as often."""
    blocks = enumerate(model.config.blocks)
    return [layer for index, block in blocks for layer in model.encoder.layers(index) for _ in range(block.repeats)]


def describe_frozen(model: nn.Module, freeze_layers: int | None) -> str:
    """ "training 1,234 of 5,678 parameters; frozen: embeddings, 2 layers"; "" if all are trained.

    Args:
        freeze_layers: the number of frozen layers.
    """
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    if not sizes[False]:
        return ""
    layers = f", {plural(freeze_layers, 'layer')}" if freeze_layers else ""
    return f"training {sizes[True]:,} of {sum(sizes.values()):,} parameters; frozen: embeddings{layers}"

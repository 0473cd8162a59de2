"""Changing the layout of pretrained weights: plans where each new layer comes from, and applies the plan. Changing the
labels of a classifier: matches its outputs by name.

Copies of existing layers make a deep network collapse; new layers that start as the identity do not (compare Net2Net, arXiv
1511.05641). An identity layer's two output projections (`post_proj` and the feed-forward's second linear) are zero, so
that only its LayerNorms act. A LayerNorm with the constant weight s and the constant bias m is the identity for a state
whose features have mean m and standard deviation s. Therefore both norms get the mean and deviation that [CLS] has on real
texts (`calibrate_layer_norms`). The first norm in a sequence of new layers removes the differences between texts in mean
and deviation; the following ones change nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funnel.errors import FunnelError, format_list, plural
from funnel.io import read_json, write_json
from funnel.model.config import BlockSpec, FunnelConfig
from funnel.model.heads import MODELS, FunnelForSequenceClassification, FunnelForTokenClassification, FunnelPreTrainedModel
from funnel.weights.load import Source

INITS = ("identity", "copy", "random")  # initialization of new layers
KEEPS = ("spread", "first", "last")  # which layers are kept when a block shrinks
STARTS = ("keep", *INITS)
NORMS = ("attention.layer_norm", "ffn.layer_norm")
OUTPUT_PROJECTIONS = ("attention.post_proj", "ffn.linear_2")
# Config fields that must be the same in both layouts.
SHARED = ("d_model", "n_head", "d_head", "d_inner", "embedding_size", "relative_attention", "distance_buckets",
          "position_embeddings", "position_offset", "token_type_embeddings")  # fmt: skip
OUTPUT_LAYERS = ("classifier.linear_out", "classifier")  # of sequence and token classifiers: one row per label
LABELED = (FunnelForSequenceClassification, FunnelForTokenClassification)
MAX_LISTED_LABELS = 6
NEW_DECODER_LAYERS = 2  # as in the released models


class LayerPlan(NamedTuple):
    """The origin of one layer of the new layout.

    Attributes:
        block, layer: position in the new layout.
        start: "keep" (an old layer that keeps its function), "copy", "identity" or "random".
        source: (block, layer) of the old layer whose weights are used; None for "random".
    """

    block: int
    layer: int
    start: str
    source: tuple[int, int] | None

    def __str__(self) -> str:
        source = "" if self.source is None else f" from {self.source[0]}.{self.source[1]}"
        return f"{self.block}.{self.layer}: {self.start}{source}"


# --- making a plan ----------------------------------------------------------------------------------------------------


def make_plan(old: FunnelConfig, new: FunnelConfig, init: str = "identity", keep: str = "spread") -> list[LayerPlan]:
    """Plans the origin of every layer of a new layout.

    Layers are matched in order of execution: an old block 3x2 provides 6 layers, 0,0,1,1,2,2, and an old block of 6 layers
    provides layers 0,2,4 for a new block 3x2.

    If the new layout only grows, or only shrinks, blocks keep their own layers. A smaller block keeps those that `keep`
    selects; surplus blocks are dropped. An additional layer of an existing block uses the weights of the block's last
    layer; layer j of an additional block uses those of layer j of the last old block.

    If some blocks grow and others shrink (2,2,2 to 3,3), no old layer is dropped while there is room for it: the old layers
    fill the new layout from the start, in their order; if there are too many, `keep` selects. The remaining layers use the
    weights of the last old block with layers. With init "copy", blocks keep their own layers in this case too, unless the old
    layout has only one block.

    Args:
        init: how additional layers are initialized, one of `INITS`.
        keep: which layers are kept if there are too many: evenly spaced ones ("spread"), the "first", or the "last".

    Raises:
        FunnelError: `init` or `keep` is unknown, or the configs differ in width.
    """
    for name, value, choices in (("init", init, INITS), ("keep", keep, KEEPS)):
        if value not in choices:
            raise FunnelError(f"unknown {name} {value!r}; choose from {', '.join(choices)}", name)
    check_same_widths(old, new)
    old_runs = [
        [(block, layer) for layer in range(spec.layers) for _ in range(spec.repeats)] for block, spec in enumerate(old.blocks)
    ]
    if (init != "copy" or len(old.blocks) == 1) and _grows_and_shrinks(old, new):
        old_runs = _redistribute(old_runs, new, keep)
    last_block = [runs for runs in old_runs if runs][-1]
    plan = []
    for block, spec in enumerate(new.blocks):
        kept = _select(old_runs[block], spec.runs, keep) if block < len(old_runs) else []
        sources = kept or last_block
        for layer in range(spec.layers):
            first_run = layer * spec.repeats
            start = "keep" if first_run < len(kept) else init
            source = sources[min(first_run, len(sources) - 1)]
            plan.append(LayerPlan(block, layer, start, None if start == "random" else source))
    return plan


def recommended_blocks(config: FunnelConfig) -> tuple[BlockSpec, ...]:
    """Recommends a layout for a model without pooling: the last third of the layers at half the length (docs/layouts.md).

    Returns the layout of the config if it pools already, or if it has too few layers.
    """
    layers, repeats = config.blocks[0]
    if layers == 1 and len(config.blocks) == 1 and repeats >= 3:  # ALBERT, whose layers share weights
        return BlockSpec(1, repeats - repeats // 3), BlockSpec(1, repeats // 3)
    if len(config.blocks) > 1 or layers < 3:
        return config.blocks
    return BlockSpec(layers - layers // 3, repeats), BlockSpec(layers // 3, repeats)


def check_same_widths(old: FunnelConfig, new: FunnelConfig) -> None:
    """Raises FunnelError if the configs differ in more than the layout, so that weights cannot be transferred."""
    for name in SHARED:
        if getattr(old, name) != getattr(new, name):
            raise FunnelError(
                f"a new layout cannot change {name}: it is {getattr(old, name)} in the weights and {getattr(new, name)} in "
                "the new config"
            )


def _grows_and_shrinks(old: FunnelConfig, new: FunnelConfig) -> bool:
    """Whether some blocks get more layers and others fewer; an added or a dropped block counts too."""
    old_counts, new_counts = ([spec.runs for spec in config.blocks] for config in (old, new))
    pairs = list(zip(old_counts, new_counts, strict=False))
    grows = len(new_counts) > len(old_counts) or any(new_count > old_count for old_count, new_count in pairs)
    shrinks = len(new_counts) < len(old_counts) or any(new_count < old_count for old_count, new_count in pairs)
    return grows and shrinks


def _redistribute(old_runs: list[list[tuple[int, int]]], new: FunnelConfig, keep: str) -> list[list[tuple[int, int]]]:
    """Fills the new blocks from the start with all old layers in their order."""
    remaining = _select([layer for runs in old_runs for layer in runs], sum(spec.runs for spec in new.blocks), keep)
    filled = []
    for spec in new.blocks:
        filled.append(remaining[: spec.runs])
        remaining = remaining[spec.runs :]
    return filled


def _select(layers: list[tuple[int, int]], count: int, keep: str) -> list[tuple[int, int]]:
    """At most `count` of the layers."""
    if len(layers) <= count:
        return layers
    if keep == "spread":
        return [layers[i * len(layers) // count] for i in range(count)]
    return layers[:count] if keep == "first" else layers[-count:]


# --- plan files -------------------------------------------------------------------------------------------------------


def write_plan(path: Path, plan: list[LayerPlan]) -> None:
    """Writes a plan as JSON for people to read and edit: one row per layer, positions as "block.layer"."""
    rows = []
    for row in plan:
        source = {} if row.source is None else {"source": f"{row.source[0]}.{row.source[1]}"}
        rows.append({"layer": f"{row.block}.{row.layer}", "start": row.start, **source})
    write_json(path, {"layers": rows})


def read_plan(path: Path, old: FunnelConfig, new: FunnelConfig) -> list[LayerPlan]:
    """Reads a plan written by `write_plan`, possibly edited.

    Raises:
        FunnelError: the file is not a plan, does not contain every layer of the new layout exactly once, or names a layer
            that the old layout does not have; or the configs differ in width.
    """
    check_same_widths(old, new)
    try:
        rows = read_json(path).get("layers")
    except FunnelError as error:
        raise FunnelError(f"layout_plan: {error}", "layout_plan") from None
    if not isinstance(rows, list):
        expected = '{"layers": [{"layer": "0.0", "start": …, "source": …}, …]}'
        raise FunnelError(f"layout_plan {path}: not a layout plan; expected {expected}", "layout_plan")
    plan: dict[tuple[int, int], LayerPlan] = {}
    for number, values in enumerate(rows, 1):
        row = _parse_row(f"{path}, row {number}", values, old, new)
        if (row.block, row.layer) in plan:
            raise FunnelError(f"{path}, row {number}: layer {row.block}.{row.layer} already has a row")
        plan[row.block, row.layer] = row
    positions = [(block, layer) for block, spec in enumerate(new.blocks) for layer in range(spec.layers)]
    for block, layer in positions:
        if (block, layer) not in plan:
            raise FunnelError(f"{path}: no row for layer {block}.{layer} of the layout {new.layout}")
    return [plan[position] for position in positions]


def _parse_row(where: str, row: Any, old: FunnelConfig, new: FunnelConfig) -> LayerPlan:
    if not isinstance(row, dict) or not row.keys() <= {"layer", "start", "source"}:
        raise FunnelError(f"{where}: expected an object with layer, start and source, found {str(row)[:60]}")
    block, layer = _parse_position(f"{where}: layer", row.get("layer"), new)
    start = row.get("start")
    if start not in STARTS:
        raise FunnelError(f"{where}: unknown start {start!r}; choose from {', '.join(STARTS)}")
    if start == "random":
        if "source" in row:
            raise FunnelError(f"{where}: a layer with start 'random' has no source; remove it")
        return LayerPlan(block, layer, start, None)
    if "source" not in row:
        raise FunnelError(f"{where}: a layer with start {start!r} needs a source")
    return LayerPlan(block, layer, start, _parse_position(f"{where}: source", row["source"], old))


def _parse_position(where: str, value: Any, config: FunnelConfig) -> tuple[int, int]:
    parts = value.split(".") if isinstance(value, str) else []
    if len(parts) != 2 or not all(part.isdecimal() and part.isascii() and len(part) < 4 for part in parts):
        raise FunnelError(f'{where} {value!r} is invalid: expected "block.layer", such as "2.0"')
    block, layer = map(int, parts)
    if block >= len(config.blocks) or layer >= config.blocks[block].layers:
        hint = " (repeats of a layer share one row)" if any(spec.repeats > 1 for spec in config.blocks) else ""
        raise FunnelError(f"{where} {value} is not in the layout {config.layout}{hint}")
    return block, layer


# --- applying a plan --------------------------------------------------------------------------------------------------


def apply_plan(weights: Mapping[str, Tensor], plan: list[LayerPlan], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Builds the weights of the new layout.

    Args:
        weights: state dict of the old layout; weights outside the encoder's blocks are copied.
        plan: from `make_plan` or `read_plan`.
        fresh: state dict of a newly initialized model in the new layout; random layers use its weights.

    Returns:
        State dict of the new layout; all tensors are copies. LayerNorms of identity layers have the mean and deviation
        that states would have if all features had the same variance before the preceding LayerNorm;
        `calibrate_layer_norms` replaces them by measured ones.
    """
    result = {name: tensor.clone() for name, tensor in weights.items() if not name.startswith("encoder.blocks.")}
    preceding_norm = "embeddings.layer_norm"
    for row in plan:
        prefix = f"encoder.blocks.{row.block}.{row.layer}."
        if row.source is None:
            layer = _copy_layer(fresh, prefix)
        else:
            layer = _copy_layer(weights, f"encoder.blocks.{row.source[0]}.{row.source[1]}.")
        if row.start == "identity":
            _make_identity(layer, result[f"{preceding_norm}.weight"], result[f"{preceding_norm}.bias"])
        result |= {prefix + name: tensor for name, tensor in layer.items()}
        preceding_norm = prefix + "ffn.layer_norm"
    return result


def _copy_layer(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Copies of one layer's weights by their names within the layer."""
    return {name.removeprefix(prefix): tensor.clone() for name, tensor in weights.items() if name.startswith(prefix)}


def _make_identity(layer: dict[str, Tensor], norm_weight: Tensor, norm_bias: Tensor) -> None:
    """Turns a layer into the identity for the average output of the preceding LayerNorm."""
    for name in OUTPUT_PROJECTIONS:
        layer[f"{name}.weight"].zero_()
        layer[f"{name}.bias"].zero_()
    mean = norm_bias.mean()
    deviation = (norm_weight.square() + norm_bias.square()).mean().sub(mean.square()).sqrt()
    for name in NORMS:
        layer[f"{name}.weight"].fill_(float(deviation))
        layer[f"{name}.bias"].fill_(float(mean))


@torch.no_grad()
def calibrate_layer_norms(model: FunnelPreTrainedModel, plan: list[LayerPlan], *inputs: Tensor | None) -> None:
    """Sets the LayerNorms of identity layers to the mean and standard deviation of their input's [CLS] features.

    Args:
        model: has the weights that `apply_plan` returned for the plan; changed in place.
        inputs: the model's inputs for a few texts: input_ids and optionally attention_mask and token_type_ids, [b, l] each.
            Mean and deviation are averaged over the texts.
    """
    layers = [f"encoder.blocks.{row.block}.{row.layer}" for row in plan if row.start == "identity"]
    if not layers:
        return
    norms = [model.get_submodule(f"{layer}.{norm}") for layer in layers for norm in NORMS]
    hooks = [norm.register_forward_pre_hook(_calibrate_norm) for norm in norms]
    was_training = model.training
    model.eval()
    try:
        model.encode(*inputs)  # type: ignore[arg-type]
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


def _calibrate_norm(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    """Forward pre-hook, so that every norm sees the output of the already calibrated ones."""
    cls_state = inputs[0][:, 0]  # [b, d]
    norm.get_parameter("weight").fill_(float(cls_state.std(1, correction=0).mean()))
    norm.get_parameter("bias").fill_(float(cls_state.mean()))


def decoder_layers(config: FunnelConfig, requested: int | None) -> int:
    """The number of decoder layers of a model that needs a decoder.

    Args:
        config: of the weights, in the new layout.
        requested: None for that of the weights, or, if they have none and there is something to upsample, `NEW_DECODER_LAYERS`.
    """
    if requested is not None:
        return requested
    is_new = config.num_decoder_layers == 0 and len(config.blocks) > 1
    return NEW_DECODER_LAYERS if is_new else config.num_decoder_layers


def add_decoder(source: Source, weights: Mapping[str, Tensor], model: FunnelPreTrainedModel) -> tuple[dict[str, Tensor], bool]:
    """Adds a decoder that starts as the identity, unless the source has one with the model's number of layers.

    Args:
        weights: of the source, in the model's layout.

    Returns:
        The weights, and whether the decoder is new.
    """
    layers = model.config.num_decoder_layers if model.has_decoder else 0
    has_decoder = layers == source.config.num_decoder_layers and any(name.startswith("decoder.") for name in weights)
    if not layers or has_decoder:
        return dict(weights), False
    make_decoder_identity(model)
    others = {name: tensor for name, tensor in weights.items() if not name.startswith("decoder.")}
    return others | {n: tensor for n, tensor in model.state_dict().items() if n.startswith("decoder.")}, True


def make_decoder_identity(model: FunnelPreTrainedModel) -> None:
    """Makes every layer of the decoder return the LayerNorm, without weights, of its input.

    A new decoder then returns the normalized sum of the upsampled last block and block 0.
    """
    for layer in model.decoder.layers:
        for name in OUTPUT_PROJECTIONS:
            nn.init.zeros_(layer.get_submodule(name).get_parameter("weight"))
            nn.init.zeros_(layer.get_submodule(name).get_parameter("bias"))
        for name in NORMS:
            nn.init.ones_(layer.get_submodule(name).get_parameter("weight"))
            nn.init.zeros_(layer.get_submodule(name).get_parameter("bias"))


# --- labels -----------------------------------------------------------------------------------------------------------


def relabel(config: FunnelConfig, id2label: Mapping[int, str], problem_type: str) -> FunnelConfig:
    """The config of a classifier with other labels.

    A regression that remains one keeps the units of its labels, since its output layer is kept. Clears the fields that
    describe the old task: `model_max_length`, `text_columns` and `decision_threshold`.
    """
    units = {} if config.problem_type == problem_type == "regression" else {"label_mean": 0.0, "label_std": 1.0}
    old_task = {"model_max_length": None, "text_columns": (), "decision_threshold": None}
    return config.replace(id2label=dict(id2label), problem_type=problem_type, **units, **old_task)


def match_labels(source: Source, model: FunnelPreTrainedModel) -> tuple[dict[str, Tensor], bool, str]:
    """Adapts the output layer of a source's classifier to the labels of a model.

    Outputs are copied for the labels that both have, whatever their order; all others keep the model's initialization. The
    single output of a regression is copied whatever its name. Nothing is copied between problem types or kinds of classifiers.

    Returns:
        The source's weights with the adapted output layer; whether an output keeps the model's initialization; and in words
        which outputs are new or dropped ("" if there are none, or the source has no classifier).
    """
    weights, state = dict(source.weights), model.state_dict()
    layer = next((name for name in OUTPUT_LAYERS if f"{name}.weight" in weights and f"{name}.weight" in state), None)
    is_same_class = isinstance(model, MODELS[source.architecture])
    if layer is None or (is_same_class and not isinstance(model, LABELED)):
        return weights, False, ""
    old, new = list(source.config.id2label.values()), list(model.config.id2label.values())
    problem_types = source.config.problem_type, model.config.problem_type
    rows: dict[int, int] = {}  # of the new output layer -> of the old one
    if is_same_class and problem_types == ("regression", "regression") and len(old) == len(new) == 1:
        rows = {0: 0}
    elif is_same_class and problem_types[0] == problem_types[1]:
        rows = {row: old.index(label) for row, label in enumerate(new) if label in old}
    for name in (f"{layer}.weight", f"{layer}.bias"):
        matched = state[name].clone()
        for row, old_row in rows.items():
            matched[row] = weights[name][old_row]
        weights[name] = matched
    if not rows:
        return weights, True, f"new classifier (the weights {_describe_classifier(source, is_same_class, problem_types)})"
    changes = {
        "new": [label for row, label in enumerate(new) if row not in rows],
        "dropped": [label for row, label in enumerate(old) if row not in rows.values()],
    }
    lists = [f"{change}: {format_list(labels, MAX_LISTED_LABELS)}" for change, labels in changes.items() if labels]
    description = f"classifier: {len(rows)} of {plural(len(new), 'label')} kept; {'; '.join(lists)}" if lists else ""
    return weights, bool(changes["new"]), description


def _describe_classifier(source: Source, is_same_class: bool, problem_types: tuple[str, str]) -> str:
    """What makes a source's classifier unusable."""
    if not is_same_class:
        return f"are those of a {source.architecture}"
    if problem_types[0] != problem_types[1]:
        return f"are for {problem_types[0].replace('_label', '-label').replace('_', ' ')}"
    return f"have the labels {format_list(source.config.id2label.values(), MAX_LISTED_LABELS)}"

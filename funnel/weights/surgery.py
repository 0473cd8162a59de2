"""Another layout from the same weights: a plan that says where each new layer comes from, and its execution.

Adding layers by copying others makes a deep network collapse; a new layer that starts as the identity does not (after
Net2Net, arXiv 1511.05641, which deepens a network without changing its function). Such a layer's two output projections
(`post_proj`, the feed-forward's second linear) start at zero, which leaves its LayerNorms. A LayerNorm whose weight is one
number s and whose bias is one number m hands on a state unchanged if the state's mean over its features is m and its
deviation s. So both norms get such numbers: those that [cls] has on real texts (`calibrate_layer_norms`). The first norm of a row of
new layers evens out how texts differ in mean and deviation; after it, every further one changes nothing at all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funnel.io import read_json, write_json
from funnel.model.config import INITS, KEEPS, FunnelConfig
from funnel.errors import FunnelError, error_reason
from funnel.model.heads import Funnel

STARTS = ("keep", *INITS)
NORMS = ("attention.layer_norm", "ffn.layer_norm")


class LayerPlan(NamedTuple):
    """Where one layer of the new layout comes from.

    Attributes:
        block, layer: its place.
        start: "keep" (an old layer at its own place in the order of runs), "copy", "identity" or "random".
        source: (block, layer) of the old layer whose weights it takes; None for "random".
    """

    block: int
    layer: int
    start: str
    source: tuple[int, int] | None

    def __str__(self) -> str:
        origin = "" if self.source is None else f" of {self.source[0]}.{self.source[1]}"
        return f"{self.block}.{self.layer} {self.start}{origin}"


def make_plan(old: FunnelConfig, new: FunnelConfig, init: str = "identity", keep: str = "spread") -> list[LayerPlan]:
    """Says for every layer of a new layout which old layer feeds it and how.

    Layers count as they run: 3x2 feeds 6 as 0,0,1,1,2,2, and 6 feeds 3x2 as 0,2,4.

    A layout that only adds, or only removes: old blocks keep their layers. In a smaller block those stay that `keep` says,
    missing blocks are dropped. A layer that the old block does not have starts as `init` says, with the weights of the
    block's last layer, and layer j of a new block with those of layer j of the last old block.

    A layout that adds here and removes there (2,2,2 to 3,3): no old layer is dropped beside a new one. All keep their order,
    but not their blocks, and fill the places from the first one on (if there are too many, those that `keep` says); the
    other places start as `init` says, with the weights of the last old layer.

    Copies are placed as the study did that began with them: old blocks keep their layers, whatever the new layout.

    Args:
        init: what new layers start as, one of `INITS`.
        keep: which layers stay where there are too many, one of `KEEPS`: "spread" evenly from the first one on, the
            "first", or the "last".

    Raises:
        FunnelError: `init` or `keep` is none of them.
    """
    for flag, value, allowed in (("--init", init, INITS), ("--keep", keep, KEEPS)):
        if value not in allowed:
            raise FunnelError(f"{flag} {value!r}: it takes one of {', '.join(allowed)}")
    runs = [
        [(block, run // repeats) for run in range(size * repeats)]
        for block, (size, repeats) in enumerate(zip(old.block_sizes, old.repeats, strict=True))
    ]  # of each old block: the layer of every run
    wanted = [size * repeats for size, repeats in zip(new.block_sizes, new.repeats, strict=True)]
    both = list(zip(wanted, runs, strict=False))
    adds = len(wanted) > len(runs) or any(n > len(block) for n, block in both)
    removes = len(wanted) < len(runs) or any(n < len(block) for n, block in both)
    if adds and removes and init != "copy":
        ordered = _kept([layer for block in runs for layer in block], sum(wanted), keep)
        ends = [sum(wanted[: block + 1]) for block in range(len(wanted))]
        runs = [ordered[end - n : end] for end, n in zip(ends, wanted, strict=True)]
    plan = []
    last = [block for block in runs if block][-1]
    for block, (size, repeats) in enumerate(zip(new.block_sizes, new.repeats, strict=True)):
        mine = _kept(runs[block], wanted[block], keep) if block < len(runs) else []
        for layer in range(size):
            run = layer * repeats
            is_kept = run < len(mine)
            source = mine[run] if is_kept else (mine or last)[min(run, len(mine or last) - 1)]
            start = "keep" if is_kept else init
            plan.append(LayerPlan(block, layer, start, None if start == "random" else source))
    return plan


def _kept(layers: list[tuple[int, int]], places: int, keep: str) -> list[tuple[int, int]]:
    """The layers that stay where there are fewer places than layers."""
    count = len(layers)
    if count <= places:
        return layers
    if keep == "spread":
        return [layers[i * count // places] for i in range(places)]
    return layers[:places] if keep == "first" else layers[-places:]


def write_plan(path: Path, plan: list[LayerPlan]) -> None:
    """Writes a plan as JSON, for people to read and edit: a row a layer, places as "block.layer".

    Raises:
        FunnelError: the file cannot be written.
    """
    rows = [
        {"layer": f"{row.block}.{row.layer}", "start": row.start}
        | ({"source": f"{row.source[0]}.{row.source[1]}"} if row.source is not None else {})
        for row in plan
    ]
    try:
        write_json(path, {"layers": rows})
    except OSError as error:
        raise FunnelError(f"{path}: cannot be written ({error_reason(error)})") from None


def read_plan(path: Path, old: FunnelConfig, new: FunnelConfig) -> list[LayerPlan]:
    """Reads a plan that `write_plan` wrote or a person edited.

    Raises:
        FunnelError: it is no plan, does not have every layer of the new layout once, or names a layer that the old one
            does not have.
    """
    rows = read_json(path).get("layers")
    if not isinstance(rows, list):
        raise FunnelError(f'{path}: no layout plan; it takes {{"layers": [{{"layer": "0.0", "start": …, "source": …}}, …]}}')
    plan = {}
    for number, row in enumerate(rows, 1):
        found = _read_row(f"{path}, row {number}", row, old, new)
        if (found.block, found.layer) in plan:
            raise FunnelError(f"{path}, row {number}: layer {found.block}.{found.layer} has a row already")
        plan[found.block, found.layer] = found
    places = [(block, layer) for block, size in enumerate(new.block_sizes) for layer in range(size)]
    if missing := [f"{block}.{layer}" for block, layer in places if (block, layer) not in plan]:
        raise FunnelError(f"{path}: no row for layer {missing[0]} of the layout {new.layout}")
    return [plan[place] for place in places]


def _read_row(where: str, row: Any, old: FunnelConfig, new: FunnelConfig) -> LayerPlan:
    if not isinstance(row, dict) or not row.keys() <= {"layer", "start", "source"}:
        raise FunnelError(f"{where}: it takes layer, start and source, not {str(row)[:60]}")
    block, layer = _read_place(where, "layer", row.get("layer"), new)
    start = row.get("start")
    if start not in STARTS:
        raise FunnelError(f"{where}: start {start!r} is none of {', '.join(STARTS)}")
    if (start == "random") != ("source" not in row):
        raise FunnelError(f"{where}: a layer that starts as {start!r} takes {'no' if start == 'random' else 'a'} source")
    return LayerPlan(block, layer, start, None if start == "random" else _read_place(where, "source", row["source"], old))


def _read_place(where: str, field: str, value: Any, config: FunnelConfig) -> tuple[int, int]:
    parts = value.split(".") if isinstance(value, str) else []
    if len(parts) != 2 or not all(p.isdecimal() and p.isascii() and len(p) < 4 for p in parts):
        raise FunnelError(f'{where}: {field} {value!r} is no place; it takes "block.layer", as in "2.0"')
    block, layer = map(int, parts)
    if block >= len(config.block_sizes) or layer >= config.block_sizes[block]:
        shared = " (layers that repeat share their weights, and a row)" if max(config.repeats) > 1 else ""
        raise FunnelError(f"{where}: {field} {value} is not in the layout {config.layout}{shared}")
    return block, layer


def apply_plan(weights: Mapping[str, Tensor], plan: list[LayerPlan], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns the weights of one layout into those of another.

    Args:
        weights: of the old layout, by our names; what is not an encoder block is passed on as it is.
        plan: from `make_plan`.
        fresh: freshly drawn weights of the new layout, for random layers.

    Raises:
        FunnelError: the source has another width than the new layout.

    Returns:
        Weights of the new layout. Nothing shares memory with `weights` or between layers. LayerNorms of identity layers
        have the mean and deviation that states would have if all features had the same variance before the LayerNorm
        that feeds them; `calibrate_layer_norms` puts measured ones there.
    """
    result = {name: tensor.clone() for name, tensor in weights.items() if not name.startswith("encoder.blocks.")}
    feeding = "embeddings.layer_norm"  # the LayerNorm whose output the next layer reads
    for row in plan:
        target = f"encoder.blocks.{row.block}.{row.layer}."
        if row.source is None:
            layer = _layer(fresh, target)
        else:
            layer = _layer(weights, f"encoder.blocks.{row.source[0]}.{row.source[1]}.")
        for name, tensor in layer.items():
            if tensor.shape != fresh[target + name].shape:
                here, there = list(fresh[target + name].shape), list(tensor.shape)
                raise FunnelError(f"layer {row}: {name} is {there} there and {here} here; the widths must be the same")
        if row.start == "identity":
            for name in ("attention.post_proj", "ffn.linear_2"):
                for part in ("weight", "bias"):
                    layer[f"{name}.{part}"] = torch.zeros_like(layer[f"{name}.{part}"])
            scale, shift = result[f"{feeding}.weight"], result[f"{feeding}.bias"]
            mean = shift.mean()
            deviation = (scale.square() + shift.square()).mean().sub(mean.square()).sqrt()
            for norm in NORMS:
                layer[f"{norm}.weight"] = torch.full_like(scale, float(deviation))
                layer[f"{norm}.bias"] = torch.full_like(shift, float(mean))
        result |= {target + name: tensor for name, tensor in layer.items()}
        feeding = target + "ffn.layer_norm"
    return result


@torch.no_grad()
def calibrate_layer_norms(
    model: Funnel,
    plan: list[LayerPlan],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
) -> None:
    """Gives the LayerNorms of identity layers the mean and deviation over features that [cls] has where they stand.

    Args:
        model: with the weights that `apply_plan` made; changed in place.
        plan: the same as there.
        input_ids, attention_mask, token_type_ids: [b, l], some texts; mean and deviation are averages over them.
    """

    def fit(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        state = inputs[0][:, 0]  # [b, d]
        norm.get_parameter("weight").fill_(float(state.std(1, correction=0).mean()))
        norm.get_parameter("bias").fill_(float(state.mean()))

    layers = [model.encoder.layers(row.block)[row.layer] for row in plan if row.start == "identity"]
    if not layers:
        return
    hooks = [layer.get_submodule(norm).register_forward_pre_hook(fit) for layer in layers for norm in NORMS]
    was_training = model.training
    model.eval()
    try:
        model.encode(input_ids, attention_mask, token_type_ids)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


def _layer(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Copies of one layer's weights, by their names within the layer."""
    return {name.removeprefix(prefix): tensor.clone() for name, tensor in weights.items() if name.startswith(prefix)}

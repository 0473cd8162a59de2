"""What a layout module_costs before anyone pays for it, as text and as a picture: `python -m funnel layout`."""

import argparse
from pathlib import Path

from funnel.errors import FunnelError
from funnel.io import is_dir
from funnel.model.config import FunnelConfig, parse_blocks, released_config
from funnel.model.flops import count_parameters, module_costs, total_flops
from funnel.weights import surgery
from funnel.weights.load import read_config, resolve

LENGTHS = (128, 512)


def show_layout(args: argparse.Namespace) -> None:
    """Prints costs and plan of a layout.

    Raises:
        FunnelError: layout, weights or plan cannot be read.
    """
    old = source_config(args.weights).replace(num_decoder_layers=0)
    new, other = (with_blocks(old, blocks) for blocks in (args.blocks, args.against))
    plan = (
        surgery.read_plan(args.layout_plan, old, new) if args.layout_plan else surgery.make_plan(old, new, args.init, args.keep)
    )
    print(f"layout {new.layout}, width {new.d_model}, a classifier without decoder; from {args.weights} ({old.layout})\n")
    print(cost_table(new))
    flops = (f"{total_flops(new, length) / total_flops(other, length):.2f} of its FLOPs at {length}" for length in LENGTHS)
    weights = count_parameters(new) / count_parameters(other)
    print(f"\nagainst {other.layout}: {', '.join(flops)}, {weights:.2f} of its parameters\n")
    print("\n".join(f"layer {row}" for row in plan))
    if args.plot:
        draw(new, args.plot)
        print(f"\nwrote {args.plot}")


def source_config(weights: str) -> FunnelConfig:
    """The config of a folder in any format, or of a released size."""
    return read_config(resolve(weights)) if is_dir(weights) else released_config(weights)


def with_blocks(config: FunnelConfig, blocks: str | None) -> FunnelConfig:
    """The config in the layout that `blocks` names, or as it is."""
    sizes, repeats = parse_blocks(blocks) if blocks else (config.block_sizes, config.repeats)
    return config.replace(block_sizes=sizes, block_repeats=repeats)


def cost_table(config: FunnelConfig) -> str:
    """A line a part of the model: layers, lengths, parameters, FLOPs, memory; with the shares of the whole."""
    by_length = [module_costs(config, length) for length in LENGTHS]
    rows = [("", "layers", *_heads("at"), "parameters", "", *_heads("GFLOPs at"), *_heads("MiB at"))]
    parameters = count_parameters(config)
    flops = [sum(part.flops for part in parts) for parts in by_length]
    kept = [sum(part.activations for part in parts) for parts in by_length]
    for part, *others in zip(*by_length, strict=True):
        same = (part, *others)
        layers = f"{part.layers}" + (f" x {part.runs // part.layers}" if part.runs > part.layers else "") if part.layers else ""
        gflops = [f"{p.flops / 1e9:.3g} ({p.flops / f:.0%})" for p, f in zip(same, flops, strict=True)]
        lengths = [str(p.length) if p.length else "" for p in same]
        mib = [f"{p.activations * 2 / 2**20:.3g} ({p.activations / k:.0%})" for p, k in zip(same, kept, strict=True)]
        share = f"{part.parameters / parameters:.0%}"
        rows.append((part.name, layers, *lengths, f"{part.parameters:,}", share, *gflops, *mib))
    sums = [f"{f / 1e9:.3g}" for f in flops] + [f"{k * 2 / 2**20:.3g}" for k in kept]
    rows.append(("all", "", *("" for _ in LENGTHS), f"{parameters:,}", "", *sums))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return (
        "\n".join(line.rstrip() for line in lines)
        + "\n\nMiB: what a training step keeps of one text for its backward pass, in bf16, about."
    )


def _heads(text: str) -> tuple[str, ...]:
    return tuple(f"{text} {length}" for length in LENGTHS)


def draw(config: FunnelConfig, path: Path) -> None:
    """Draws the funnel: a bar a layer, as wide as the sequence is long there.

    Raises:
        FunnelError: matplotlib is not installed, or the picture cannot be written.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise FunnelError("--plot needs the extra plot: pip install -e '.[plot]'") from None
    parts = [part for part in module_costs(config, LENGTHS[0]) if part.layers]
    whole = sum(part.flops for part in parts)
    figure, axis = plt.subplots(figsize=(7, 0.25 * sum(part.runs for part in parts) + 1.2), layout="constrained")
    row, colors = 0, plt.get_cmap("viridis")
    for number, part in enumerate(parts):
        color = colors(0.15 + 0.7 * number / max(1, len(parts) - 1))
        rows = range(row, row + part.runs)
        axis.barh(rows, part.length, left=-part.length / 2, height=0.8, color=color)
        note = (
            f"{part.name}: length {part.length}, {part.parameters / 1e6:.3g} M weights, {part.flops / whole:.0%} of the FLOPs"
        )
        axis.text(LENGTHS[0] * 0.55, row + (part.runs - 1) / 2, note, va="center", fontsize=8)
        row += part.runs
    axis.invert_yaxis()
    axis.set_axis_off()
    axis.set_title(f"{config.layout}, {LENGTHS[0]} tokens", fontsize=10)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise FunnelError(f"--plot {path}: cannot be written ({error})") from None
    finally:
        plt.close(figure)

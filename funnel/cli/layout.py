"""`funnel layout`: the cost of a layout and the origin of its layers, without training or building a model."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from funnel.cli.common import ArgumentParser, add_overwrite, align_columns, check_output
from funnel.errors import FunnelError, format_list, requires_extra

if TYPE_CHECKING:
    from funnel.model.config import FunnelConfig
    from funnel.model.flops import ModuleCost

LENGTHS = (128, 512)  # tokens; models with fewer positions use their maximum
BYTES_PER_ACTIVATION = 2  # bf16
PLOT_FORMATS = (".png", ".svg", ".pdf")


def add_layout(subparsers: "argparse._SubParsersAction[ArgumentParser]") -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser("layout", help="cost of a layout, and where its layers come from")
    parser.add_argument("--blocks", help="layers in each block, such as 2,2,2,2 or 6,3x2,3x2 (default: as in the weights)")
    parser.add_argument("--weights", default="small", help="checkpoint folder in any format, tiny for the one in the package, "
                        "or a released model, such as small, medium-base or xlarge (default: %(default)s)")  # fmt: skip
    parser.add_argument("--against", metavar="BLOCKS", help="layout of the same width to compare the cost with; 12 means a "
                        "model of 12 layers without pooling (default: the layout of the weights)")  # fmt: skip
    parser.add_argument("--init", default="identity", help="initialization of new layers: identity, copy or random "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--keep", default="spread", help="which layers to keep if the weights have more than --blocks: spread, "
                        "first or last (default: %(default)s)")  # fmt: skip
    parser.add_argument("--layout-plan", type=Path, help="JSON file with a layout plan, instead of --init and --keep")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"also draw the layout, as {format_list(PLOT_FORMATS)} "
                        "(extra: plot)")  # fmt: skip
    add_overwrite(parser)
    parser.set_defaults(work=show_layout)


def show_layout(args: argparse.Namespace) -> None:
    """Prints the cost table, the comparison with another layout, and the layout plan.

    Raises:
        FunnelError: layout, weights or plan cannot be read.
    """
    from funnel.model.flops import count_parameters, total_flops
    from funnel.weights.build import WeightsArgs

    options = WeightsArgs(args.weights, args.blocks, args.init, args.keep, args.layout_plan)
    if args.plot is not None:
        _check_plot(args.plot, args.overwrite)
    weights = _read_config(args.weights).replace(num_decoder_layers=0)
    config = weights.replace(blocks=args.blocks) if args.blocks else weights
    try:
        baseline = weights.replace(blocks=args.against) if args.against else weights
    except FunnelError as error:
        raise FunnelError(f"against {args.against}: {error}", "against") from None
    plan = options.plan_layers(weights, config)
    source = f"{args.weights} ({weights.layout})"
    print(f"layout {config.layout}, d_model {config.d_model}, classifier without decoder, weights from {source}\n")
    print(cost_table(config))
    ratios = (f"{total_flops(config, n) / total_flops(baseline, n):.2f} of its FLOPs at {n} tokens" for n in _lengths(config))
    parameters = count_parameters(config) / count_parameters(baseline)
    print(f"\ncompared with {baseline.layout}: {', '.join(ratios)}, {parameters:.2f} of its parameters\n")
    print("\n".join(f"layer {layer}" for layer in plan))
    if args.plot is not None:
        plot_layout(config, args.plot)
        print(f"\nwrote {args.plot}")


def _read_config(weights: str) -> "FunnelConfig":
    """The config of a checkpoint folder in any format, or of a released model."""
    from funnel.model.config import released_config
    from funnel.options import TINY
    from funnel.weights.load import read_source_config, resolve

    return read_source_config(resolve(weights)) if weights == TINY or os.path.isdir(weights) else released_config(weights)


def _lengths(config: "FunnelConfig") -> list[int]:
    """The lengths in tokens for which costs are shown."""
    return sorted({config.limit_length(length) for length in LENGTHS})


def cost_table(config: "FunnelConfig") -> str:
    """One line per module: layers, sequence lengths, parameters, FLOPs, activation memory, and shares of the totals."""
    from funnel.model.flops import count_parameters, module_costs

    lengths = _lengths(config)
    by_length = [module_costs(config, length) for length in lengths]
    n_parameters = count_parameters(config)
    flops = [sum(module.flops for module in modules) for modules in by_length]
    activations = [sum(module.activations for module in modules) for modules in by_length]
    rows = [_header(lengths)]
    for modules in zip(*by_length, strict=True):
        module = modules[0]
        gflops = [f"{m.flops / 1e9:.3g} ({m.flops / total:.0%})" for m, total in zip(modules, flops, strict=True)]
        mib = [f"{_mib(m.activations)} ({m.activations / total:.0%})" for m, total in zip(modules, activations, strict=True)]
        positions = [str(m.length) if m.length else "" for m in modules]
        share = f"{module.parameters / n_parameters:.0%}"
        rows.append([module.name, _layers(module), *positions, f"{module.parameters:,}", share, *gflops, *mib])
    totals = [f"{total / 1e9:.3g}" for total in flops] + [_mib(total) for total in activations]
    rows.append(["total", "", *("" for _ in lengths), f"{n_parameters:,}", "", *totals])
    note = "Memory: approximate activations saved for the backward pass, per example, in bf16."
    return f"{align_columns(rows)}\n\n{note}"


def _header(lengths: list[int]) -> list[str]:
    columns = [[f"{unit} {length}" for length in lengths] for unit in ("length at", "GFLOPs at", "MiB at")]
    return ["", "layers", *columns[0], "parameters", "", *columns[1], *columns[2]]


def _layers(module: "ModuleCost") -> str:
    """ "3", or "3 x 2" if each layer runs twice."""
    if not module.layers:
        return ""
    return f"{module.layers}" + (f" x {module.runs // module.layers}" if module.runs > module.layers else "")


def _mib(activations: int) -> str:
    return f"{activations * BYTES_PER_ACTIVATION / 2**20:.3g}"


def _check_plot(path: Path, overwrite: bool) -> None:
    """Raises FunnelError unless the layout can be drawn into this file."""
    if path.suffix.lower() not in PLOT_FORMATS:
        raise FunnelError(f"plot {path}: unknown image format; expected a name in {format_list(PLOT_FORMATS)}", "plot")
    check_output(path, "plot", overwrite=overwrite)
    with requires_extra("plot", "plot", "plot"):
        import matplotlib  # noqa: F401


def plot_layout(config: "FunnelConfig", path: Path) -> None:
    """Draws one bar per executed layer, whose width is the sequence length.

    Raises:
        FunnelError: the file cannot be written.
    """
    import matplotlib.pyplot as plt

    from funnel.io import atomic_write
    from funnel.model.flops import module_costs

    length = _lengths(config)[0]
    blocks = [module for module in module_costs(config, length) if module.layers]
    n_runs, total = sum(block.runs for block in blocks), sum(block.flops for block in blocks)
    figure, axes = plt.subplots(figsize=(7, 0.25 * n_runs + 1.2), layout="constrained")
    colors, first_row = plt.get_cmap("viridis"), 0
    for number, block in enumerate(blocks):
        rows = range(first_row, first_row + block.runs)
        color = colors(0.15 + 0.7 * number / max(1, len(blocks) - 1))
        axes.barh(rows, block.length, left=-block.length / 2, height=0.8, color=color)
        size = f"length {block.length}, {block.parameters / 1e6:.3g} M parameters, {block.flops / total:.0%} of the FLOPs"
        axes.text(length * 0.55, first_row + (block.runs - 1) / 2, f"{block.name}: {size}", va="center", fontsize=8)
        first_row += block.runs
    axes.invert_yaxis()
    axes.set_axis_off()
    axes.set_title(f"{config.layout}, {length} tokens", fontsize=10)
    try:
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=110)
    finally:
        plt.close(figure)

"""How long a training step would take on a perfect GPU: the roofline of the released models' layouts and of `7 x 4`.

    python -m benchmarks.speed.roofline [--measured FILE]

A perfect GPU is an H100 SXM that always computes at its nominal rate, or always reads and writes memory at its nominal rate,
whichever takes longer. A step is forward, backward and AdamW of a classifier with float32 weights under bf16 autocast, without
a decoder. FLOPs are those of the matrix products, three times the forward pass. Bytes are the fewest that funnel's algorithm
needs: each weight is read in forward and backward and updated by AdamW, and each activation that the backward pass needs is
written once and read once. Attention weights are recomputed and take no memory.

FILE is the output of `benchmarks.speed.gpu --json`; of the rows of one shape, funnel's fastest counts. Prints a Markdown table.
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

from benchmarks.speed.models import small_config
from funnel.model.config import FunnelConfig, released_config
from funnel.model.flops import module_costs

FLOPS_PER_SECOND = 989e12  # H100 SXM, bf16 without sparsity
BYTES_PER_SECOND = 3.35e12
# Read in forward and backward; gradient written and read; weight and two moments read and written.
BYTES_PER_WEIGHT = 4 + 4 + 2 * 4 + 6 * 4
BYTES_PER_ACTIVATION = 2 + 2  # bf16, written and read

MODELS: dict[str, FunnelConfig] = {
    **{size: released_config(f"{size}-base") for size in ("small", "medium", "intermediate", "large", "xlarge")},
    "7 x 4": small_config("4,4,4,4,4,4,4"),
}
SHAPES = ((128, 128), (16, 512))  # texts, tokens

Key = tuple[str, int, int, int]  # blocks, d_model, texts, tokens


class Roofline(NamedTuple):
    """The costs of one training step.

    Attributes:
        parameters: number of weights.
        flops: of the matrix products.
        weight_bytes, activation_bytes: read and written.
    """

    parameters: int
    flops: float
    weight_bytes: float
    activation_bytes: float

    @property
    def compute_ms(self) -> float:
        """Milliseconds that the matrix products take."""
        return self.flops / FLOPS_PER_SECOND * 1e3

    @property
    def memory_ms(self) -> float:
        """Milliseconds that reading and writing memory takes."""
        return (self.weight_bytes + self.activation_bytes) / BYTES_PER_SECOND * 1e3

    @property
    def perfect_ms(self) -> float:
        """The shortest time in milliseconds, with computation and memory traffic overlapped perfectly."""
        return max(self.compute_ms, self.memory_ms)


def roofline(config: FunnelConfig, batch: int, length: int) -> Roofline:
    """The costs of one training step of a classifier on `batch` texts of `length` tokens."""
    costs = module_costs(config, length, batch, max_saved_keys=0)
    parameters = sum(cost.parameters for cost in costs)
    return Roofline(
        parameters,
        3.0 * batch * sum(cost.flops for cost in costs),
        float(parameters * BYTES_PER_WEIGHT),
        float(batch * sum(cost.activations for cost in costs) * BYTES_PER_ACTIVATION),
    )


def read_measured(path: Path) -> dict[Key, float]:
    """funnel's milliseconds of a training step by shape, from the rows of `benchmarks.speed.gpu`: those of the fastest way."""
    measured: dict[Key, float] = {}
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if row["table"] == "step" and row["side"] != "transformers":
            key = (row["blocks"], row["d_model"], row["batch"], row["length"])
            measured[key] = min(measured.get(key, math.inf), row["ms"])
    return measured


def table(measured: dict[Key, float]) -> str:
    """The Markdown table, with measured times if there are any."""
    header = ["model", "layout", "texts x tokens", "parameters", "TFLOPs", "GB: weights", "activations"]
    header += ["ms: compute", "memory", "perfect"] + (["measured", "gap"] if measured else [])
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, config in MODELS.items():
        for batch, length in SHAPES:
            cost = roofline(config, batch, length)
            cells = [name, f"{config.layout} H{config.d_model}", f"{batch} x {length}", f"{cost.parameters / 1e6:.0f} M"]
            cells += [f"{cost.flops / 1e12:.2f}", f"{cost.weight_bytes / 1e9:.1f}", f"{cost.activation_bytes / 1e9:.1f}"]
            cells += [f"{ms:.1f}" for ms in (cost.compute_ms, cost.memory_ms, cost.perfect_ms)]
            if measured:
                ms = measured.get((config.layout, config.d_model, batch, length))
                cells += ["", ""] if ms is None else [f"{ms:.1f}", f"{ms / cost.perfect_ms:.1f}x"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, metavar="FILE", help="add measured times (JSON lines)")
    args = parser.parse_args()
    print(table({} if args.measured is None else read_measured(args.measured)))


if __name__ == "__main__":
    main()

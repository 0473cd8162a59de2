"""What every format's reader returns, and the way that a table of names is applied.

A table maps their names to ours. Each {} in a row stands for a number, the same ones on both sides in order. Formats
that count layers from first to last, whatever their block, have "layer.{}" on our side; `rename` puts the block in.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from funnel.model import checkpoint
from funnel.model.config import FunnelConfig
from funnel.errors import FunnelError
from funnel.model.heads import MODELS

Table = Mapping[str, str]
Transform = Callable[[Tensor], Tensor]


@dataclass
class Source:
    """A checkpoint of any format, in our terms.

    Attributes:
        format: name of the format, for people.
        folder: where it was found; its tokenizer files are there too.
        config, weights, architecture: as in our checkpoints.
        left_out: what was read and not kept, with the reasons.
        made: what the source does not have, with what it starts as.
    """

    format: str
    folder: Path
    config: FunnelConfig
    weights: dict[str, Tensor]
    architecture: str
    left_out: dict[str, str] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)


def first_file(folder: Path, names: Iterable[str]) -> Path:
    """The first of some files that a folder has.

    Raises:
        FunnelError: it has none.
    """
    names = list(names)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FunnelError(f"{folder}: a file is missing; it takes one of {', '.join(names)}")


def rename(name: str, table: Table, block_sizes: tuple[int, ...] = ()) -> str | None:
    """Translates one name.

    Args:
        block_sizes: where the layers that a format counts from first to last belong.

    Returns:
        None where no row of the table fits.
    """
    for theirs, ours in table.items():
        if match := re.fullmatch(re.escape(theirs).replace(r"\{\}", "([0-9]{1,4})"), name):
            renamed = ours.format(*match.groups())
            return re.sub(r"^layer\.([0-9]+)", lambda m: place(int(m[1]), block_sizes), renamed)
    return None


def place(layer: int, block_sizes: tuple[int, ...]) -> str:
    """The name of a layer that is counted from the first: "encoder.blocks.B.L"."""
    for b, size in enumerate(block_sizes):
        if layer < size:
            return f"encoder.blocks.{b}.{layer}"
        layer -= size
    return f"encoder.blocks.{len(block_sizes)}.{layer}"  # one too many: the check against the model names it


def model_state(architecture: str, config: FunnelConfig) -> dict[str, Tensor]:
    """The state dict of a model without its memory: names and shapes."""
    with torch.device("meta"):
        return MODELS[architecture](config).state_dict()


def check_exact_match(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path) -> None:
    """Checks converted weights against the state dict of the model that they are for.

    Raises:
        FunnelError: a name is missing or left over, or a shape does not fit.
    """
    missing = [n for n in expected if n not in weights]
    left_over = [n for n in weights if n not in expected]
    if missing or left_over:
        raise FunnelError(f"{source}: weights and config do not fit: {checkpoint.names_text(missing, left_over)}")
    for name, tensor in expected.items():
        checkpoint.check_shape(name, weights[name], tensor, source)

"""Shared by all formats: the types that they exchange with load.py, renaming weights by a table, checking the result.

A table maps a format's weight names to the names in our models' state dicts. Each {} stands for a number; numbers
correspond in order. A format that numbers its layers consecutively across blocks has "layer.{}" on our side, which `rename`
turns into the block and the layer within that block.

To add a format, write a module with a `FORMAT` (see `Format`) and have `load.detect_format` recognize it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.checkpoint import check_names, check_shape
from funnel.model.config import BlockSpec, FunnelConfig
from funnel.model.heads import MODELS

POOLER = ("classifier.linear_hidden.weight", "classifier.linear_hidden.bias")


@dataclass(frozen=True)
class RawCheckpoint:
    """The contents of a checkpoint's files, with the format's own weight names.

    Attributes:
        folder: where it was read from, for error messages.
        config_values: the parsed config file.
        config: the same as a FunnelConfig.
        tensors: the weights.
        tokenizer: None if the folder has none.
    """

    folder: Path
    config_values: Mapping[str, Any]
    config: FunnelConfig
    tensors: dict[str, Tensor]
    tokenizer: FunnelTokenizer | None


class ConvertedWeights(NamedTuple):
    """A converted checkpoint, checked against the model.

    Attributes:
        config: may contain more than the config file, such as the number of labels.
        weights: the complete state dict of `architecture`; for a BERT or ALBERT also the pooler, if the source has it.
        architecture: name of the model class, one of `MODELS`.
        unused: unused weights of the source; values are the reasons.
    """

    config: FunnelConfig
    weights: dict[str, Tensor]
    architecture: str
    unused: Mapping[str, str] = {}


class Format(NamedTuple):
    """A checkpoint format that can be read.

    Attributes:
        name: for messages.
        config_file: name of the config file.
        weight_files: names of weight files; the first that exists is read.
        parse_config: converts the config file's values; the path is for messages.
        convert: renames, completes and checks the weights.
    """

    name: str
    config_file: str
    weight_files: tuple[str, ...]
    parse_config: Callable[[Mapping[str, Any], Path], FunnelConfig]
    convert: Callable[[RawCheckpoint], ConvertedWeights]


def rename(name: str, table: Mapping[str, str], blocks: tuple[BlockSpec, ...] = ()) -> str | None:
    """Translates one weight name.

    Args:
        blocks: the layout, for formats that number layers consecutively.

    Returns:
        None if no row of the table matches.
    """
    for pattern, target in table.items():
        if match := re.fullmatch(re.escape(pattern).replace(r"\{\}", "([0-9]{1,4})"), name):
            renamed = target.format(*match.groups())
            return re.sub(r"^layer\.([0-9]+)", lambda number: layer_name(int(number[1]), blocks), renamed)
    return None


def layer_name(index: int, blocks: tuple[BlockSpec, ...]) -> str:
    """The prefix "encoder.blocks.B.L" of a layer that is numbered consecutively across blocks."""
    position = index
    for number, block in enumerate(blocks):
        if position < block.layers:
            return f"encoder.blocks.{number}.{position}"
        position -= block.layers
    return f"layer.{index}"  # does not exist; check_exact_match reports it


def meta_state_dict(architecture: str, config: FunnelConfig) -> dict[str, Tensor]:
    """A model's state dict on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return MODELS[architecture](config).state_dict()


def expected_weights(architecture: str, config: FunnelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that weights should match, on the meta device.

    A bare model or masked language model may have the hidden layer of a text classifier in addition: a BERT's pooler (see
    bert_family.py).
    """
    expected = meta_state_dict(architecture, config)
    if architecture in ("FunnelBaseModel", "FunnelForMaskedLM") and any(name in weights for name in POOLER):
        classifier = meta_state_dict("FunnelForSequenceClassification", config)
        expected |= {name: classifier[name] for name in POOLER}
    return expected


def check_exact_match(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path) -> None:
    """Checks that weights have exactly the names and shapes of a state dict.

    Raises:
        FunnelError: a weight is missing or unexpected, or has a different shape.
    """
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    check_names(missing, unexpected, source)
    for name, tensor in expected.items():
        check_shape(name, weights[name], tensor, source)

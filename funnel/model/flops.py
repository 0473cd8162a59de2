"""The cost of a model: parameters, FLOPs and activation memory of each part, without running it.

Parameters and FLOPs are counted on the model itself, on PyTorch's meta device, where nothing is computed or allocated.
FLOPs are those of the matrix products of a forward pass, with a multiply-add counted as two; a training step takes three
times as many.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from funnel.errors import FunnelError
from funnel.model import pooling
from funnel.model.attention_backends import attention_backend
from funnel.model.config import FunnelConfig
from funnel.model.heads import FunnelForSequenceClassification, FunnelForTokenClassification, FunnelPreTrainedModel
from funnel.model.tiled_attention import MAX_KEYS_TO_SAVE

SEGMENT_CHANNELS = 4  # of the segments' encodings in attention.py


class ModuleCost(NamedTuple):
    """The cost of one part of a model.

    Attributes:
        name: "embeddings" (with the bias of distances, which all layers share), "block 0", …, "decoder", "head".
        layers: number of layers, each with its own weights.
        runs: number of layers executed in a forward pass, repeats included.
        length: sequence length; 0 for the head.
        parameters: number of weights.
        flops: FLOPs of a forward pass, per example.
        activations: approximate number of elements saved for the backward pass, per example.
    """

    name: str
    layers: int
    runs: int
    length: int
    parameters: int
    flops: int
    activations: int


def module_costs(
    config: FunnelConfig, length: int, batch_size: int = 1, max_saved_keys: int = MAX_KEYS_TO_SAVE
) -> list[ModuleCost]:
    """The costs of a classifier's parts, in order of execution; of a token classifier's if the config has a decoder.

    Args:
        length: tokens per example.
        batch_size: examples per batch; the distances between positions are projected once per batch.
        max_saved_keys: layers with more keys recompute their attention weights in the backward pass instead of saving them.
    """
    model = _meta_model(config)
    flops = count_flops(model, length, batch_size)
    lengths = pooling.block_lengths(length, config)
    activations = 3 * length * (config.embedding_size or config.d_model)
    parts = {"embeddings": ModuleCost("embeddings", 0, 0, length, 0, 0, activations)}
    for index, block in enumerate(config.blocks):
        activations = _block_activations(config, index, lengths, max_saved_keys)
        parts[f"encoder.blocks.{index}"] = ModuleCost(
            f"block {index}", block.layers, block.runs, lengths[index], 0, 0, activations
        )
    if layers := config.num_decoder_layers:
        activations = layers * _layer_activations(config, length, length, max_saved_keys)
        parts["decoder"] = ModuleCost("decoder", layers, layers, length, 0, 0, activations)
    parts["classifier"] = ModuleCost("head", 0, 0, 0, 0, 0, 4 * config.d_model)
    bias_table = model.encoder.bias_table()
    parameters = {name: sum(parameter.numel() for parameter in model.get_submodule(name).parameters()) for name in parts}
    parameters["embeddings"] += 0 if bias_table is None else bias_table.numel()
    return [part._replace(parameters=parameters[name], flops=flops.get(name, 0) // batch_size) for name, part in parts.items()]


def total_flops(config: FunnelConfig, length: int, batch_size: int = 1) -> int:
    """FLOPs of the whole forward pass per example; arguments as in `module_costs`."""
    return count_flops(_meta_model(config), length, batch_size)[""] // batch_size


def count_parameters(config: FunnelConfig) -> int:
    """Parameters of the whole model."""
    return sum(parameter.numel() for parameter in _meta_model(config).parameters())


def _meta_model(config: FunnelConfig) -> FunnelPreTrainedModel:
    with torch.device("meta"):
        return (FunnelForTokenClassification if config.num_decoder_layers else FunnelForSequenceClassification)(config).eval()


@torch.no_grad()
def count_flops(model: FunnelPreTrainedModel, length: int, batch_size: int) -> dict[str, int]:
    """FLOPs of a forward pass over a batch, by module name; "" is the whole model.

    Args:
        model: on the meta device, in evaluation mode.
        length, batch_size: as in `module_costs`.
    """
    with FlopCounterMode(display=False) as counter, attention_backend("eager"):
        model(torch.ones(batch_size, length, dtype=torch.int64, device="meta"))
    root = type(model).__name__
    return {
        name.removeprefix(root).removeprefix("."): sum(counts.values()) for name, counts in counter.get_flop_counts().items()
    }


def _block_activations(config: FunnelConfig, index: int, lengths: list[int], max_saved_keys: int) -> int:
    """Elements per example that a block saves for its backward pass."""
    total = 0
    for run in range(config.blocks[index].runs):
        is_last = index == len(config.blocks) - 1 and run == config.blocks[index].runs - 1
        # The last layer of a text classifier computes only [CLS].
        queries = 1 if is_last and not config.num_decoder_layers else lengths[index]
        reads_unpooled = index > 0 and run == 0 and config.pool_q_only
        keys = lengths[index - 1] if reads_unpooled else lengths[index]
        total += _layer_activations(config, queries, keys, max_saved_keys)
    return total


def _layer_activations(config: FunnelConfig, queries: int, keys: int, max_saved_keys: int) -> int:
    """Elements per example that one run of a layer saves for its backward pass."""
    width = config.n_head * config.d_head
    hidden = 6 * queries * config.d_model  # inputs of both sublayers and both LayerNorms, and two dropout masks
    heads = (2 * queries + 2 * keys) * width
    if config.relative_attention:
        heads += queries * width + 2 * queries * config.n_head * SEGMENT_CHANNELS
    scores = 2 * config.n_head * queries * keys if keys <= max_saved_keys else 0  # weights and their dropout mask
    return hidden + heads + scores + 2 * queries * config.d_inner


def available_memory() -> int | None:
    """Available memory in bytes, or None if it cannot be determined."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def check_memory(config: FunnelConfig, bytes_per_weight: int) -> None:
    """Raises FunnelError if the model does not fit in the available memory.

    Args:
        bytes_per_weight: 4 for a float32 weight, 16 with its gradient and AdamW's two moments.
    """
    parameters = count_parameters(config)
    needed, available = parameters * bytes_per_weight, available_memory()
    if available is not None and needed > available:
        raise FunnelError(
            f"blocks {config.layout} with d_model {config.d_model}: {parameters:,} parameters need {needed / 2**30:.1f} GiB, "
            f"but only {available / 2**30:.1f} GiB are available; use fewer layers",
            "blocks",
        )

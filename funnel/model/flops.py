"""What a layout module_costs before anyone pays for it: lengths, parameters, FLOPs, of the whole and of each block.

FLOPs are those of the matrix products of a forward pass, a multiplication and an addition counted as two, as
torch.utils.flop_counter counts them; a training step is three times that. Nothing is built or run to find out.
"""

from pathlib import Path
from typing import NamedTuple

from funnel.errors import FunnelError
from funnel.model import attention_backends, pooling
from funnel.model.config import FunnelConfig

SEGMENT_CHANNELS = 4  # of attention.py


class ModuleCost(NamedTuple):
    """The cost of a part of a model.

    Attributes:
        name: "embeddings", "block 0" …, "decoder", "head".
        layers: layers with weights of their own.
        runs: layers as they run, repeats counted.
        length: positions that it runs at; 0 where that has no meaning.
        parameters: how many weights it has.
        flops: of a forward pass over one text.
        activations: numbers a text that training keeps for the backward pass, about.
    """

    name: str
    layers: int
    runs: int
    length: int
    parameters: int
    flops: int
    activations: int


def layer_parameters(config: FunnelConfig) -> int:
    """Weights of one layer."""
    d, width, inner = config.d_model, config.n_head * config.d_head, config.d_inner
    attention = 5 * d * width + 2 * width + 3 * width + 2 * width + d  # q, k, v, r, post; k, v; r_*_bias; seg_embed; post
    return attention + 2 * d * inner + inner + d + 2 * 2 * d  # and two LayerNorms


def layer_flops(config: FunnelConfig, queries: int, keys: int, step: int, texts: int = 1) -> float:
    """FLOPs a text of one layer's forward pass.

    Args:
        step: 2 in a layer that pools its query, otherwise 1.
        texts: in a batch, which computes the projected distances once.
    """
    d, width, inner = config.d_model, config.n_head * config.d_head, config.d_inner
    distances = keys + step * queries
    projections = 2 * queries * d * width + 2 * keys * d * width + distances * d * width / texts
    scores = 2 * queries * keys * width + queries * distances * width  # content and values; position
    segments = queries * width * SEGMENT_CHANNELS + config.n_head * queries * keys * SEGMENT_CHANNELS
    return 2 * (projections + scores + segments + 2 * queries * d * inner)


def layer_activations(config: FunnelConfig, queries: int, keys: int) -> int:
    """Numbers a text that one layer keeps for its backward pass in training."""
    d, width = config.d_model, config.n_head * config.d_head
    hidden = 6 * queries * d  # inputs of both halves, of both LayerNorms, and two dropout masks
    heads = (3 * queries + 2 * keys) * width + 2 * queries * config.n_head * SEGMENT_CHANNELS
    scores = 2 * config.n_head * queries * keys if keys <= attention_backends.MAX_KEYS_TO_SAVE else 0  # weights and their mask
    return hidden + heads + scores + 2 * queries * config.d_inner


def module_costs(config: FunnelConfig, length: int, texts: int = 1) -> list[ModuleCost]:
    """The parts of a classifier with this config (and its decoder, if it has one), in the order in which they run.

    Args:
        length: tokens of a text.
        texts: in a batch.
    """
    d = config.d_model
    parts = [ModuleCost("embeddings", 0, 0, length, config.vocab_size * d + 2 * d, 0, 3 * length * d)]
    sizes = pooling.lengths(length, config)
    for block, (layers, repeats) in enumerate(zip(config.block_sizes, config.repeats, strict=True)):
        here = sizes[block]
        flops, activations = 0.0, 0
        for run in range(layers * repeats):
            reads_former = run == 0 and block > 0 and config.pool_q_only
            is_last = block == len(sizes) - 1 and run == layers * repeats - 1
            queries = 1 if is_last and not config.num_decoder_layers else here  # a classifier's last layer computes [cls]
            keys, step = (sizes[block - 1], 2) if reads_former else (here, 1)
            flops += layer_flops(config, queries, keys, step, texts)
            activations += layer_activations(config, queries, keys)
        parameters = layers * layer_parameters(config)
        parts.append(ModuleCost(f"block {block}", layers, layers * repeats, here, parameters, round(flops), activations))
    if n := config.num_decoder_layers:
        flops = n * layer_flops(config, length, length, 1, texts)
        kept = n * layer_activations(config, length, length)
        parts.append(ModuleCost("decoder", n, n, length, n * layer_parameters(config), round(flops), kept))
    labels = config.num_labels
    parts.append(ModuleCost("head", 0, 0, 0, d * d + d + d * labels + labels, 2 * (d * d + d * labels), 4 * d))
    return parts


def total_flops(config: FunnelConfig, length: int, texts: int = 1) -> int:
    """FLOPs a text of the whole forward pass; arguments as in `module_costs`."""
    return sum(part.flops for part in module_costs(config, length, texts))


def count_parameters(config: FunnelConfig) -> int:
    """Weights of the whole model."""
    return sum(part.parameters for part in module_costs(config, 1))


def count_encoder_parameters(config: FunnelConfig) -> int:
    """Weights of embeddings and encoder, the least that any model with this config has."""
    return config.vocab_size * config.d_model + 2 * config.d_model + sum(config.block_sizes) * layer_parameters(config)


def available_memory() -> int | None:
    """Bytes of the machine's memory that are free for a new program, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def check_memory(config: FunnelConfig, bytes_per_weight: int) -> None:
    """Stops before a model is built that cannot fit into the machine's memory.

    Args:
        bytes_per_weight: 4 for a float32 weight, 16 with its gradient and AdamW's two moments.

    Raises:
        FunnelError: its weights alone are more than what is free.
    """
    parameters = count_parameters(config)
    needed, free = parameters * bytes_per_weight, available_memory()
    if free is not None and needed > free:
        raise FunnelError(
            f"blocks {config.layout}, width {config.d_model}: {parameters:,} parameters need {needed / 2**30:.1f} GiB, "
            f"and {free / 2**30:.1f} GiB are free; take fewer layers"
        )

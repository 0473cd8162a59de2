"""The model's body: embeddings, layers, blocks, encoder, decoder.

    input_ids -> FunnelEmbeddings -> FunnelEncoder (blocks, each half as long as the one before) -> [CLS] for classifiers
                                       \\-> upsample + the first block's output -> FunnelDecoder -> a state per token

Modules keep no state between calls, and no Python branch depends on a tensor's values, so that the forward pass compiles to
a single graph, even with dynamic lengths. The task-specific classes are in heads.py.

Shapes: b examples, l input tokens, p positions of a block, d = d_model.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from funnel.model import pooling
from funnel.model.attention import (
    AttentionInputs,
    DistanceEncodings,
    FunnelAttention,
    PositionContext,
    add_and_normalize,
    attention_inputs,
)
from funnel.model.compilation import Region
from funnel.model.config import FunnelConfig
from funnel.model.dropout import Dropout
from funnel.model.pooling import Positions

# Evaluated here because torch.compile cannot trace it in all versions of PyTorch.
AUTOCAST_DEVICES = [device for device in ("cpu", "cuda", "mps") if torch.amp.is_autocast_available(device)]


def activation(name: str, x: Tensor) -> Tensor:
    """Applies one of `config.ACTIVATIONS`, or tanh."""
    if name in ("gelu_new", "gelu"):
        return F.gelu(x, approximate="tanh" if name == "gelu_new" else "none")
    functions: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "tanh": torch.tanh}
    return functions[name](x)


class FunnelEmbeddings(Region):
    """Word embeddings, LayerNorm, dropout. [b, l] -> [b, l, d].

    BERT-like models add position and token-type embeddings, and some project embeddings of another width to d_model.

    Args of forward:
        input_ids, token_type_ids: [b, l].
        mask: [b, l], true where a token is real.
    """

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embedding_size or config.d_model
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        if config.position_embeddings:
            self.position_embeddings = nn.Embedding(config.position_embeddings, width)
        if config.token_type_embeddings:
            self.token_type_embeddings = nn.Embedding(config.token_type_embeddings, width)
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout)
        if config.embedding_size is not None:
            self.projection = nn.Linear(width, config.d_model)

    def forward(self, input_ids: Tensor, mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.run(input_ids, mask, token_type_ids)

    def compute(self, input_ids: Tensor, mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """The embeddings, without the choice whether to compile."""
        config = self.config
        hidden = self.word_embeddings(input_ids)
        if config.position_embeddings:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            if torch.compiler.is_compiling():  # compiled graphs accept padding beyond the table: it reads position 0
                positions = positions * mask
            hidden = hidden + self.position_embeddings(positions + config.position_offset)
        if config.token_type_embeddings:
            is_second = (token_type_ids == 1) & (config.token_type_embeddings > 1)
            hidden = hidden + self.token_type_embeddings(is_second.to(input_ids.dtype))
        hidden = self.layer_norm(hidden)
        device = hidden.device.type
        if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))  # one dtype for all hidden states: nothing is cast twice
        hidden = self.dropout(hidden)
        return hidden if config.embedding_size is None else self.projection(hidden)


class FunnelFeedForward(nn.Module):
    """Linear, activation, linear, dropout, residual, LayerNorm. [b, p, d] -> [b, p, d]."""

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__()
        self.hidden_act = config.hidden_act
        self.linear_1 = nn.Linear(config.d_model, config.d_inner)
        self.linear_2 = nn.Linear(config.d_inner, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.activation_dropout = Dropout(config.activation_dropout)
        self.hidden_dropout = Dropout(config.hidden_dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.activation_dropout(activation(self.hidden_act, self.linear_1(hidden)))  # [b, p, d_inner]
        return add_and_normalize(hidden, self.hidden_dropout(self.linear_2(inner)), self.layer_norm)


class FunnelLayer(Region):
    """Attention and feed-forward network. query [b, q, d], key_value [b, k, d] -> [b, q, d].

    With `gradient_checkpointing`, it saves only its inputs and is recomputed in the backward pass, which takes a third more
    time and a fraction of the memory.
    """

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.attention = FunnelAttention(config)
        self.ffn = FunnelFeedForward(config)

    def forward(self, query: Tensor, key_value: Tensor, inputs: AttentionInputs) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.run, query, key_value, inputs, use_reentrant=False)
        return self.run(query, key_value, inputs)

    def compute(self, query: Tensor, key_value: Tensor, inputs: AttentionInputs) -> Tensor:
        """The layer, without checkpointing and the choice whether to compile."""
        return self.ffn(self.attention(query, key_value, inputs))


class FunnelBlock(nn.ModuleList):
    """Halves the sequence, except in block 0, then runs its layers at the new length, each `repeats` times in a row.

    The first run does the pooling: its queries are the pooled sequence, its keys and values the unpooled one
    (`pool_q_only`) or the pooled one.

    Args of forward:
        hidden: [b, l, d], the previous block's output.
        positions: those of `hidden`.
        context: of the forward pass.
        cls_only: compute only position 0 in the last run.

    Returns:
        The states after each run, [b, p, d] each (with `cls_only`, the last one is [b, 1, d]), and their positions.
    """

    def __init__(self, config: FunnelConfig, index: int) -> None:
        super().__init__(FunnelLayer(config) for _ in range(config.blocks[index].layers))
        self.config = config
        self.pools = index > 0
        self.repeats = config.blocks[index].repeats

    def forward(
        self, hidden: Tensor, positions: Positions, context: PositionContext, cls_only: bool
    ) -> tuple[list[Tensor], Positions]:
        query, keys = hidden, positions
        if self.pools:
            query = pooling.pool_hidden(hidden, positions.mask, self.config)  # [b, p, d]
            positions = pooling.pool_positions(positions, self.config)
            if not self.config.pool_q_only:
                hidden, keys = query, positions

        runs = [cast(FunnelLayer, layer) for layer in self for _ in range(self.repeats)]
        states: list[Tensor] = []
        queries, inputs = positions, None
        for run, layer in enumerate(runs):
            if cls_only and run == len(runs) - 1:
                query, queries, inputs = query[:, :1], positions.cls_only(), None
            if inputs is None:
                inputs = attention_inputs(context, queries, keys, self.config)
            query = hidden = layer(query, hidden, inputs)
            states.append(hidden)
            if keys is not positions:  # only the first run reads the unpooled sequence
                keys, inputs = positions, None
        return states, positions


def position_context(hidden: Tensor, encodings: DistanceEncodings | None, distance_bias: Tensor | None) -> PositionContext:
    """Builds the context of a forward pass, from embedded tokens [b, l, d]."""
    distances = None if encodings is None else encodings(hidden.shape[1], hidden.dtype, hidden.device)
    return PositionContext(distances, distance_bias)


class FunnelEncoder(nn.Module):
    """Runs the blocks.

    Args of forward:
        hidden: [b, l, d], embeddings.
        mask: [b, l], true where a token is real.
        token_type_ids: [b, l].
        cls_only: compute only position 0 in the very last run, which is all that a classifier reads.

    Returns:
        The states after the embeddings and after every run of a layer, in order, each [b, its block's length, d]; and the
        mask of the last block, [b, p].
    """

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__()
        self.distance_encodings = DistanceEncodings(config) if config.relative_attention else None
        self.distance_bias = nn.Embedding(config.distance_buckets, config.n_head) if config.distance_buckets else None
        self.blocks = nn.ModuleList(FunnelBlock(config, index) for index in range(len(config.blocks)))

    def layers(self, block: int) -> list[FunnelLayer]:
        """The layers of a block."""
        return [cast(FunnelLayer, layer) for layer in cast(FunnelBlock, self.blocks[block])]

    def bias_table(self) -> Tensor | None:
        """The bias of every bucket of distances, [buckets, h], if the config has them; the decoder uses the same one."""
        return None if self.distance_bias is None else self.distance_bias.weight

    def forward(
        self, hidden: Tensor, mask: Tensor, token_type_ids: Tensor, cls_only: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        context = position_context(hidden, self.distance_encodings, self.bias_table())
        positions = Positions(0, mask, token_type_ids)
        states = [hidden]
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            block_states, positions = block(states[-1], positions, context, cls_only and index == last)
            states += block_states
        return states, positions.mask


class FunnelDecoder(nn.Module):
    """Layers at full length after the upsampled encoder output.

    Args of forward:
        hidden: [b, l, d].
        mask, token_type_ids: [b, l].
        distance_bias: [buckets, h], the encoder's.

    Returns:
        The input and each layer's output, [b, l, d] each.
    """

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__()
        self.config = config
        self.distance_encodings = DistanceEncodings(config) if config.relative_attention else None
        self.layers = nn.ModuleList(FunnelLayer(config) for _ in range(config.num_decoder_layers))

    def forward(self, hidden: Tensor, mask: Tensor, token_type_ids: Tensor, distance_bias: Tensor | None) -> list[Tensor]:
        context = position_context(hidden, self.distance_encodings, distance_bias)
        positions = Positions(0, mask, token_type_ids)
        inputs = attention_inputs(context, positions, positions, self.config)
        states = [hidden]
        for layer in self.layers:
            states.append(layer(states[-1], states[-1], inputs))
        return states

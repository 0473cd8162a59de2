"""The body of the model: embeddings, layer, encoder, decoder.

    input_ids -> FunnelEmbeddings -> FunnelEncoder (blocks, each half as long as the one before) -> [cls] for classifiers
                                       \\-> upsample + the first block's output -> FunnelDecoder -> a state for every token

Nothing is kept on modules between calls, and no Python branch depends on a tensor's values: the forward compiles to one
graph, also with dynamic lengths. The task-specific classes are in heads.py.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from funnel.model import pooling
from funnel.model.attention import AttentionInputs, RelativeMultiHeadAttention, sinusoids
from funnel.model.config import FunnelConfig
from funnel.model.dropout import Dropout

CLS_TOKEN_TYPE = 2


def activation(name: str, x: Tensor) -> Tensor:
    """Applies one of `config.ACTIVATIONS`."""
    if name in ("gelu_new", "gelu"):
        return F.gelu(x, approximate="tanh" if name == "gelu_new" else "none")
    return F.relu(x) if name == "relu" else F.silu(x)


class FunnelEmbeddings(nn.Module):
    """Word embeddings, LayerNorm, dropout. Positions and token types enter in the attention. [b, l] -> [b, l, d]."""

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.layer_norm(self.word_embeddings(input_ids))
        device = hidden.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            # Hidden states are in one dtype all the way, so that nothing is cast twice.
            hidden = hidden.to(torch.get_autocast_dtype(device))
        return self.dropout(hidden)


class FunnelFeedForward(nn.Module):
    """Two linear layers with an activation between, dropout, residual, LayerNorm. [b, l, d] -> [b, l, d]."""

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__()
        self.hidden_act = config.hidden_act
        self.linear_1 = nn.Linear(config.d_model, config.d_inner)
        self.linear_2 = nn.Linear(config.d_inner, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.activation_dropout = Dropout(config.activation_dropout)
        self.hidden_dropout = Dropout(config.hidden_dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.activation_dropout(activation(self.hidden_act, self.linear_1(hidden)))  # [b, l, d_inner]
        return self.layer_norm(hidden + self.hidden_dropout(self.linear_2(inner)))


class FunnelLayer(nn.Module):
    """Attention and feed-forward. query [b, q, d], key_value [b, k, d] -> [b, q, d].

    With `gradient_checkpointing` it keeps its input only, and runs again when its gradient is needed: a third more time
    for a fraction of the memory.
    """

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.attention = RelativeMultiHeadAttention(config)
        self.ffn = FunnelFeedForward(config)

    def forward(self, query: Tensor, key_value: Tensor, inputs: AttentionInputs) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, query, key_value, inputs, use_reentrant=False)
        return self._forward(query, key_value, inputs)

    def _forward(self, query: Tensor, key_value: Tensor, inputs: AttentionInputs) -> Tensor:
        return self.ffn(self.attention(query, key_value, inputs))


class AttentionInputsBuilder(nn.Module):
    """Builds the `AttentionInputs` of every block, from lengths, mask and token types alone.

    Sines and cosines are computed once, over every distance in tokens; a block at stride s reads every s-th. They go
    through dropout first, as in the paper's code, so that all layers of a step see the same.
    """

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__()
        self.config = config
        self.sine_dropout = Dropout(config.hidden_dropout, by_text=False)
        self.cosine_dropout = Dropout(config.hidden_dropout, by_text=False)

    def distances(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Encodings of the distances from `length` down to -`length`, [2 length + 1, d]."""
        exact = dtype if dtype == torch.float64 else torch.float32  # angles in bfloat16 would be noise
        steps = torch.arange(length, -length - 1, -1, device=device).to(exact)
        sines, cosines = sinusoids(steps, self.config.d_model)
        return torch.cat([self.sine_dropout(sines), self.cosine_dropout(cosines)], dim=1).to(dtype)

    def inputs(
        self,
        encodings: Tensor,
        query: tuple[int, Tensor],
        key: tuple[int, Tensor, Tensor],
        length: int,
    ) -> AttentionInputs:
        """The inputs of a layer whose queries are at one block's positions and whose keys at the same or a former one's.

        Args:
            encodings: from `distances`.
            query: block and token types [b, q] of the queries.
            key: block, token types [b, k] and mask [b, k] of the keys.
            length: positions of the model's input.
        """
        query_block, query_types = query
        key_block, key_types, key_mask = key
        queries, keys = query_types.shape[1], key_types.shape[1]

        stride = pooling.spacing(key_block)
        step = pooling.spacing(query_block) // stride
        offset = pooling.first_position(query_block, self.config) - pooling.first_position(key_block, self.config)
        largest = offset + step * stride * (queries - 1)  # the distance from the last query to the first key
        distances = largest - stride * torch.arange(keys + step * queries, device=encodings.device)
        # Beyond the text lie only [cls]'s own distances, which count for nothing, and the shift's last, unread columns.
        positions = encodings[(length - distances).clamp(0, 2 * length)]

        segments = self._segments(query_types, is_query=True), self._segments(key_types, is_query=False)
        return AttentionInputs(key_mask, positions, step, *(x.to(encodings.dtype) for x in segments))

    def _segments(self, types: Tensor, is_query: bool) -> Tensor:
        """The segment channels of queries or keys (see `AttentionInputs`): all keys, and one for each token type. [b, n, 4]."""
        kinds = types.unsqueeze(2) == torch.arange(3, device=types.device)  # [b, n, 3]
        if is_query and not self.config.separate_cls:  # [cls] is of the same segment as every token
            everywhere = (types == CLS_TOKEN_TYPE).unsqueeze(2)
            kinds = torch.cat([kinds[..., :CLS_TOKEN_TYPE] | everywhere, torch.ones_like(everywhere)], dim=2)
        channels = torch.cat([torch.ones_like(kinds[..., :1]), kinds], dim=2)
        if self.config.separate_cls:
            channels = torch.cat([torch.zeros_like(channels[:, :1]), channels[:, 1:]], dim=1)
        return channels


class FunnelEncoder(nn.Module):
    """The blocks.

    Args of forward:
        hidden: [b, l, d], embeddings.
        mask: [b, l], true where a token is real.
        token_type_ids: [b, l].
        cls_only: the very last run of a layer computes position 0 alone, which is all that a classifier reads.

    Returns:
        The states after the embeddings and after every run of a layer, first to last, each [b, its block's length, d];
        and the mask of the last block, [b, p].
    """

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_inputs = AttentionInputsBuilder(config)
        self.blocks = nn.ModuleList(nn.ModuleList(FunnelLayer(config) for _ in range(n)) for n in config.block_sizes)

    def layers(self, block: int) -> list[FunnelLayer]:
        """The layers of a block."""
        return [cast(FunnelLayer, layer) for layer in cast(nn.ModuleList, self.blocks[block])]

    def forward(
        self, hidden: Tensor, mask: Tensor, token_type_ids: Tensor, cls_only: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        config, build = self.config, self.attention_inputs
        length = hidden.shape[1]
        encodings = build.distances(length, hidden.dtype, hidden.device)
        states = [hidden]
        types = token_type_ids
        for b in range(len(self.blocks)):
            query = key_value = hidden
            keys = (b, types, mask)
            if b > 0:
                pooled_mask = pooling.pool_mask(mask, config)
                pooled_types = pooling.pool_token_types(types, mask, config)
                query = pooling.pool_hidden(hidden, mask, config)
                keys = (b - 1, types, mask)
                if not config.pool_q_only:
                    key_value, keys = query, (b, pooled_types, pooled_mask)
                mask, types = pooled_mask, pooled_types
            runs = [layer for layer in self.layers(b) for _ in range(config.repeats[b])]
            inputs = None
            for run, layer in enumerate(runs):
                query_types = types
                if cls_only and b == len(self.blocks) - 1 and run == len(runs) - 1:
                    query, query_types, inputs = query[:, :1], types[:, :1], None
                if inputs is None:
                    inputs = build.inputs(encodings, (b, query_types), keys, length)
                hidden = query = key_value = layer(query, key_value, inputs)
                states.append(hidden)
                if keys[0] != b:  # only the first run reads the former block
                    keys, inputs = (b, types, mask), None
        return states, mask


class FunnelDecoder(nn.Module):
    """Layers at full length behind the upsampled encoder. [b, l, d] -> the states after each layer, [b, l, d] each."""

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__()
        self.attention_inputs = AttentionInputsBuilder(config)
        self.layers = nn.ModuleList(FunnelLayer(config) for _ in range(config.num_decoder_layers))

    def forward(self, hidden: Tensor, mask: Tensor, token_type_ids: Tensor) -> list[Tensor]:
        length = hidden.shape[1]
        encodings = self.attention_inputs.distances(length, hidden.dtype, hidden.device)
        inputs = self.attention_inputs.inputs(encodings, (0, token_type_ids), (0, token_type_ids, mask), length)
        states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, hidden, inputs)
            states.append(hidden)
        return states

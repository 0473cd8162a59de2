"""BERT and BERT-like models (`model_type: bert`), read only: for languages and domains without a pretrained Funnel-Transformer.

A BERT layer is a Funnel layer without relative positions: the query's bias becomes r_w_bias, everything else is the same.
BERT adds position and token-type embeddings to its input; Funnel does not. What these add to every text is folded into the
word embeddings (`fold_embeddings`); what positions do to the attention is approximated by relative positions
(`PositionFit`). Token-type parameters start at zero.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funnel.errors import FunnelError
from funnel.model.attention import RelativeMultiHeadAttention, sinusoids
from funnel.model.config import MAX_SIZE, BlockSpec, FunnelConfig
from funnel.model.heads import FunnelBaseModel
from funnel.weights.huggingface import CONFIG, WEIGHT_FILES
from funnel.weights.key_map import (
    ConvertedWeights,
    Format,
    RawCheckpoint,
    check_exact_match,
    layer_name,
    meta_state_dict,
    rename,
)

TABLE = {
    "embeddings.word_embeddings.weight": "embeddings.word_embeddings.weight",
    "embeddings.LayerNorm.weight": "embeddings.layer_norm.weight",
    "embeddings.LayerNorm.bias": "embeddings.layer_norm.bias",
    "encoder.layer.{}.attention.self.query.weight": "layer.{}.attention.q_head.weight",
    "encoder.layer.{}.attention.self.query.bias": "layer.{}.attention.r_w_bias",
    "encoder.layer.{}.attention.self.key.weight": "layer.{}.attention.k_head.weight",
    "encoder.layer.{}.attention.self.key.bias": "layer.{}.attention.k_head.bias",
    "encoder.layer.{}.attention.self.value.weight": "layer.{}.attention.v_head.weight",
    "encoder.layer.{}.attention.self.value.bias": "layer.{}.attention.v_head.bias",
    "encoder.layer.{}.attention.output.dense.weight": "layer.{}.attention.post_proj.weight",
    "encoder.layer.{}.attention.output.dense.bias": "layer.{}.attention.post_proj.bias",
    "encoder.layer.{}.attention.output.LayerNorm.weight": "layer.{}.attention.layer_norm.weight",
    "encoder.layer.{}.attention.output.LayerNorm.bias": "layer.{}.attention.layer_norm.bias",
    "encoder.layer.{}.intermediate.dense.weight": "layer.{}.ffn.linear_1.weight",
    "encoder.layer.{}.intermediate.dense.bias": "layer.{}.ffn.linear_1.bias",
    "encoder.layer.{}.output.dense.weight": "layer.{}.ffn.linear_2.weight",
    "encoder.layer.{}.output.dense.bias": "layer.{}.ffn.linear_2.bias",
    "encoder.layer.{}.output.LayerNorm.weight": "layer.{}.ffn.layer_norm.weight",
    "encoder.layer.{}.output.LayerNorm.bias": "layer.{}.ffn.layer_norm.bias",
}
POSITIONS, TOKEN_TYPES = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"
LEFT_OUT = {
    "pooler.": "BERT's pooler; a Funnel classifier reads [CLS] directly",
    "cls.": "pretraining heads",
    "classifier.": "classifier of another task",
    "qa_outputs.": "question-answering head",
    "dropout.": "not part of the body",
    "embeddings.position_ids": "not a weight",
}
ADDED = ("r_r_bias", "r_s_bias", "r_kernel", "seg_embed")  # name endings of the weights that BERT does not have
NUM_POSITIONS = 32  # positions that are folded and fitted: the first ones matter most, and differ most from one another
NUM_TEXTS = 96  # random texts for the fit
MAX_DISTANCE = 512  # tokens; the fit covers the distances from -MAX_DISTANCE to MAX_DISTANCE


def parse_config(values: Mapping[str, Any], path: Path) -> FunnelConfig:
    """Converts BERT's config.json to an encoder of three blocks.

    Raises:
        FunnelError: a field is missing or invalid, or requires something that a Funnel-Transformer does not have.
    """
    for name, supported in (("position_embedding_type", "absolute"), ("is_decoder", False)):
        if values.get(name, supported) != supported:
            raise FunnelError(f"{path}: {name} {values[name]!r} is not supported, only {supported!r}")
    limits = dict.fromkeys(("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"), MAX_SIZE)
    for name, limit in {**limits, "num_hidden_layers": 999}.items():
        value = values.get(name)
        if type(value) is not int or not 1 <= value <= limit:
            raise FunnelError(f"{path}: invalid {name} {value!r}: expected an integer from 1 to {limit:,}")
    hidden_size, num_heads = values["hidden_size"], values["num_attention_heads"]
    if hidden_size % num_heads:
        raise FunnelError(f"{path}: hidden_size {hidden_size} is not divisible by num_attention_heads {num_heads}")
    fields = {
        "vocab_size": values["vocab_size"],
        "block_sizes": split_into_blocks(values["num_hidden_layers"]),
        "num_decoder_layers": 0,
        "d_model": hidden_size,
        "n_head": num_heads,
        "d_head": hidden_size // num_heads,
        "d_inner": values["intermediate_size"],
        "hidden_act": values.get("hidden_act", "gelu"),
        "hidden_dropout": values.get("hidden_dropout_prob", 0.1),
        "attention_dropout": values.get("attention_probs_dropout_prob", 0.1),
        "layer_norm_eps": values.get("layer_norm_eps", 1e-12),
    }
    return FunnelConfig.from_dict(fields, str(path))


def split_into_blocks(num_layers: int) -> list[int]:
    """Distributes layers over three blocks as evenly as possible, larger blocks first: 12 -> 4, 4, 4."""
    num_blocks = min(3, num_layers)
    return [num_layers // num_blocks + (block < num_layers % num_blocks) for block in range(num_blocks)]


def convert(raw: RawCheckpoint) -> ConvertedWeights:
    """Renames the layers, folds the embeddings and fits the relative positions.

    Raises:
        FunnelError: the weights do not match the config, or there is no tokenizer (the fold needs the id of [CLS]).
    """
    config = raw.config
    flat = config.replace(blocks=(BlockSpec(sum(block.layers for block in config.blocks)),))  # like BERT: no pooling
    tensors = {_modern_name(name): tensor.float() for name, tensor in raw.tensors.items()}  # the fit needs float32
    unused = {name: reason for name in tensors for prefix, reason in LEFT_OUT.items() if name.startswith(prefix)}
    embeddings = {name: tensors[name] for name in (POSITIONS, TOKEN_TYPES) if name in tensors}
    weights = {
        rename(name, TABLE, flat.blocks) or name: tensor
        for name, tensor in tensors.items()
        if name not in unused and name not in embeddings
    }
    expected = meta_state_dict("FunnelBaseModel", flat)
    for name in expected:
        if name.endswith("r_w_bias") and name in weights and weights[name].numel() == expected[name].numel():
            weights[name] = weights[name].reshape(expected[name].shape)
    added = [name for name in expected if name.endswith(ADDED)]
    check_exact_match(weights, {name: expected[name] for name in expected if name not in added}, raw.folder)
    _check_embeddings(embeddings, config.d_model, raw.folder)

    model = FunnelBaseModel(flat).eval()
    model.load_state_dict({**weights, **{name: torch.zeros(expected[name].shape) for name in added}})
    if raw.tokenizer is None:
        raise FunnelError(
            f"{raw.folder}: no tokenizer found, but converting a BERT requires the id of [CLS]; "
            "copy the model's tokenizer.json or vocab.txt into the folder"
        )
    cls_id = raw.tokenizer.cls_id
    bert_embeddings = BertEmbeddings(
        model.embeddings.word_embeddings.weight.detach().clone(), embeddings[POSITIONS], embeddings[TOKEN_TYPES][0]
    )
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.copy_(fold_embeddings(bert_embeddings, cls_id))
        PositionFit(model, bert_embeddings, cls_id, raw.folder).run()

    converted = {
        re.sub(r"^encoder\.blocks\.0\.(\d+)", lambda layer: layer_name(int(layer[1]), config.blocks), name): tensor
        for name, tensor in model.state_dict().items()
    }
    unused |= dict.fromkeys(embeddings, "folded into the word embeddings and the relative positions")
    zero, fitted = "initialized to zero: token types have no effect until trained", "fitted to BERT's position embeddings"
    initialized = {name: zero for name in converted if name.endswith(("r_s_bias", "seg_embed"))}
    initialized |= {name: fitted for name in converted if name.endswith(("r_r_bias", "r_kernel"))}
    return ConvertedWeights(config, converted, "FunnelBaseModel", unused, initialized)


def _modern_name(name: str) -> str:
    """The name without the prefix of a model with a head, and with the current names of LayerNorm's parameters."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _check_embeddings(embeddings: Mapping[str, Tensor], d_model: int, source: Path) -> None:
    for name in (POSITIONS, TOKEN_TYPES):
        if name not in embeddings:
            raise FunnelError(f"{source}: weights and config do not match: missing {name}")
        shape = embeddings[name].shape
        if len(shape) != 2 or shape[0] < 2 or shape[1] != d_model:
            raise FunnelError(f"{source}: weight {name} has shape {list(shape)}; expected [2 or more, {d_model}]")


@dataclass(frozen=True)
class BertEmbeddings:
    """BERT's input embeddings: words [vocab_size, d_model], positions [p, d_model], token type 0 [d_model]."""

    words: Tensor
    positions: Tensor
    token_type: Tensor


def fold_embeddings(bert: BertEmbeddings, cls_id: int) -> Tensor:
    """Adds position and token-type embeddings to the word embeddings. [vocab_size, d_model].

    [CLS] gets position 0; all other words get the mean of the following positions.
    """
    folded = bert.words + bert.positions[1:NUM_POSITIONS].mean(0) + bert.token_type
    folded[cls_id] = bert.words[cls_id] + bert.positions[0] + bert.token_type
    return folded


class PositionFit:
    """Fits every layer's r_kernel and r_r_bias to the effect of BERT's position embeddings on its attention scores.

    Random texts run through the layers twice: with BERT's embeddings, and with the folded ones and the relative positions
    fitted so far. In each layer, the difference of the two content scores, averaged over texts and over all pairs at the
    same distance, is the target of a least-squares fit on the sines and cosines of the distance. Scores are taken relative
    to that of [CLS], which has no relative position here. A head's position score is (q + r_r_bias) . r_kernel R: r_kernel
    lies in the direction in which the head's queries are smallest, and r_r_bias is large in that direction, so that the score
    is nearly the same for all queries.

    Args:
        model: a single block with the folded word embeddings and zero r_kernel and r_r_bias; changed in place.
        bert: the source's embeddings.
        cls_id: id of [CLS].
        source: where the weights come from, for error messages.
    """

    def __init__(self, model: FunnelBaseModel, bert: BertEmbeddings, cls_id: int, source: Path) -> None:
        self.model, self.source = model, source
        config = model.config
        self.length = min(NUM_POSITIONS, len(bert.positions))
        self.ids = torch.randint(
            config.vocab_size, (NUM_TEXTS, self.length), generator=torch.Generator().manual_seed(0)
        )  # [b, l]
        self.ids[:, 0] = cls_id
        self.bert_input = bert.words[self.ids] + bert.positions[: self.length] + bert.token_type  # [b, l, d]

        self.distances = torch.arange(MAX_DISTANCE, -MAX_DISTANCE - 1, -1)  # [t]
        encodings = torch.cat(sinusoids(self.distances.float(), config.d_model), dim=1)  # [t, d]
        # Short distances weigh most: sinusoids of at most one radian per token cannot fit all of the 1000 distances exactly.
        self.weighted = encodings / (1 + self.distances.abs().unsqueeze(1) / 8) ** 2
        self.gram = self.weighted.T @ encodings
        self.gram += 1e-4 * self.gram.diagonal().mean() * torch.eye(config.d_model)

    def run(self) -> None:
        """Fits all layers, each one just before it runs.

        Raises:
            FunnelError: attention scores overflow.
        """
        model = self.model
        mask, token_types = torch.ones_like(self.ids, dtype=torch.bool), torch.zeros_like(self.ids)
        # Before the fit, the layers compute exactly what BERT's do.
        bert_states, _ = model.encoder(model.embeddings.layer_norm(self.bert_input), mask, token_types)
        layers = [model.get_submodule(f"encoder.blocks.0.{i}") for i in range(model.config.blocks[0].layers)]
        hooks = [
            layer.register_forward_pre_hook(_FitHook(self, number, bert_state))
            for number, (layer, bert_state) in enumerate(zip(layers, bert_states[:-1], strict=True))
        ]
        try:
            model.encoder(model.embeddings(self.ids), mask, token_types)
        finally:
            for hook in hooks:
                hook.remove()

    def fit_layer(self, number: int, attention: RelativeMultiHeadAttention, bert_state: Tensor, state: Tensor) -> None:
        """Fits one layer; the states are its inputs, [b, l, d]."""
        config, length = self.model.config, self.length
        difference = (content_scores(attention, bert_state) - content_scores(attention, state)).mean(0)  # [h, q, k]
        difference = difference[:, 1:]  # without [CLS] as the query
        difference = difference[:, :, 1:] - difference[:, :, :1]  # softmax ignores what all keys have in common
        by_distance = torch.stack([difference.diagonal(-d, 1, 2).mean(1) for d in range(2 - length, length - 1)], dim=1)
        index = self.distances.clamp(-(length // 2), length // 2) + length - 2  # few pairs are farther apart
        target = by_distance[:, index] * math.sqrt(config.d_head)  # [h, t]
        kernel = torch.linalg.solve(self.gram, self.weighted.T @ target.T)  # [d, h]

        queries = attention.q_head(state[:, 1:]).unflatten(-1, (config.n_head, config.d_head)).flatten(0, 1)
        moments = torch.einsum("nhi,nhj->hij", queries, queries) / len(queries)
        if not (moments.isfinite().all() and kernel.isfinite().all()):
            raise FunnelError(f"{self.source}: the attention scores of layer {number} overflow; the weights are damaged")
        eigenvalues, directions = torch.linalg.eigh(moments)  # ascending
        direction = directions[:, :, 0]  # [h, d_head]
        size = (8 * eigenvalues[:, :1].clamp(min=0).sqrt()).clamp(min=0.5)  # [h, 1]
        attention.r_r_bias.copy_(size * direction)
        attention.r_kernel.copy_(torch.einsum("dh,hi->dhi", kernel, direction / size))


@dataclass(frozen=True)
class _FitHook:
    """Forward pre-hook that fits a layer to its actual input."""

    fit: PositionFit
    number: int
    bert_state: Tensor

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        attention = layer.get_submodule("attention")
        assert isinstance(attention, RelativeMultiHeadAttention)
        self.fit.fit_layer(self.number, attention, self.bert_state, inputs[0])


def content_scores(attention: RelativeMultiHeadAttention, hidden: Tensor) -> Tensor:
    """Attention scores without positions and token types. [b, l, d] -> [b, h, q, k]."""
    heads = (attention.n_head, attention.d_head)
    query = attention.q_head(hidden).unflatten(-1, heads) + attention.r_w_bias
    key = attention.k_head(hidden).unflatten(-1, heads)
    return torch.einsum("bqhd,bkhd->bhqk", query, key) * attention.scale


FORMAT = Format("BERT", CONFIG, WEIGHT_FILES, parse_config, convert)

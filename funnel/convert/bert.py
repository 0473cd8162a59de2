"""BERT and its kin (any `model_type: bert`): for languages and domains that have a BERT and no Funnel. Read only.

A BERT layer is a Funnel layer without relative positions: the query's bias is r_w_bias, the rest carries over as it is.
BERT adds position and token-type embeddings to its input; a Funnel has none. What every text has of them is folded into
the word embeddings: position 0 into [CLS], which stands nowhere else, the mean of the other positions into every other
word, and token type 0 into all. The parameters of relative positions and token types start at zero: they add nothing to
the scores until training gives them something to say.
"""

from pathlib import Path

import torch
from torch import Tensor

from funnel import checkpoint
from funnel.config import FunnelConfig, read_json
from funnel.convert.huggingface import CONFIG, WEIGHTS
from funnel.convert.source import Source, first_file, model_state, rename, require_exactly
from funnel.errors import FunnelError
from funnel.tokenizer import FunnelTokenizer

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
FOLDED = ("embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight")
LEFT_OUT = {
    "pooler.": "BERT's pooler: a Funnel classifier reads [cls] itself",
    "cls.": "BERT's pretraining heads",
    "classifier.": "the classifier of the task that it was trained for",
    "dropout.": "no weights of the body",
    "embeddings.position_ids": "a count from 0 up, no weights",
}


def recognises(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("model_type") == "bert"


def read(folder: Path) -> Source:
    """Reads the layers as an encoder of three blocks, as equal as can be.

    Raises:
        FunnelError: a file is missing or damaged, the weights do not fit the config, or the config asks for something
            that a Funnel has no place for (relative or no positions, a decoder).
    """
    path = folder / CONFIG
    values = read_json(path)
    for name, only in (("position_embedding_type", "absolute"), ("is_decoder", False)):
        if values.get(name, only) != only:
            raise FunnelError(f"{path}: {name} is {values[name]!r}; only {only!r} can become a Funnel")
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for name in needed:
        if not isinstance(values.get(name), int) or values[name] < 1:
            raise FunnelError(f"{path}: {name} is {values.get(name)!r}; it takes a whole number from 1 up")
    config = FunnelConfig.from_dict(
        {
            "vocab_size": values["vocab_size"],
            "block_sizes": three_blocks(values["num_hidden_layers"]),
            "num_decoder_layers": 0,
            "d_model": values["hidden_size"],
            "n_head": values["num_attention_heads"],
            "d_head": values["hidden_size"] // values["num_attention_heads"],
            "d_inner": values["intermediate_size"],
            "hidden_act": values.get("hidden_act", "gelu"),
            "hidden_dropout": values.get("hidden_dropout_prob", 0.1),
            "attention_dropout": values.get("attention_probs_dropout_prob", 0.1),
            "layer_norm_eps": values.get("layer_norm_eps", 1e-12),
            "pad_token_id": values.get("pad_token_id") or 0,
        },
        str(path),
    )
    weights = {_plain(n): t for n, t in checkpoint.read_weights(first_file(folder, WEIGHTS)).items()}
    left_out = {n: why for n in weights for start, why in LEFT_OUT.items() if n.startswith(start)}
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name not in left_out and name not in FOLDED:
            ours[rename(name, TABLE, config.block_sizes) or name] = tensor

    expected = model_state("FunnelBaseModel", config)
    if missing := [n for n in FOLDED if n not in weights]:
        raise FunnelError(f"{folder}: weights and config do not fit: missing {', '.join(missing)}")
    made = {}
    for name, tensor in expected.items():
        if name.endswith("r_w_bias") and name in ours and ours[name].numel() == tensor.numel():
            ours[name] = ours[name].reshape(tensor.shape)
        elif name.endswith(("r_r_bias", "r_s_bias", "r_kernel", "seg_embed")):
            ours[name] = torch.zeros(tensor.shape)
            made[name] = "zero: relative positions and token types add nothing until trained"
    require_exactly(ours, expected, folder)
    words = "embeddings.word_embeddings.weight"
    ours[words] = _fold(ours[words], weights[FOLDED[0]], weights[FOLDED[1]], FunnelTokenizer.load(folder).cls_id)
    left_out[FOLDED[0]] = left_out[FOLDED[1]] = "folded into the word embeddings"
    return Source("BERT", folder, config, ours, "FunnelBaseModel", left_out, made)


def _plain(name: str) -> str:
    """A name without the prefix of a model with a head, and with today's names of LayerNorm's parameters."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _fold(words: Tensor, positions: Tensor, token_types: Tensor, cls_id: int) -> Tensor:
    folded = words + positions[1:].mean(0) + token_types[0]
    folded[cls_id] = words[cls_id] + positions[0] + token_types[0]
    return folded


def three_blocks(layers: int) -> tuple[int, ...]:
    """The layers of a flat network as blocks, as equal as can be, the longer ones first: 12 as 4,4,4."""
    blocks = min(3, layers)
    return tuple(layers // blocks + (b < layers % blocks) for b in range(blocks))

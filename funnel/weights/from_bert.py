"""BERT and its kin (any `model_type: bert`): for languages and domains that have a BERT and no Funnel. Read only.

A BERT layer is a Funnel layer without relative positions: the query's bias is r_w_bias, the rest carries over as it is.
BERT adds position and token-type embeddings to its input; a Funnel has none. What every text has of them is folded into
the word embeddings: position 0 into [CLS], which stands nowhere else, the mean of the positions behind it (of the first
`NEAR`, where most texts are) into every other word, and token type 0 into all.

What the positions did to BERT's attention is measured and given to the relative positions, so that word order counts
from the first step (`fit_positions`). The parameters of token types start at zero.
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from funnel.model import checkpoint
from funnel.model.attention import RelativeMultiHeadAttention, sinusoids
from funnel.io import read_json
from funnel.model.config import LARGEST, FunnelConfig
from funnel.weights.huggingface import CONFIG, WEIGHTS
from funnel.weights.key_map import Source, first_file, model_state, place, rename, check_exact_match
from funnel.errors import FunnelError
from funnel.model.heads import FunnelBaseModel
from funnel.data.tokenizer import FunnelTokenizer

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
NEAR = 32  # tokens of a text whose positions are folded and fitted: BERT's first positions differ most, and matter most
FOLDED = ("embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight")
LEFT_OUT = {
    "pooler.": "BERT's pooler: a Funnel classifier reads [cls] itself",
    "cls.": "BERT's pretraining heads",
    "classifier.": "the classifier of the task that it was trained for",
    "qa_outputs.": "its head for answers",
    "dropout.": "no weights of the body",
    "embeddings.position_ids": "a count from 0 up, no weights",
}


def is_format(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("model_type") == "bert"


def read(folder: Path) -> Source:
    """Reads the layers as an encoder of three blocks, as equal as can be.

    Raises:
        FunnelError: a file is missing or damaged, the weights do not fit the config, or the config asks for something
            that a Funnel has no place for (relative or no positions, a decoder).
    """
    config = read_config(folder)
    flat = config.replace(block_sizes=(sum(config.block_sizes),))  # one block: BERT as it is
    weights = {  # in float32: the fit below needs more than half precision
        _plain(name): tensor.float() for name, tensor in checkpoint.read_weights(first_file(folder, WEIGHTS)).items()
    }
    left_out = {n: why for n in weights for start, why in LEFT_OUT.items() if n.startswith(start)}
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name not in left_out and name not in FOLDED:
            ours[rename(name, TABLE, flat.block_sizes) or name] = tensor

    expected = model_state("FunnelBaseModel", flat)
    if missing := [n for n in FOLDED if n not in weights]:
        raise FunnelError(f"{folder}: weights and config do not fit: missing {', '.join(missing)}")
    for name, tensor in expected.items():
        if name.endswith("r_w_bias") and name in ours and ours[name].numel() == tensor.numel():
            ours[name] = ours[name].reshape(tensor.shape)
    added = [name for name in expected if name.endswith(("r_r_bias", "r_s_bias", "r_kernel", "seg_embed"))]
    check_exact_match(ours, {name: tensor for name, tensor in expected.items() if name not in added}, folder)
    ours |= {name: torch.zeros(expected[name].shape) for name in added}

    words = ours["embeddings.word_embeddings.weight"]
    positions, token_types = (weights[name] for name in FOLDED)
    for name, tensor in zip(FOLDED, (positions, token_types), strict=True):
        if tensor.dim() != 2 or tensor.shape[1] != config.d_model or len(tensor) < 2:
            raise FunnelError(f"{folder}: weight {name} has shape {list(tensor.shape)}, not [2 or more, {config.d_model}]")
    cls_id = FunnelTokenizer.load(folder).fitting(len(words), folder).cls_id
    ours["embeddings.word_embeddings.weight"] = fold(words, positions, token_types, cls_id)
    model = FunnelBaseModel(flat).eval()
    model.load_state_dict(ours)
    fit_positions(model, words, positions, token_types, cls_id, folder)

    blocks = {
        re.sub(r"^encoder\.blocks\.0\.(\d+)", lambda m: place(int(m[1]), config.block_sizes), name): tensor
        for name, tensor in model.state_dict().items()
    }
    left_out |= dict.fromkeys(FOLDED, "folded into the word embeddings and the relative positions")
    made = {n: "zero: token types add nothing until trained" for n in blocks if n.endswith(("r_s_bias", "seg_embed"))}
    made |= {n: "fitted to the source's position scores" for n in blocks if n.endswith(("r_r_bias", "r_kernel"))}
    return Source("BERT", folder, config, blocks, "FunnelBaseModel", left_out, made)


def read_config(folder: Path) -> FunnelConfig:
    """BERT's config.json as an encoder's config.

    Raises:
        FunnelError: it is missing or damaged, or asks for something that a Funnel has no place for.
    """
    path = folder / CONFIG
    values = read_json(path)
    for name, only in (("position_embedding_type", "absolute"), ("is_decoder", False)):
        if values.get(name, only) != only:
            raise FunnelError(f"{path}: {name} is {values[name]!r}; only {only!r} can become a Funnel")
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for name in needed:
        value = values.get(name)
        if type(value) is not int or not 1 <= value <= (999 if name == "num_hidden_layers" else LARGEST):
            raise FunnelError(f"{path}: {name} is {value!r}, which no BERT has")
    if values["hidden_size"] % values["num_attention_heads"]:
        raise FunnelError(
            f"{path}: hidden_size {values['hidden_size']} cannot be shared among {values['num_attention_heads']} heads"
        )
    return FunnelConfig.from_dict(
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
        },
        str(path),
    )


def _plain(name: str) -> str:
    """A name without the prefix of a model with a head, and with today's names of LayerNorm's parameters."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def fold(words: Tensor, positions: Tensor, token_types: Tensor, cls_id: int) -> Tensor:
    """Word embeddings with what every text has of position and token-type embeddings. [vocab_size, d_model]."""
    folded = words + positions[1:NEAR].mean(0) + token_types[0]
    folded[cls_id] = words[cls_id] + positions[0] + token_types[0]
    return folded


@torch.no_grad()
def fit_positions(
    model: FunnelBaseModel, words: Tensor, positions: Tensor, token_types: Tensor, cls_id: int, folder: Path
) -> None:
    """Fits r_kernel and r_r_bias of every layer to what position embeddings did to the source's attention scores.

    Random words run through the layers twice: with BERT's position embeddings, and without them but with the relative
    positions fitted so far. In each layer the target of a least-squares fit, on the sines and cosines of the distance, is
    the difference of the two attention scores: against that to [cls], which has no relative position here, and its mean
    over texts and over all pairs at the same distance. A head's position score is (q + r_r_bias) . r_kernel R: r_kernel
    is given the direction in which the head's queries vary least, and r_r_bias lies in that direction, large beside that
    variation, so that the score is nearly the same for all queries.

    Args:
        model: one block, with the folded word embeddings; its r_kernel and r_r_bias are overwritten.
        words, positions, token_types: the source's embeddings.
        folder: where they come from, for the error.

    Raises:
        FunnelError: the source's hidden states overflow.
    """
    config = model.config
    length, texts, far = min(NEAR, len(positions)), 96, 512
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (texts, length), generator=generator)
    ids[:, 0] = cls_id
    mask, types = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids)

    # Near distances count most: sines no faster than one radian a token cannot follow every step of 1000 distances.
    distances = torch.arange(far, -far - 1, -1)
    encodings = torch.cat(sinusoids(distances.float(), config.d_model), dim=1)  # [t, d_model]
    weighted = encodings / (1 + distances.abs().unsqueeze(1) / 8) ** 2
    gram = weighted.T @ encodings
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(config.d_model)

    build = model.encoder.attention_inputs
    inputs = build.inputs(build.distances(length, words.dtype, words.device), (0, types), (0, types, mask), length)
    theirs = model.embeddings.layer_norm(words[ids] + positions[:length] + token_types[0])
    ours = model.embeddings(ids)
    for number, layer in enumerate(model.encoder.layers(0)):
        attention = layer.attention
        absolute = _content_scores(attention, theirs)
        theirs = layer(theirs, theirs, inputs)  # before the fit, this is BERT's own layer
        difference = (absolute - _content_scores(attention, ours)).mean(0)[:, 1:]  # [h, q, k], without [cls] as a query
        difference = difference[:, :, 1:] - difference[:, :, :1]  # what all keys have in common changes no weight
        by_distance = torch.stack([difference.diagonal(-d, 1, 2).mean(1) for d in range(2 - length, length - 1)], dim=1)
        at = distances.clamp(-(length // 2), length // 2) + length - 2  # beyond, too few pairs to tell: as at the edge
        target = by_distance[:, at] * math.sqrt(config.d_head)  # [h, t]
        kernel = torch.linalg.solve(gram, weighted.T @ target.T)  # [d_model, h]

        queries = attention.q_head(ours[:, 1:]).unflatten(-1, (config.n_head, config.d_head)).flatten(0, 1)
        moments = torch.einsum("nhi,nhj->hij", queries, queries) / len(queries)
        if not (moments.isfinite().all() and kernel.isfinite().all()):
            raise FunnelError(f"{folder}: the attention scores of layer {number} overflow: its weights are damaged")
        variance, directions = torch.linalg.eigh(moments)
        least = directions[:, :, 0]  # [h, d_head]; eigenvalues ascend
        size = (8 * variance[:, :1].clamp(min=0).sqrt()).clamp(min=0.5)  # [h, 1]
        attention.r_r_bias.copy_(size * least)
        attention.r_kernel.copy_(torch.einsum("dh,hi->dhi", kernel, least / size))
        ours = layer(ours, ours, inputs)


def _content_scores(attention: RelativeMultiHeadAttention, hidden: Tensor) -> Tensor:
    """Scores of queries and keys without positions, [b, h, q, k]."""
    heads = (attention.n_head, attention.d_head)
    query = attention.q_head(hidden).unflatten(-1, heads) + attention.r_w_bias
    key = attention.k_head(hidden).unflatten(-1, heads)
    return torch.einsum("bqhd,bkhd->bhqk", query, key) * attention.scale


def three_blocks(layers: int) -> tuple[int, ...]:
    """The layers of a flat network as blocks, as equal as can be, the longer ones first: 12 as 4,4,4."""
    blocks = min(3, layers)
    return tuple(layers // blocks + (b < layers % blocks) for b in range(blocks))

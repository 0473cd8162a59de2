"""The original authors' PyTorch format, read only: model.pt, net_config.pytorch.json, vocab.uncased.txt.

Layers are numbered consecutively across blocks, attention and feed-forward separately. Matrices are stored as
[inputs, outputs], those of the attention with separate axes for n_head and d_head. The released archives contain the encoder;
a fine-tuned model also has the classifier. Two settings are command-line options of the original code and not in its config
file: the attention type, which does not change results, and `truncate_seq`, which all of the authors' scripts set.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from funnel.errors import FunnelError
from funnel.model.config import FunnelConfig, parse_blocks
from funnel.weights.key_map import ConvertedWeights, Format, RawCheckpoint, check_exact_match, meta_state_dict, rename

CONFIG, WEIGHTS = "net_config.pytorch.json", "model.pt"

TABLE = {
    "input_layer.0.lookup_table": "embeddings.word_embeddings.weight",
    "input_layer.1.weight": "embeddings.layer_norm.weight",
    "input_layer.1.bias": "embeddings.layer_norm.bias",
    "attn_layers.{}.q_head.weight": "layer.{}.attention.q_head.weight",
    "attn_layers.{}.k_head.weight": "layer.{}.attention.k_head.weight",
    "attn_layers.{}.k_head.bias": "layer.{}.attention.k_head.bias",
    "attn_layers.{}.v_head.weight": "layer.{}.attention.v_head.weight",
    "attn_layers.{}.v_head.bias": "layer.{}.attention.v_head.bias",
    "attn_layers.{}.r_w_bias": "layer.{}.attention.r_w_bias",
    "attn_layers.{}.r_r_bias": "layer.{}.attention.r_r_bias",
    "attn_layers.{}.r_s_bias": "layer.{}.attention.r_s_bias",
    "attn_layers.{}.r_kernel": "layer.{}.attention.r_kernel",
    "attn_layers.{}.seg_embed": "layer.{}.attention.seg_embed",
    "attn_layers.{}.post_proj.weight": "layer.{}.attention.post_proj.weight",
    "attn_layers.{}.post_proj.bias": "layer.{}.attention.post_proj.bias",
    "attn_layers.{}.layer_norm.weight": "layer.{}.attention.layer_norm.weight",
    "attn_layers.{}.layer_norm.bias": "layer.{}.attention.layer_norm.bias",
    "pffn_layers.{}.pffn.0.weight": "layer.{}.ffn.linear_1.weight",
    "pffn_layers.{}.pffn.0.bias": "layer.{}.ffn.linear_1.bias",
    "pffn_layers.{}.pffn.3.weight": "layer.{}.ffn.linear_2.weight",
    "pffn_layers.{}.pffn.3.bias": "layer.{}.ffn.linear_2.bias",
    "pffn_layers.{}.layer_norm.weight": "layer.{}.ffn.layer_norm.weight",
    "pffn_layers.{}.layer_norm.bias": "layer.{}.ffn.layer_norm.bias",
    "cls_head.0.weight": "classifier.linear_hidden.weight",
    "cls_head.0.bias": "classifier.linear_hidden.bias",
    "cls_head.3.weight": "classifier.linear_out.weight",
    "cls_head.3.bias": "classifier.linear_out.bias",
}

# Conversions of tensors that are stored in another shape, by a regular expression for the end of our name.
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    r"[qkv]_head\.weight": lambda w: w.flatten(1).T,  # [d_model, n_head, d_head] -> [n_head * d_head, d_model]
    r"[kv]_head\.bias": lambda w: w.flatten(),  # [n_head, d_head] -> [n_head * d_head]
    r"post_proj\.weight": lambda w: w.flatten(0, -2).T,  # [n_head, d_head, d_model] -> [d_model, n_head * d_head]
    r"linear_\w+\.weight": lambda w: w.T,  # [inputs, outputs] -> [outputs, inputs]
}

# Our config fields -> fields of net_config.pytorch.json.
FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "n_head": "n_head",
    "d_head": "d_head",
    "d_inner": "d_inner",
    "hidden_dropout": "dropout",
    "attention_dropout": "dropatt",
    "activation_dropout": "dropact",
    "pooling_type": "pooling_type",
    "separate_cls": "separate_cls",
    "pool_q_only": "pool_q_only",
}


def parse_config(values: Mapping[str, Any], path: Path) -> FunnelConfig:
    """Converts net_config.pytorch.json, which has no labels.

    Raises:
        FunnelError: a field is missing, invalid, or has a value that is not supported.
    """
    if missing := [name for name in [*FIELDS.values(), "block_size"] if name not in values]:
        raise FunnelError(f"{path}: missing field {missing[0]!r}")
    for name, supported in (("pooling_size", 2), ("d_embed", values["d_model"])):
        if values.get(name, supported) != supported:
            raise FunnelError(f"{path}: {name} {values[name]!r} is not supported, only {supported!r}")
    try:
        blocks = parse_blocks(str(values["block_size"]))
    except FunnelError:
        raise FunnelError(
            f"{path}: invalid block_size {values['block_size']!r}: expected layer counts such as 4_4_4 or 6_3x2_3x2"
        ) from None
    sizes = {"block_sizes": [block.layers for block in blocks], "block_repeats": [block.repeats for block in blocks]}
    renamed = {field: values[name] for field, name in FIELDS.items()}
    return FunnelConfig.from_dict({**renamed, **sizes, "num_decoder_layers": 0}, str(path))


def convert(raw: RawCheckpoint) -> ConvertedWeights:
    """Renames and reshapes the encoder, and the classifier if there is one.

    Raises:
        FunnelError: the weights do not match the config.
    """
    config, weights = raw.config, {}
    for name, tensor in raw.tensors.items():
        renamed = rename(name, TABLE, config.blocks) or name
        try:
            weights[renamed] = _transform(renamed, tensor).contiguous()
        except (IndexError, RuntimeError):  # too few dimensions
            raise FunnelError(f"{raw.folder / WEIGHTS}: weight {name} has an invalid shape {list(tensor.shape)}") from None
    architecture = "FunnelBaseModel"
    if "classifier.linear_out.bias" in weights:
        architecture = "FunnelForSequenceClassification"
        labels = range(weights["classifier.linear_out.bias"].numel())
        problem_type = "regression" if len(labels) == 1 else "single_label_classification"
        config = config.replace(id2label={label: f"LABEL_{label}" for label in labels}, problem_type=problem_type)
    check_exact_match(weights, meta_state_dict(architecture, config), raw.folder)
    return ConvertedWeights(config, weights, architecture)


def _transform(name: str, tensor: Tensor) -> Tensor:
    for ending, transform in TRANSFORMS.items():
        if re.search(ending + "$", name):
            return transform(tensor)
    return tensor


FORMAT = Format("original", CONFIG, (WEIGHTS,), parse_config, convert)

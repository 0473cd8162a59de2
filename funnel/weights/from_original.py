"""The original authors' PyTorch format: model.pt, net_config.pytorch.json, vocab.uncased.txt. Read only.

Layers are counted from first to last; a layer's attention and feed-forward are format_list apart. Matrices are stored
[inputs, outputs], those of the attention with heads and width as two axes. The released archives hold the encoder; a
fine-tuned model has the classifier too. Two settings are not in the config file but on the original's command line:
attention type (which makes no difference to the result) and `truncate_seq` (true in all the authors' scripts).
"""

import re
from pathlib import Path

from torch import Tensor

from funnel.model import checkpoint
from funnel.io import read_json
from funnel.model.config import FunnelConfig, parse_blocks
from funnel.weights.key_map import Source, Transform, model_state, rename, check_exact_match
from funnel.errors import FunnelError

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

# What is stored another way than ours, by the end of our name.
TRANSFORMS: dict[str, Transform] = {
    r"[qkv]_head\.weight": lambda w: w.flatten(1).T,  # [d_model, n_head, d_head] -> [n_head * d_head, d_model]
    r"[kv]_head\.bias": lambda w: w.flatten(),  # [n_head, d_head] -> [n_head * d_head]
    r"post_proj\.weight": lambda w: w.flatten(0, -2).T,  # [n_head, d_head, d_model] -> [d_model, n_head * d_head]
    r"linear_\w+\.weight": lambda w: w.T,  # [inputs, outputs] -> [outputs, inputs]
}

# Fields of net_config.pytorch.json by our names.
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


def is_format(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file()


def read(folder: Path) -> Source:
    """Reads the encoder, and the classifier where there is one.

    Raises:
        FunnelError: a file is missing or damaged, or the two do not fit main_process_first.
    """
    config = read_config(folder)
    weights = checkpoint.read_weights(folder / WEIGHTS)
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        renamed = rename(name, TABLE, config.block_sizes) or name
        for ending, transform in TRANSFORMS.items():
            if re.search(ending + "$", renamed):
                try:
                    tensor = transform(tensor)
                except (IndexError, RuntimeError):
                    raise FunnelError(
                        f"{folder / WEIGHTS}: weight {name} has the impossible shape {list(tensor.shape)}"
                    ) from None
        ours[renamed] = tensor.contiguous()
    outputs = ours.get("classifier.linear_out.bias")
    if outputs is not None:
        config = config.replace(id2label={i: f"LABEL_{i}" for i in range(outputs.numel())})
    architecture = "FunnelBaseModel" if outputs is None else "FunnelForSequenceClassification"
    check_exact_match(ours, model_state(architecture, config), folder)
    return Source("original", folder, config, ours, architecture)


def read_config(folder: Path) -> FunnelConfig:
    """net_config.pytorch.json as our config; it says nothing of labels.

    Raises:
        FunnelError: it is missing, damaged, or of a network that is no Funnel of ours.
    """
    path = folder / CONFIG
    values = read_json(path)
    if missing := [theirs for theirs in [*FIELDS.values(), "block_size"] if theirs not in values]:
        raise FunnelError(f"{path}: lacks the field {missing[0]!r}")
    for name, only in (("pooling_size", 2), ("d_embed", values["d_model"])):
        if values.get(name, only) != only:
            raise FunnelError(f"{path}: {name} is {values[name]!r}; only {only!r} is supported")
    try:
        sizes, repeats = parse_blocks(str(values["block_size"]))
    except FunnelError:
        raise FunnelError(f"{path}: block_size {values['block_size']!r} is no layout such as 4_4_4 or 6_3x2_3x2") from None
    return FunnelConfig.from_dict(
        {
            **{our: values[their] for our, their in FIELDS.items()},
            "block_sizes": sizes,
            "block_repeats": repeats,
            "num_decoder_layers": 0,
        },
        str(path),
    )

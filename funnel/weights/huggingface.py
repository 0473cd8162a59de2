"""transformers' format, both ways: config.json (model_type funnel) beside model.safetensors or pytorch_model.bin.

The hub's funnel-transformer/* come from bare models, whose names have no prefix; a model with a head has "funnel." before
the names of its body. The table is for the names without it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funnel.model import checkpoint
from funnel.model.checkpoint import BODY, Checkpoint
from funnel.io import read_json, write_json
from funnel.model.config import FunnelConfig
from funnel.weights.key_map import Source, first_file, model_state, rename, check_exact_match
from funnel.errors import FunnelError
from funnel.model.heads import MODELS

PREFIX = "funnel."
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

_LAYER = (
    "attention.q_head.weight",
    "attention.k_head.weight",
    "attention.k_head.bias",
    "attention.v_head.weight",
    "attention.v_head.bias",
    "attention.r_w_bias",
    "attention.r_r_bias",
    "attention.r_s_bias",
    "attention.r_kernel",
    "attention.seg_embed",
    "attention.post_proj.weight",
    "attention.post_proj.bias",
    "attention.layer_norm.weight",
    "attention.layer_norm.bias",
    "ffn.linear_1.weight",
    "ffn.linear_1.bias",
    "ffn.linear_2.weight",
    "ffn.linear_2.bias",
    "ffn.layer_norm.weight",
    "ffn.layer_norm.bias",
)

# Theirs to ours. Both follow the paper's names, so a layer's are the same.
TABLE = {
    "embeddings.word_embeddings.weight": "embeddings.word_embeddings.weight",
    "embeddings.layer_norm.weight": "embeddings.layer_norm.weight",
    "embeddings.layer_norm.bias": "embeddings.layer_norm.bias",
    **{f"encoder.blocks.{{}}.{{}}.{name}": f"encoder.blocks.{{}}.{{}}.{name}" for name in _LAYER},
    **{f"decoder.layers.{{}}.{name}": f"decoder.layers.{{}}.{name}" for name in _LAYER},
    "classifier.linear_hidden.weight": "classifier.linear_hidden.weight",
    "classifier.linear_hidden.bias": "classifier.linear_hidden.bias",
    "classifier.linear_out.weight": "classifier.linear_out.weight",
    "classifier.linear_out.bias": "classifier.linear_out.bias",
    "classifier.weight": "classifier.weight",
    "classifier.bias": "classifier.bias",
    "lm_head.bias": "lm_bias",
    "discriminator_predictions.dense.weight": "dense.weight",
    "discriminator_predictions.dense.bias": "dense.bias",
    "discriminator_predictions.dense_prediction.weight": "dense_prediction.weight",
    "discriminator_predictions.dense_prediction.bias": "dense_prediction.bias",
    "qa_outputs.weight": "qa_outputs.weight",
    "qa_outputs.bias": "qa_outputs.bias",
}
BACK = {ours: theirs for theirs, ours in TABLE.items()}


def is_format(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("model_type") == "funnel"


def read(folder: Path) -> Source:
    """Reads a model of any class, with or without the prefix, in one file or in shards.

    Raises:
        FunnelError: a file is missing or damaged, or the weights do not fit the config.
    """
    config, values = read_config(folder), read_json(folder / CONFIG)
    weights = checkpoint.read_weights(first_file(folder, WEIGHTS))
    left_out = {}
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        ours[rename(name.removeprefix(PREFIX), TABLE) or name] = tensor
    architecture = _architecture(values, ours, config)
    output_weights = ours.pop("lm_head.weight", None)
    if output_weights is not None:
        if not torch.equal(output_weights, ours.get("embeddings.word_embeddings.weight", torch.empty(0))):
            raise FunnelError(f"{folder}: lm_head.weight is not tied to the word embeddings, which is not supported")
        left_out["lm_head.weight"] = "the same as the word embeddings, which serve for both"
    if architecture == "FunnelBaseModel" and config.num_decoder_layers:
        config = config.replace(num_decoder_layers=0)
    check_exact_match(ours, model_state(architecture, config), folder)
    return Source("transformers", folder, config, ours, architecture, left_out)


def read_config(folder: Path) -> FunnelConfig:
    """The config, without the weights.

    Raises:
        FunnelError: it is missing or damaged.
    """
    values = read_json(folder / CONFIG)
    given = {name: value for name, value in values.items() if value is not None}  # null stands for the default
    return FunnelConfig.from_dict(given, str(folder / CONFIG))


def _architecture(values: dict[str, Any], weights: dict[str, Tensor], config: FunnelConfig) -> str:
    """The class that the weights are of: the config's, where its head is there, else told by the names."""
    heads = {name for name in weights if not name.startswith(BODY)} - {"lm_head.weight"}
    declared = checkpoint.architecture(values)
    candidates = [declared] if declared in MODELS else []
    has_decoder = any(name.startswith("decoder.") for name in weights)
    for name in [*candidates, *MODELS]:
        state = model_state(name, config)
        decoder_fits = MODELS[name].has_decoder == has_decoder or not config.num_decoder_layers
        if {n for n in state if not n.startswith(BODY)} == heads and decoder_fits:
            return name
    return declared if declared in MODELS else ("FunnelModel" if has_decoder else "FunnelBaseModel")


def write(folder: Path, saved: Checkpoint) -> None:
    """Writes a checkpoint of ours into a folder so that transformers' `from_pretrained` reads it.

    Args:
        folder: exists, and is written into (the caller sees to it that it appears whole).
    """
    bare = saved.architecture in ("FunnelModel", "FunnelBaseModel")
    config = saved.config
    if saved.architecture == "FunnelForQuestionAnswering":  # transformers makes as many outputs as there are labels
        config = config.replace(id2label={0: "LABEL_0", 1: "LABEL_1"}, block_repeats=config.repeats)
    values = {"model_type": "funnel", "architectures": [saved.architecture], **config.to_dict()}
    weights = {}
    for name, tensor in saved.weights.items():
        theirs = rename(name, BACK)
        assert theirs is not None, f"{name} has no row in the table"
        weights[PREFIX + theirs if name.startswith(BODY) and not bare else theirs] = tensor
    write_json(folder / CONFIG, values)
    checkpoint.save_weights(folder / "model.safetensors", weights)

"""transformers' format, read and written: config.json (model_type funnel) and model.safetensors or pytorch_model.bin.

Bare models, such as the hub's funnel-transformer/*, have names without a prefix; in a model with a head, the names of the
body start with "funnel.". The table lists the names without it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funnel.errors import FunnelError
from funnel.io import write_json
from funnel.model import checkpoint
from funnel.model.checkpoint import BODY, Checkpoint
from funnel.model.config import FunnelConfig
from funnel.model.heads import MODELS
from funnel.weights.key_map import ConvertedWeights, Format, RawCheckpoint, check_exact_match, meta_state_dict, rename

PREFIX = "funnel."
CONFIG = "config.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

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

# transformers' names -> ours. Both follow the paper, so the names within a layer are the same.
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
# Config fields that transformers' Funnel does not have, with the values that it implies.
NOT_IN_FUNNEL = {
    "relative_attention": True,
    "distance_buckets": 0,
    "position_embeddings": 0,
    "token_type_embeddings": 0,
    "embedding_size": None,
    "classifier_act": "tanh",
}
WITH_ONNX = (  # can be exported to ONNX, see export.py
    "FunnelForSequenceClassification",
    "FunnelForTokenClassification",
    "FunnelForQuestionAnswering",
    "FunnelForMultipleChoice",
)
INVERSE_TABLE = {ours: theirs for theirs, ours in TABLE.items()}


def parse_config(values: Mapping[str, Any], path: Path) -> FunnelConfig:
    """Converts config.json; null means a field's default.

    Raises:
        FunnelError: a field is invalid.
    """
    fields = {name: value for name, value in values.items() if value is not None}
    labels = fields.get("id2label")
    if isinstance(labels, dict) and len(labels) == 1:
        fields.setdefault("problem_type", "regression")  # as transformers does
    return FunnelConfig.from_dict(fields, str(path))


def convert(raw: RawCheckpoint) -> ConvertedWeights:
    """Renames the weights of any model class, with or without the prefix.

    Raises:
        FunnelError: the weights do not match the config, or the LM head is not tied to the word embeddings.
    """
    weights = {rename(name.removeprefix(PREFIX), TABLE) or name: tensor for name, tensor in raw.tensors.items()}
    unused = {}
    output_embeddings = weights.pop("lm_head.weight", None)
    if output_embeddings is not None:
        if not torch.equal(output_embeddings, weights.get("embeddings.word_embeddings.weight", torch.empty(0))):
            raise FunnelError(f"{raw.folder}: lm_head.weight is not tied to the word embeddings, which is not supported")
        unused["lm_head.weight"] = "tied to the word embeddings"
    config = raw.config
    architecture = detect_architecture(checkpoint.read_architecture(raw.config_values), weights, config)
    if architecture == "FunnelBaseModel":
        config = config.replace(num_decoder_layers=0)
    check_exact_match(weights, meta_state_dict(architecture, config), raw.folder)
    weights = scale_output(
        Checkpoint(config, weights, architecture), 1 / config.label_std, -config.label_mean / config.label_std
    )
    return ConvertedWeights(config, weights, architecture, unused)


def detect_architecture(declared: str, weights: Mapping[str, Tensor], config: FunnelConfig) -> str:
    """Determines the model class from the weights: the declared class if its head matches, else the first that matches."""
    head = {name for name in weights if not name.startswith(BODY)}
    has_decoder = any(name.startswith("decoder.") for name in weights)
    for name in [declared, *MODELS] if declared in MODELS else MODELS:
        decoder_matches = MODELS[name].has_decoder == has_decoder or not config.num_decoder_layers
        if decoder_matches and head == {weight for weight in meta_state_dict(name, config) if not weight.startswith(BODY)}:
            return name
    return declared if declared in MODELS else ("FunnelModel" if has_decoder else "FunnelBaseModel")


def write_huggingface(folder: Path, saved: Checkpoint) -> None:
    """Writes config.json and model.safetensors for transformers' `from_pretrained` into an existing folder.

    transformers ignores `label_mean` and `label_std`, so a regression's output layer gets the units of the labels, up to
    rounding. `convert` reverses this.

    Raises:
        FunnelError: transformers has no such model.
    """
    check_representable(saved)
    is_bare = saved.architecture in ("FunnelModel", "FunnelBaseModel")
    config = saved.config
    # transformers creates as many outputs for answer spans as there are labels, and rejects a single label for multiple choice.
    is_single = saved.architecture == "FunnelForMultipleChoice" and config.num_labels == 1
    if saved.architecture == "FunnelForQuestionAnswering" or is_single:
        config = config.replace(id2label={0: "LABEL_0", 1: "LABEL_1"})
    weights = {}
    for name, tensor in scale_output(saved, config.label_std, config.label_mean).items():
        renamed = rename(name, INVERSE_TABLE)
        assert renamed is not None, f"{name} is not in the table"
        weights[PREFIX + renamed if name.startswith(BODY) and not is_bare else renamed] = tensor
    write_json(folder / CONFIG, {"model_type": "funnel", "architectures": [saved.architecture], **config.to_dict()})
    checkpoint.save_weights(folder / "model.safetensors", weights)


def check_representable(saved: Checkpoint) -> None:
    """Raises FunnelError if transformers has no such Funnel-Transformer. The weights are not used."""
    for name, value in NOT_IN_FUNNEL.items():
        if getattr(saved.config, name) != value:
            raise not_in_transformers(saved, f"Funnel-Transformer with {name} {getattr(saved.config, name)!r}")
    if saved.architecture == "FunnelForMaskedLM" and saved.config.lm_head_transform:
        raise not_in_transformers(saved, "Funnel-Transformer with lm_head_transform True in the masked-LM head")


def not_in_transformers(saved: Checkpoint, what: str) -> FunnelError:
    """The error for a model that transformers does not have."""
    has_onnx = saved.architecture in WITH_ONNX
    advice = "; export it to ONNX instead" if has_onnx else ""
    return FunnelError(f"transformers has no {what}{advice}")


def scale_output(model: Checkpoint, scale: float, shift: float) -> dict[str, Tensor]:
    """The weights of a model; if it is a regression, its output y is replaced with y * scale + shift."""
    weights = dict(model.weights)
    if model.architecture == "FunnelForSequenceClassification" and model.config.problem_type == "regression":
        for name, offset in (("classifier.linear_out.weight", 0.0), ("classifier.linear_out.bias", shift)):
            weights[name] = (weights[name].double() * scale + offset).to(weights[name].dtype)
    return weights


FORMAT = Format("transformers", CONFIG, WEIGHT_FILES, parse_config, convert)

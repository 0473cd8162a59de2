"""Reads and writes transformers' BERT, DistilBERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, ALBERT and MPNet.

A layer of these models is a Funnel layer with ordinary attention instead of relative attention; positions and token types
are embeddings at the input (MPNet also has a bias by distance). So a model becomes one block that computes the same
function. Classifiers of texts and tokens, masked language models and ELECTRA's discriminators keep their head. The pooler of
BERT and ALBERT, a pretrained part of their text classifiers, becomes `classifier.linear_hidden`, which a bare model and a
masked language model keep as well.

To add a family, add its `model_type` to `config.MODEL_TYPES` and an entry to `FAMILIES` here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funnel.errors import FunnelError
from funnel.io import write_json
from funnel.model import checkpoint
from funnel.model.checkpoint import Checkpoint, read_architecture
from funnel.model.config import MAX_SIZE, FunnelConfig
from funnel.weights.huggingface import CONFIG, WEIGHT_FILES, not_in_transformers, scale_output
from funnel.weights.key_map import ConvertedWeights, Format, RawCheckpoint, check_exact_match, expected_weights, rename

CLASSIFIER, BARE = "FunnelForSequenceClassification", "FunnelBaseModel"
MASKED_LM, DISCRIMINATOR = "FunnelForMaskedLM", "FunnelForPreTraining"
TOKEN_CLASSIFIER, SPANS = "FunnelForTokenClassification", "FunnelForQuestionAnswering"
CHOICE = "FunnelForMultipleChoice"
SUFFIXES = {
    CLASSIFIER: "ForSequenceClassification",
    TOKEN_CLASSIFIER: "ForTokenClassification",
    BARE: "Model",
    MASKED_LM: "ForMaskedLM",
    DISCRIMINATOR: "ForPreTraining",
    SPANS: "ForQuestionAnswering",
    CHOICE: "ForMultipleChoice",
}
SPAN_HEAD = {f"qa_outputs.{kind}": f"qa_outputs.{kind}" for kind in ("weight", "bias")}  # of all families
# Config fields of classifiers, and those of models for answer spans.
TASK_FIELDS = (
    "id2label",
    "problem_type",
    "label_mean",
    "label_std",
    "model_max_length",
    "text_columns",
    "decision_threshold",
)
SPAN_FIELDS = ("decision_threshold",)
# Config fields without an effect on what a model of one block without relative attention computes.
WITHOUT_EFFECT = (
    "num_decoder_layers",
    "activation_dropout",
    "pooling_type",
    "attention_type",
    "separate_cls",
    "truncate_seq",
    "pool_q_only",
)

# --- names ------------------------------------------------------------------------------------------------------------
# Tables map the names of modules, without ".weight" and ".bias"; see key_map.py. Names of the body have no prefix.

_EMBEDDINGS = {
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    "embeddings.LayerNorm": "embeddings.layer_norm",
}
_LAYER = (
    "attention.q_head",
    "attention.k_head",
    "attention.v_head",
    "attention.post_proj",
    "attention.layer_norm",
    "ffn.linear_1",
    "ffn.linear_2",
    "ffn.layer_norm",
)


def _body(layer: str, *modules: str) -> dict[str, str]:
    """The table of embeddings and layers, from the names of a layer and of its modules in the order of `_LAYER`."""
    return _EMBEDDINGS | {f"{layer}.{theirs}": f"layer.{{}}.{ours}" for theirs, ours in zip(modules, _LAYER, strict=True)}


_BERT = _body(
    "encoder.layer.{}",
    *("attention.self.query", "attention.self.key", "attention.self.value"),
    *("attention.output.dense", "attention.output.LayerNorm"),
    *("intermediate.dense", "output.dense", "output.LayerNorm"),
)
_DISTILBERT = _body(
    "transformer.layer.{}",
    *("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    *("attention.out_lin", "sa_layer_norm"),
    *("ffn.lin1", "ffn.lin2", "output_layer_norm"),
)
_ALBERT = _body(
    "encoder.albert_layer_groups.{}.albert_layers.0",
    *("attention.query", "attention.key", "attention.value"),
    *("attention.dense", "attention.LayerNorm"),
    *("ffn", "ffn_output", "full_layer_layer_norm"),
)
_MPNET = _body(
    "encoder.layer.{}",
    *("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    *("attention.attn.o", "attention.LayerNorm"),
    *("intermediate.dense", "output.dense", "output.LayerNorm"),
)
_OUTPUT = {"classifier": "classifier.linear_out"}
_TOKEN_OUTPUT = {"classifier": "classifier"}  # the same in all families
_DENSE_AND_OUTPUT = {"classifier.dense": "classifier.linear_hidden", "classifier.out_proj": "classifier.linear_out"}


class LMHead(NamedTuple):
    """transformers' names of a masked-LM head: hidden states -> linear, activation, LayerNorm, times the word embeddings.

    Attributes:
        dense, layer_norm: modules.
        output: the output layer, whose weight is tied to the word embeddings.
        bias: the output layer's bias.
        act: the activation; "" for the model's.
    """

    dense: str
    layer_norm: str
    output: str
    bias: str
    act: str = ""

    def table(self) -> dict[str, str]:
        """transformers' names of the weights -> ours."""
        modules = {self.dense: "lm_projection", self.layer_norm: "lm_layer_norm"}
        weights = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in modules.items() for kind in ("weight", "bias")}
        return weights | {self.bias: "lm_bias"}


_BERT_LM = LMHead(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder",
    "cls.predictions.bias",
)
_ROBERTA_LM = LMHead("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias", act="gelu")
_ELECTRA_LM = LMHead(
    "generator_predictions.dense",
    "generator_predictions.LayerNorm",
    "generator_lm_head",
    "generator_lm_head.bias",
    act="gelu",
)
_DISCRIMINATOR = {
    f"discriminator_predictions.{module}.{kind}": f"{module}.{kind}"
    for module in ("dense", "dense_prediction")
    for kind in ("weight", "bias")
}

# our config field -> their name
_FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_head": "num_attention_heads",
    "d_inner": "intermediate_size",
    "hidden_act": "hidden_act",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "layer_norm_eps": "layer_norm_eps",
    "position_embeddings": "max_position_embeddings",
}
_TYPED_FIELDS = {**_FIELDS, "token_type_embeddings": "type_vocab_size"}
_PROJECTED_FIELDS = {**_TYPED_FIELDS, "embedding_size": "embedding_size"}
_DISTILBERT_FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "dim",
    "n_head": "n_heads",
    "d_inner": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "position_embeddings": "max_position_embeddings",
}
NOT_SIZES = ("hidden_act", "hidden_dropout", "attention_dropout", "layer_norm_eps")
# transformers' defaults for missing fields; all other fields are required.
DEFAULTS = {
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "layer_norm_eps": 1e-12,
    "position_embeddings": 512,
    "token_type_embeddings": 2,
    "embedding_size": 128,
    "distance_buckets": 32,
}
# transformers' aliases, equal up to rounding
ACTIVATION_NAMES = {
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "swish": "silu",
}


class Family(NamedTuple):
    """What distinguishes a family from the others.

    Attributes:
        title: for messages.
        architecture: prefix of its class names in transformers.
        prefix: of the body's weights in a model with a head.
        body: transformers' names of the body's modules -> ours.
        head: transformers' names of a text classifier's modules -> ours.
        fields: our config fields -> transformers' names.
        lm_head: of its masked language models.
        discriminator: transformers' names of the weights of a discriminator's head -> ours.
        defaults: overrides of `DEFAULTS`.
        layers: name of the config field with the number of layers.
        classifier_act: activation of the text classifier.
        first_position_follows_padding: positions start at pad_token_id + 1 instead of 0.
        supported: the only supported values of other fields of its config.
        choice_dense: the first layer of a multiple-choice head, if it is not that of a text classifier.
    """

    title: str
    architecture: str
    prefix: str
    body: Mapping[str, str]
    head: Mapping[str, str]
    fields: Mapping[str, str]
    lm_head: LMHead
    discriminator: Mapping[str, str] = {}
    defaults: Mapping[str, Any] = {}
    layers: str = "num_hidden_layers"
    classifier_act: str = "tanh"
    first_position_follows_padding: bool = False
    supported: Mapping[str, Any] = {}
    choice_dense: str = ""


_ROBERTA = Family(
    *("RoBERTa", "Roberta", "roberta.", _BERT, _DENSE_AND_OUTPUT, _TYPED_FIELDS, _ROBERTA_LM),
    first_position_follows_padding=True,
    choice_dense="roberta.pooler.dense",
)
FAMILIES: dict[str, Family] = {
    "bert": Family(
        "BERT",
        "Bert",
        "bert.",
        {**_BERT, "pooler.dense": "classifier.linear_hidden"},
        _OUTPUT,
        _TYPED_FIELDS,
        _BERT_LM,
    ),
    "distilbert": Family(
        "DistilBERT",
        "DistilBert",
        "distilbert.",
        _DISTILBERT,
        {"pre_classifier": "classifier.linear_hidden", **_OUTPUT},
        _DISTILBERT_FIELDS,
        LMHead("vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.bias"),
        layers="n_layers",
        classifier_act="relu",
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA._replace(title="XLM-R", architecture="XLMRoberta"),
    "camembert": _ROBERTA._replace(title="CamemBERT", architecture="Camembert"),
    "electra": Family(
        "ELECTRA",
        "Electra",
        "electra.",
        {**_BERT, "embeddings_project": "embeddings.projection"},
        _DENSE_AND_OUTPUT,
        _PROJECTED_FIELDS,
        _ELECTRA_LM,
        _DISCRIMINATOR,
        classifier_act="gelu",
        choice_dense="sequence_summary.summary",
    ),
    "albert": Family(
        "ALBERT",
        "Albert",
        "albert.",
        {
            **_ALBERT,
            "encoder.embedding_hidden_mapping_in": "embeddings.projection",
            "pooler": "classifier.linear_hidden",
        },
        _OUTPUT,
        _PROJECTED_FIELDS,
        LMHead("predictions.dense", "predictions.LayerNorm", "predictions.decoder", "predictions.bias"),
        defaults={"hidden_act": "gelu_new", "hidden_dropout": 0.0, "attention_dropout": 0.0},
        supported={"inner_group_num": 1},
    ),
    "mpnet": Family(
        "MPNet",
        "MPNet",
        "mpnet.",
        {**_MPNET, "encoder.relative_attention_bias": "encoder.distance_bias"},
        _DENSE_AND_OUTPUT,
        {**_FIELDS, "distance_buckets": "relative_attention_num_buckets"},
        _ROBERTA_LM,
        first_position_follows_padding=True,
        supported={"relative_attention_num_buckets": 32, "pad_token_id": 1},  # transformers hard-codes these
        choice_dense="mpnet.pooler.dense",
    ),
}

# model_type -> why it is not supported
UNSUPPORTED = {
    "bart": "it is an encoder-decoder model",
    "big_bird": "its attention is sparse",
    "convbert": "its layers contain convolutions",
    "deberta": "its attention is disentangled",
    "deberta-v2": "its attention is disentangled",
    "longformer": "its attention is sparse",
    "megatron-bert": "its LayerNorms precede attention and feed-forward (pre-norm)",
    "mobilebert": "its layers have bottlenecks",
    "modernbert": "its positions are rotary, and its LayerNorms precede attention and feed-forward (pre-norm)",
    "nomic_bert": "its positions are rotary",
    "roberta-prelayernorm": "its LayerNorms precede attention and feed-forward (pre-norm)",
    "roformer": "its positions are rotary",
    "t5": "it is an encoder-decoder model",
    "xlm-roberta-xl": "its LayerNorms precede attention and feed-forward (pre-norm)",
    "xlnet": "its layers have two streams and a recurrence over segments",
}
UNUSED = {  # reasons, by prefix of the weight names
    "pooler.": "the pooler; classifiers of this family do not use it",
    "cls.": "pretraining heads",
    "lm_head.": "pretraining head",
    "predictions.": "pretraining head",
    "sop_classifier.": "pretraining head",
    "vocab_": "pretraining head",
    "discriminator_predictions.": "pretraining head",
    "generator_": "pretraining head",
    "pre_classifier.": "classifier of another task, according to architectures in config.json",
    "classifier.": "classifier of another task, according to architectures in config.json",
    "sequence_summary.": "multiple-choice head",
    "qa_outputs.": "question-answering head",
    "dropout.": "not part of the body",
    "embeddings.position_ids": "not a weight",
    "embeddings.token_type_ids": "not a weight",
}


# --- reading ----------------------------------------------------------------------------------------------------------


def find_format(model_type: str, path: Path) -> Format:
    """The format of a family.

    Args:
        path: of config.json, for the error message.

    Raises:
        FunnelError: the model is not supported; the message says why, if it is known.
    """
    if model_type not in FAMILIES:
        reason = f": {UNSUPPORTED[model_type]}" if model_type in UNSUPPORTED else ""
        supported = f"choose from funnel, {', '.join(FAMILIES)}"
        raise FunnelError(f"{path}: model_type {model_type[:40]!r} is not supported{reason}; {supported}")
    return Format(FAMILIES[model_type].title, CONFIG, WEIGHT_FILES, parse_config, convert)


def parse_config(values: Mapping[str, Any], path: Path) -> FunnelConfig:
    """Converts config.json to a model of one block; fields that are null get their defaults.

    Raises:
        FunnelError: a field is missing or invalid, or requires something that this project does not have.
    """
    family = FAMILIES[values["model_type"]]
    _check_supported(values, family, path)
    layers = _positive_integer(values.get(family.layers), family.layers, 999, path)
    groups = layers
    if values["model_type"] == "albert":  # a group of layers shares its weights
        groups = _positive_integer(_get(values, "num_hidden_groups", 1), "num_hidden_groups", layers, path)
        if layers % groups:
            raise FunnelError(f"{path}: invalid num_hidden_groups {groups}: expected a divisor of {family.layers} {layers}")
    fields: dict[str, Any] = {
        "family": values["model_type"],
        "block_sizes": [groups],
        "block_repeats": [layers // groups],
        "num_decoder_layers": 0,
        "relative_attention": False,
        "layer_norm_eps": DEFAULTS["layer_norm_eps"],
        "lm_head_transform": True,
        "classifier_act": family.classifier_act,
        **_task_fields(values),
    }
    for field, name in family.fields.items():
        value = _get(values, name, family.defaults.get(field, DEFAULTS.get(field)))
        fields[field] = value if field in NOT_SIZES else _positive_integer(value, name, MAX_SIZE, path)
    width, heads = fields["d_model"], fields["n_head"]
    if width % heads:
        names = family.fields
        raise FunnelError(f"{path}: {names['d_model']} {width} is not divisible by {names['n_head']} {heads}")
    fields["d_head"] = width // heads
    fields["hidden_act"] = ACTIVATION_NAMES.get(str(fields["hidden_act"]), fields["hidden_act"])
    if fields["family"] == "electra" and fields["embedding_size"] == width:
        fields["embedding_size"] = None  # then ELECTRA has no projection
    if family.first_position_follows_padding:
        pad_token_id = _get(values, "pad_token_id", 1)
        if type(pad_token_id) is not int or pad_token_id < 0:
            raise FunnelError(f"{path}: invalid pad_token_id {pad_token_id!r}: expected an integer of at least 0")
        fields["position_offset"] = pad_token_id + 1
    return FunnelConfig.from_dict(fields, str(path))


def _get(values: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of a field; the default if it is missing or null."""
    value = values.get(name)
    return default if value is None else value


def _positive_integer(value: Any, name: str, limit: int, path: Path) -> int:
    if type(value) is not int or not 1 <= value <= limit:
        raise FunnelError(f"{path}: invalid {name} {value!r}: expected an integer from 1 to {limit:,}")
    return value


def _check_supported(values: Mapping[str, Any], family: Family, path: Path) -> None:
    """Raises FunnelError for unsupported variants of a family."""
    supported = {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        **family.supported,
    }
    for name, value in supported.items():
        if values.get(name) not in (None, value):
            raise FunnelError(f"{path}: {name} {values[name]!r} is not supported, only {value!r}")


def _classifier(values: Mapping[str, Any]) -> str | None:
    """Our class of a classifier of texts or tokens; None for other models."""
    return next((ours for ours in (CLASSIFIER, TOKEN_CLASSIFIER) if read_architecture(values).endswith(SUFFIXES[ours])), None)


def _task_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Config fields of a classifier, and of a model for answer spans; none for other models."""
    if _classifier(values) is None:
        is_spans = read_architecture(values).endswith(SUFFIXES[SPANS])
        return {name: values[name] for name in SPAN_FIELDS if is_spans and values.get(name) is not None}
    fields = {name: values[name] for name in TASK_FIELDS if values.get(name) is not None}
    if isinstance(length := fields.get("model_max_length"), int) and length > MAX_SIZE:
        del fields["model_max_length"]  # a large number stands for "no limit"
    labels, num_labels = fields.get("id2label"), values.get("num_labels")
    if labels is None and type(num_labels) is int and 1 <= num_labels <= MAX_SIZE:
        fields["id2label"] = {number: f"LABEL_{number}" for number in range(num_labels)}
    if isinstance(labels, dict) and len(labels) == 1:
        fields.setdefault("problem_type", "regression")  # as transformers does
    return fields


def convert(raw: RawCheckpoint) -> ConvertedWeights:
    """Renames the weights.

    Raises:
        FunnelError: the weights do not match the config.
    """
    config, family = raw.config, FAMILIES[raw.config.family]
    bare_names = {_bare_name(name, family): name for name in raw.tensors}
    architecture = _classifier(raw.config_values)
    head: Mapping[str, str] = {}
    if architecture is None:
        architecture, head = _detect_head(config, {bare: raw.tensors[name] for bare, name in bare_names.items()})
    table = {**family.body, **(family.head if architecture == CLASSIFIER else {})}
    if architecture == TOKEN_CLASSIFIER:  # without the pooler, which some checkpoints have
        table = {theirs: ours for theirs, ours in table.items() if not ours.startswith("classifier.")} | _TOKEN_OUTPUT
    weights, unused = {}, {}
    for bare, name in bare_names.items():
        module, _, parameter = bare.rpartition(".")
        ours = rename(module, table, config.blocks)
        reason = next((reason for prefix, reason in UNUSED.items() if bare.startswith(prefix)), None)
        if bare in head:
            weights[head[bare]] = raw.tensors[name]
        elif architecture == MASKED_LM and module == family.lm_head.output:
            unused[name] = "output layer of the masked-LM head; tied to the word embeddings and the head's bias"
        elif ours is None and reason is not None:
            unused[name] = reason
        else:
            weights[name if ours is None else f"{ours}.{parameter}"] = raw.tensors[name]
    check_exact_match(weights, expected_weights(architecture, config, weights), raw.folder)
    saved = Checkpoint(config, weights, architecture)
    weights = scale_output(saved, 1 / config.label_std, -config.label_mean / config.label_std)
    return ConvertedWeights(config, weights, architecture, unused)


def _bare_name(name: str, family: Family) -> str:
    """The name of a weight without the prefix of the body, and with today's names of a LayerNorm's weights."""
    return name.removeprefix(family.prefix).replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")


def _detect_head(config: FunnelConfig, tensors: Mapping[str, Tensor]) -> tuple[str, Mapping[str, str]]:
    """The model class that has the same head as the weights, and the names of the head's weights -> ours.

    A head that is incomplete, or that our models do not have, is left out.
    """
    family = FAMILIES[config.family]
    if all(name in tensors for name in SPAN_HEAD) and len(tensors["qa_outputs.bias"]) == 2:
        return SPANS, SPAN_HEAD
    if all(name in tensors for name in family.lm_head.table()) and _has_our_lm_head(config, tensors):
        return MASKED_LM, family.lm_head.table()
    if family.discriminator and all(name in tensors for name in family.discriminator):
        return DISCRIMINATOR, family.discriminator
    return BARE, {}


def _has_our_lm_head(config: FunnelConfig, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the head's activation is the model's, and its output layer is tied to the word embeddings."""
    head = FAMILIES[config.family].lm_head
    tied = {f"{head.output}.weight": "embeddings.word_embeddings.weight", f"{head.output}.bias": head.bias}
    return head.act in ("", config.hidden_act) and all(
        torch.equal(tensors[name], tensors.get(target, torch.empty(0))) for name, target in tied.items() if name in tensors
    )


# --- writing ----------------------------------------------------------------------------------------------------------


def write_bert(folder: Path, saved: Checkpoint) -> None:
    """Writes config.json and model.safetensors of the family for transformers' `from_pretrained` into an existing folder.

    As in `huggingface.write_huggingface`, the output layer of a regression gets the units of the labels.

    Raises:
        FunnelError: transformers has no such model.
    """
    config, family = saved.config, FAMILIES[saved.config.family]
    check_representable(saved)
    values = _config_values(saved)
    prefix = "" if saved.architecture == BARE else family.prefix
    table = {ours: prefix + theirs for theirs, ours in family.body.items()}
    outputs = _TOKEN_OUTPUT if saved.architecture == TOKEN_CLASSIFIER else family.head
    table |= {ours: theirs for theirs, ours in outputs.items() if ours not in table}
    if saved.architecture == CHOICE and family.choice_dense:
        table |= {"classifier.linear_hidden": family.choice_dense, "classifier.linear_out": "classifier"}
    head = {ours: theirs for theirs, ours in {**family.lm_head.table(), **family.discriminator, **SPAN_HEAD}.items()}
    weights: dict[str, Tensor] = {}
    for name, tensor in scale_output(saved, config.label_std, config.label_mean).items():
        module, _, parameter = name.replace("encoder.blocks.0.", "layer.").rpartition(".")
        renamed = rename(module, table)
        assert renamed is not None or name in head, f"{name} is not in the table"
        weights[head[name] if renamed is None else f"{renamed}.{parameter}"] = tensor
    write_json(folder / CONFIG, values)
    checkpoint.save_weights(folder / "model.safetensors", weights)


def _config_values(saved: Checkpoint) -> dict[str, Any]:
    """The contents of transformers' config.json."""
    config, family = saved.config, FAMILIES[saved.config.family]
    fields = config.to_dict()
    values: dict[str, Any] = {
        "model_type": config.family,
        "architectures": [family.architecture + SUFFIXES[saved.architecture]],
        **{name: fields[field] for field, name in family.fields.items()},
        family.layers: config.blocks[0].runs,
    }
    if config.family == "albert":
        values["num_hidden_groups"] = config.blocks[0].layers
    if config.family == "electra" and config.embedding_size is None:
        values["embedding_size"] = config.d_model
    if family.first_position_follows_padding:
        values["pad_token_id"] = config.position_offset - 1
    return values | {name: fields[name] for name in _task_names(saved.architecture)}


def _task_names(architecture: str) -> tuple[str, ...]:
    """Names of the config fields that describe the task of a trained model; none for other models."""
    if architecture in (CLASSIFIER, TOKEN_CLASSIFIER):
        return (*TASK_FIELDS, "label2id")
    return SPAN_FIELDS if architecture == SPANS else ()


def _check_head(saved: Checkpoint) -> None:
    """Raises FunnelError unless the family has a model with this head."""
    config, family = saved.config, FAMILIES[saved.config.family]
    if saved.architecture not in SUFFIXES or (saved.architecture == DISCRIMINATOR and not family.discriminator):
        raise not_in_transformers(saved, f"{family.title} with the head of a {saved.architecture}")
    if saved.architecture == MASKED_LM and family.lm_head.act not in ("", config.hidden_act):
        raise not_in_transformers(saved, f"{family.title} with hidden_act {config.hidden_act!r} in the masked-LM head")


def check_representable(saved: Checkpoint) -> None:
    """Raises FunnelError unless transformers has such a model: reading its config gives ours, up to fields without an effect.

    The weights are not used.
    """
    config, title = saved.config, FAMILIES[saved.config.family].title
    _check_head(saved)
    if len(config.blocks) > 1:
        raise not_in_transformers(saved, f"{title} with pooling (blocks {config.layout})")
    try:
        readable = parse_config(_config_values(saved), Path(CONFIG)).to_dict()
    except FunnelError as error:
        raise not_in_transformers(saved, f"such {title} ({str(error).removeprefix(f'{CONFIG}: ')})") from None
    ignored = {*WITHOUT_EFFECT, *TASK_FIELDS, "label2id"} - {*_task_names(saved.architecture)}
    if saved.architecture in (MASKED_LM, DISCRIMINATOR, TOKEN_CLASSIFIER, SPANS):  # these have a decoder
        ignored.remove("num_decoder_layers")
    if saved.architecture != MASKED_LM:
        ignored.add("lm_head_transform")
    for name, value in config.to_dict().items():
        if name not in ignored and value != readable[name]:
            what = f"repeated layers (blocks {config.layout})" if name.startswith("block_") else f"{name} {value!r}"
            raise not_in_transformers(saved, f"{title} with {what}")

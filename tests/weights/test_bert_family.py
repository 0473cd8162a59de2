"""BERT and its relatives: the same function as in transformers, from transformers' files and back; errors."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import padded_batch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder
from weight_sources import BERT_LIKE, are_equal, bert_inputs, change_config, make_bert_folder, transformers

from funnel.data.files import InMemoryExamples
from funnel.data.tasks import Task
from funnel.errors import FunnelError
from funnel.model.attention import distance_bucket
from funnel.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from funnel.model.config import MODEL_TYPES, FunnelConfig
from funnel.model.encoder import activation
from funnel.model.heads import MODELS, FunnelBaseModel, FunnelForSequenceClassification, FunnelModel, FunnelPreTrainedModel
from funnel.weights import bert_family
from funnel.weights.bert_family import ACTIVATION_NAMES, UNSUPPORTED
from funnel.weights.build import WeightsArgs, build_task_model
from funnel.weights.export import write_transformers
from funnel.weights.key_map import POOLER
from funnel.weights.load import Source, read_source

HEADS = {
    "BERT": ["ForPreTraining", "ForMaskedLM", "ForNextSentencePrediction", "ForTokenClassification", "ForQuestionAnswering",
             "ForMultipleChoice"],
    "DistilBERT": ["ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"],
    "RoBERTa": ["ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"],
    "XLM-R": ["ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"],
    "CamemBERT": ["ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"],
    "ELECTRA": ["ForPreTraining", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"],
    "ALBERT": ["ForPreTraining", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"],
    "MPNet": ["ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"],
}  # fmt: skip
HEADS_OF_FAMILIES = [(kind, head) for kind, heads in HEADS.items() for head in heads]
SPAN_HEAD = "ForQuestionAnswering"
LM_HEADS = [
    *((kind, "ForMaskedLM") for kind in BERT_LIKE),
    *((kind, "ForPreTraining") for kind in ("BERT", "ALBERT", "ELECTRA", "ELECTRA without projection")),
]
OTHER_HEADS = [
    pair for pair in HEADS_OF_FAMILIES if pair not in LM_HEADS and pair[1] not in ("ForTokenClassification", SPAN_HEAD)
]


def build(source: Source | Checkpoint) -> FunnelPreTrainedModel:
    """The model of a source; a bare model ignores the pooler."""
    model = MODELS[source.architecture](source.config).eval()
    unexpected = model.load_state_dict(source.weights, strict=False).unexpected_keys
    assert not set(unexpected) - set(POOLER)
    return model


def limit_of(peer: nn.Module) -> int:
    """The largest number of tokens."""
    offset = peer.config.pad_token_id + 1 if peer.config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
    return peer.config.max_position_embeddings - offset


def pairs_batch(peer: nn.Module) -> tuple[torch.Tensor, ...]:
    limit = limit_of(peer)
    return padded_batch([limit, limit // 2, 7, 3, 2])


def assert_same_hidden_states(model: FunnelPreTrainedModel, peer: nn.Module, batch: tuple[torch.Tensor, ...]) -> None:
    """Compares all hidden states of real tokens, relative to the largest state."""
    is_real = batch[1] == 1
    with torch.no_grad():
        expected = peer(**bert_inputs(batch, peer.config), output_hidden_states=True).hidden_states
        states, _ = model.encode(*batch)
    assert len(states) == len(expected)
    for state, other in zip(states, expected, strict=True):
        assert (state - other)[is_real].abs().max() < 1e-5 * other[is_real].abs().max()


# --- reading: the same function ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BERT_LIKE)
def test_all_hidden_states_are_those_of_transformers(kind, tmp_path):
    peer = make_bert_folder(tmp_path, kind=kind)
    source = read_source(tmp_path)
    assert source.config.max_positions == limit_of(peer)
    assert_same_hidden_states(build(source), peer, pairs_batch(peer))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_of_albert_layers_become_repeated_layers(groups, tmp_path):
    peer = make_bert_folder(tmp_path, kind="ALBERT", num_hidden_layers=6, num_hidden_groups=groups)
    source = read_source(tmp_path)
    assert source.config.layout == ("6" if groups == 6 else f"{groups}x{6 // groups}")
    assert_same_hidden_states(build(source), peer, pairs_batch(peer))


@pytest.mark.parametrize("kind", ["RoBERTa", "XLM-R", "CamemBERT"])
def test_positions_start_after_the_id_of_the_padding_token(kind, tmp_path):
    peer = make_bert_folder(tmp_path, kind=kind, pad_token_id=4)
    assert read_source(tmp_path).config.position_offset == 5
    assert_same_hidden_states(build(read_source(tmp_path)), peer, pairs_batch(peer))


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu", "silu", *ACTIVATION_NAMES])
def test_activations_are_those_of_transformers(name, tmp_path):
    make_bert_folder(tmp_path)
    change_config(tmp_path, hidden_act=name)
    x = torch.linspace(-8, 8, 1001)
    torch.testing.assert_close(activation(read_source(tmp_path).config.hidden_act, x), ACT2FN[name](x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_buckets", [4, 6, 8, 16, 30, 32, 64, 128, 256])
def test_distance_buckets_are_those_of_mpnet(num_buckets):
    distances = torch.arange(-600, 601)
    expected = MPNetEncoder.relative_position_bucket(-distances, num_buckets)  # theirs are key minus query
    assert torch.equal(distance_bucket(distances, num_buckets), expected)


def test_minilm_is_exact(minilm):
    peer = transformers.BertModel.from_pretrained(minilm).eval()
    assert_same_hidden_states(build(read_source(minilm)), peer, padded_batch([512, 100, 17]))


@pytest.mark.slow
def test_mpnet_is_exact(mpnet):
    peer = transformers.MPNetModel.from_pretrained(mpnet).eval()
    assert_same_hidden_states(build(read_source(mpnet)), peer, padded_batch([512, 100, 17]))


# --- reading: classifiers and other heads -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BERT_LIKE)
@pytest.mark.parametrize(
    "options",
    [
        {"id2label": {0: "bad", 1: "good", 2: "so so"}, "problem_type": "single_label_classification"},
        {"id2label": {0: "short", 1: "dull"}, "problem_type": "multi_label_classification"},
        {"num_labels": 1},
    ],
    ids=["classes", "several labels", "regression"],
)
def test_classifiers_give_the_logits_of_transformers(kind, options, tmp_path):
    peer = make_bert_folder(tmp_path, "ForSequenceClassification", kind, **options)
    source = read_source(tmp_path)
    assert source.architecture == "FunnelForSequenceClassification"
    assert source.config.id2label == options.get("id2label", {0: "LABEL_0"})
    assert source.config.problem_type == options.get("problem_type", "regression")
    batch = pairs_batch(peer)
    with torch.no_grad():
        expected = peer(**bert_inputs(batch, peer.config)).logits
        torch.testing.assert_close(build(source)(*batch), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01


@pytest.mark.parametrize("kind", BERT_LIKE)
def test_token_classifiers_give_the_logits_of_transformers(kind, tmp_path):
    labels = {0: "O", 1: "B-x", 2: "I-x"}
    peer = make_bert_folder(tmp_path, "ForTokenClassification", kind, id2label=labels)
    source = read_source(tmp_path)
    assert (source.architecture, source.config.id2label) == ("FunnelForTokenClassification", labels)
    assert not source.unused
    batch = pairs_batch(peer)
    with torch.no_grad():
        expected = peer(**bert_inputs(batch, peer.config)).logits[batch[1] == 1]
        logits = build(source)(*batch)[batch[1] == 1]
    assert (logits - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    assert expected.std() > 0.01


def test_the_pooler_of_an_old_token_classifier_is_left_out(tmp_path):
    make_bert_folder(tmp_path, "ForTokenClassification")
    weights = load_file(tmp_path / "model.safetensors")
    pooler = {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
    save_file(weights | pooler, tmp_path / "model.safetensors", {"format": "pt"})
    source = read_source(tmp_path)
    assert source.architecture == "FunnelForTokenClassification"
    assert source.unused.keys() == pooler.keys()


@pytest.mark.parametrize(("kind", "head"), OTHER_HEADS)
def test_a_model_with_another_head_becomes_a_bare_model(kind, head, tmp_path):
    peer = make_bert_folder(tmp_path, head, kind)
    source = read_source(tmp_path)
    assert source.architecture == "FunnelBaseModel"
    assert source.unused
    assert all("head" in reason or "classifier" in reason for reason in source.unused.values()), source.unused
    assert_same_hidden_states(build(source), peer.base_model, pairs_batch(peer))


@pytest.mark.parametrize(("kind", "head"), LM_HEADS)
def test_masked_lm_and_discriminator_heads_give_the_logits_of_transformers(kind, head, tmp_path):
    peer = make_bert_folder(tmp_path, head, kind)
    source = read_source(tmp_path)
    is_discriminator = kind.startswith("ELECTRA") and head == "ForPreTraining"
    assert source.architecture == ("FunnelForPreTraining" if is_discriminator else "FunnelForMaskedLM")
    batch = pairs_batch(peer)
    with torch.no_grad():
        expected = peer(**bert_inputs(batch, peer.config))[0][batch[1] == 1]
        logits = build(source)(*batch)[batch[1] == 1]
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("kind", "head"), LM_HEADS)
def test_a_classifier_starts_from_the_body_of_a_pretraining_model(kind, head, tmp_path):
    peer = make_bert_folder(tmp_path, head, kind)
    batch = pairs_batch(peer)
    with pytest.warns(UserWarning, match="newly initialized classifier"):
        model = FunnelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert model(*batch).shape == (5, 3)
    assert_same_hidden_states(model, peer.base_model, batch)
    if head == "ForPreTraining" and kind in ("BERT", "ALBERT"):
        pooler = peer.base_model.pooler.dense if kind == "BERT" else peer.base_model.pooler
        assert torch.equal(model.classifier.linear_hidden.weight, pooler.weight)


def test_the_hub_files_of_bert_give_a_masked_language_model_and_the_pooler(tmp_path):
    """bert-base-uncased has all of BERT's pretraining heads, and its config names BertForMaskedLM."""
    peer = make_bert_folder(tmp_path, "ForPreTraining")
    weights = load_file(tmp_path / "model.safetensors")
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"].clone()
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    change_config(tmp_path, architectures=["BertForMaskedLM"])
    source = read_source(tmp_path)
    assert source.architecture == "FunnelForMaskedLM"
    assert torch.equal(source.weights[POOLER[0]], peer.bert.pooler.dense.weight)
    assert {name.split(".")[-2] for name in source.unused} == {"decoder", "seq_relationship"}
    save_checkpoint(tmp_path / "native", Checkpoint(source.config, source.weights, source.architecture))
    assert are_equal(read_source(tmp_path / "native").weights, source.weights)


@pytest.mark.parametrize("name", ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"])
def test_a_masked_lm_head_that_is_not_tied_is_left_out(name, tmp_path):
    make_bert_folder(tmp_path, "ForMaskedLM")
    weights = load_file(tmp_path / "model.safetensors")
    shape = weights["cls.predictions.bias" if name.endswith("bias") else "bert.embeddings.word_embeddings.weight"].shape
    save_file({**weights, name: torch.randn(shape)}, tmp_path / "model.safetensors")
    source = read_source(tmp_path)
    assert source.architecture == "FunnelBaseModel"
    assert name in source.unused


def test_an_incomplete_masked_lm_head_is_left_out(tmp_path):
    make_bert_folder(tmp_path, "ForMaskedLM")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["cls.predictions.transform.LayerNorm.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    assert read_source(tmp_path).architecture == "FunnelBaseModel"


@pytest.mark.parametrize("kind", ["RoBERTa", "ELECTRA", "MPNet"])
def test_a_masked_lm_head_with_another_activation_than_the_model_is_left_out(kind, tmp_path):
    """In these families, transformers' head always uses gelu."""
    make_bert_folder(tmp_path, "ForMaskedLM", kind, hidden_act="relu")
    source = read_source(tmp_path)
    assert source.architecture == "FunnelBaseModel"
    assert source.unused
    model = MODELS["FunnelForMaskedLM"](source.config)
    with pytest.raises(FunnelError, match=f"^transformers has no {kind} with hidden_act 'relu' in the masked-LM head$"):
        export(tmp_path / "out", Checkpoint(source.config, model.state_dict(), "FunnelForMaskedLM"))


@pytest.mark.parametrize("kind", ["BERT", "ALBERT"])
def test_the_pooler_is_kept_as_the_hidden_layer_of_a_classifier(kind, tmp_path):
    peer = make_bert_folder(tmp_path / "bert", kind=kind)
    pooler = peer.pooler.dense if kind == "BERT" else peer.pooler
    source = read_source(tmp_path / "bert")
    save_checkpoint(tmp_path / "native", Checkpoint(source.config, source.weights, source.architecture))
    for folder in ("bert", "native"):
        assert read_source(tmp_path / folder).architecture == "FunnelBaseModel"
        assert are_equal(read_source(tmp_path / folder).weights, source.weights)
        with pytest.warns(
            UserWarning, match=r"newly initialized classifier\.linear_out\.weight, classifier\.linear_out\.bias;"
        ):
            model = FunnelForSequenceClassification.from_pretrained(tmp_path / folder, num_labels=3)
        assert torch.equal(model.classifier.linear_hidden.weight, pooler.weight)
        assert torch.equal(model.classifier.linear_hidden.bias, pooler.bias)
    with torch.no_grad():
        batch = pairs_batch(peer)
        expected = peer(**bert_inputs(batch, peer.config)).pooler_output
        pooled = torch.tanh(model.classifier.linear_hidden(model.encode(*batch)[0][-1][:, 0]))
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)


def test_heads_for_tokens_read_the_hidden_states_of_a_model_without_pooling(tmp_path):
    peer = make_bert_folder(tmp_path)
    batch = pairs_batch(peer)
    with torch.no_grad():
        expected = peer(**bert_inputs(batch, peer.config)).last_hidden_state
        hidden = FunnelModel.from_pretrained(tmp_path)(*batch)
    assert (hidden - expected)[batch[1] == 1].abs().max() < 1e-5 * expected.abs().max()


def test_a_classifier_for_a_new_task_starts_from_the_pooler(tmp_path):
    peer = make_bert_folder(tmp_path)
    files = {"train": InMemoryExamples(["the film", "a film"], None, ["bad", "good"])}
    task = Task("custom", "test", {"bad": "bad", "good": "good"}, (), 8, 1, 1e-3, files=files)
    built = build_task_model(WeightsArgs(weights=str(tmp_path), blocks="2,2"), task, 32)
    assert built.has_new_head
    assert torch.equal(built.model.classifier.linear_hidden.weight, peer.pooler.dense.weight)
    assert torch.equal(built.model.classifier.linear_hidden.bias, peer.pooler.dense.bias)


@pytest.mark.parametrize("kind", ["RoBERTa", "ELECTRA", "MPNet", "DistilBERT"])
def test_a_pooler_that_classifiers_do_not_use_is_left_out(kind, tmp_path):
    make_bert_folder(tmp_path, kind=kind)
    source = read_source(tmp_path)
    assert not set(POOLER) & set(source.weights)
    assert set(source.unused) == (set() if kind in ("ELECTRA", "DistilBERT") else {"pooler.dense.weight", "pooler.dense.bias"})


def test_old_layer_norm_names_and_the_prefix_of_the_body_are_recognized(tmp_path):
    make_bert_folder(tmp_path)
    expected = read_source(tmp_path).weights
    weights = load_file(tmp_path / "model.safetensors")
    old = {
        f"bert.{name}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for name, tensor in weights.items()
    }
    save_file(old, tmp_path / "model.safetensors")
    assert are_equal(read_source(tmp_path).weights, expected)


def test_half_precision_is_kept(tmp_path):
    make_bert_folder(tmp_path)
    weights = {name: tensor.half() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in read_source(tmp_path).weights.values()} == {torch.float16}


def test_a_native_checkpoint_with_narrow_embeddings_can_be_loaded(tmp_path):
    """The check against corrupt configs counts the embeddings with their own width."""
    sizes = {"vocab_size": 60_000, "blocks": "1", "d_model": 64, "n_head": 2, "d_head": 32, "d_inner": 64}
    config = FunnelConfig(**sizes, embedding_size=4, relative_attention=False, num_decoder_layers=0)
    model = FunnelBaseModel(config)
    model.save_pretrained(tmp_path)
    assert are_equal(load_checkpoint(tmp_path).weights, model.state_dict())


def test_every_family_of_the_config_can_be_read():
    assert {"funnel", *bert_family.FAMILIES} == set(MODEL_TYPES)


# --- errors -----------------------------------------------------------------------------------------------------------


def read_error(folder: Path) -> str:
    with pytest.raises(FunnelError) as error:
        read_source(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("modernbert", "positions are rotary"),
        ("deberta", "attention is disentangled"),
        ("deberta-v2", "attention is disentangled"),
        ("xlm-roberta-xl", r"LayerNorms precede attention and feed-forward \(pre-norm\)"),
        ("gpt2\n", r"model_type 'gpt2\\n' is not supported; choose from funnel, bert, "),
    ],
)
def test_unsupported_models_are_named_with_the_reason(model_type, reason, tmp_path):
    make_bert_folder(tmp_path)
    change_config(tmp_path, model_type=model_type)
    assert re.search(reason, read_error(tmp_path))


def test_no_supported_model_is_listed_as_unsupported():
    assert not set(UNSUPPORTED) & set(MODEL_TYPES)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("BERT", {"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported, only"),
        ("BERT", {"is_decoder": True}, "is_decoder True is not supported, only False"),
        ("RoBERTa", {"add_cross_attention": True}, "add_cross_attention True is not supported, only False"),
        ("ALBERT", {"inner_group_num": 2}, "inner_group_num 2 is not supported, only 1"),
        ("ALBERT", {"num_hidden_groups": 3}, "invalid num_hidden_groups 3: expected a divisor of num_hidden_layers 4"),
        ("ALBERT", {"num_hidden_groups": "1"}, "invalid num_hidden_groups '1': expected an integer from 1 to 4"),
        ("BERT", {"hidden_size": None}, "invalid hidden_size None: expected an integer from 1 to"),
        ("BERT", {"hidden_size": 0}, "invalid hidden_size 0: expected an integer from 1 to"),
        ("BERT", {"vocab_size": "99"}, "invalid vocab_size '99': expected an integer from 1 to"),
        ("BERT", {"num_hidden_layers": 1000}, "invalid num_hidden_layers 1000: expected an integer from 1 to 999"),
        ("BERT", {"num_attention_heads": 5}, "hidden_size 32 is not divisible by num_attention_heads 5"),
        ("DistilBERT", {"n_heads": 5}, "dim 32 is not divisible by n_heads 5"),
        ("DistilBERT", {"n_layers": True}, "invalid n_layers True: expected an integer from 1 to 999"),
        ("BERT", {"max_position_embeddings": 0}, "invalid max_position_embeddings 0: expected an integer from 1 to"),
        ("BERT", {"max_position_embeddings": 41}, "position_embeddings.weight has shape [40, 32], the config implies"),
        ("BERT", {"type_vocab_size": 0}, "invalid type_vocab_size 0: expected an integer from 1 to"),
        ("BERT", {"num_hidden_layers": 3}, "unexpected layer.3."),
        ("BERT", {"hidden_act": "quick_gelu"}, "invalid hidden_act 'quick_gelu': expected one of gelu_new, gelu, relu, silu"),
        ("BERT", {"hidden_act": ["gelu"]}, "invalid hidden_act ['gelu']: expected one of"),
        ("BERT", {"hidden_dropout_prob": 1}, "invalid hidden_dropout 1: expected a number in [0, 1)"),
        ("RoBERTa", {"pad_token_id": -1}, "invalid pad_token_id -1: expected an integer of at least 0"),
        ("RoBERTa", {"pad_token_id": 39}, "invalid position_offset 40: expected less than position_embeddings (40)"),
        ("MPNet", {"relative_attention_num_buckets": 16}, "relative_attention_num_buckets 16 is not supported, only 32"),
        ("MPNet", {"pad_token_id": 4}, "pad_token_id 4 is not supported, only 1"),
        ("ELECTRA", {"embedding_size": 32}, "unexpected embeddings.projection"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_used_are_errors(kind, changes, words, tmp_path):
    make_bert_folder(tmp_path, kind=kind)
    change_config(tmp_path, **changes)
    assert words in read_error(tmp_path)


@pytest.mark.parametrize(
    ("kind", "field"),
    [("BERT", "pad_token_id"), ("RoBERTa", "pad_token_id"), ("ALBERT", "num_hidden_groups"), ("BERT", "type_vocab_size")],
)
def test_fields_that_are_null_have_the_defaults_of_transformers(kind, field, tmp_path):
    peer = make_bert_folder(tmp_path, kind=kind)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, field: None}))
    assert_same_hidden_states(build(read_source(tmp_path)), peer, pairs_batch(peer))


def test_number_of_labels_without_names_is_that_of_the_config(tmp_path):
    make_bert_folder(tmp_path, "ForSequenceClassification", num_labels=3)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["id2label"], values["label2id"]
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_labels": 3}))
    assert list(read_source(tmp_path).config.id2label.values()) == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_a_maximum_length_that_means_no_limit_is_ignored(tmp_path):
    make_bert_folder(tmp_path, "ForSequenceClassification")
    change_config(tmp_path, model_max_length=10**30)
    assert read_source(tmp_path).config.model_max_length is None


def test_invalid_labels_of_a_classifier_are_an_error(tmp_path):
    make_bert_folder(tmp_path, "ForSequenceClassification")
    change_config(tmp_path, id2label=2)
    assert "invalid id2label 2: expected a name for each" in read_error(tmp_path)


def test_missing_and_non_finite_weights_are_named(tmp_path):
    make_bert_folder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in weights.items() if "position_embeddings" not in n}, tmp_path / "model.safetensors")
    assert "missing embeddings.position_embeddings.weight" in read_error(tmp_path)
    weights["encoder.layer.0.output.dense.bias"][0] = math.nan
    save_file(weights, tmp_path / "model.safetensors")
    assert "encoder.layer.0.output.dense.bias is not finite" in read_error(tmp_path)


# --- writing ----------------------------------------------------------------------------------------------------------


def perturbed(source: Source, seed: int = 1) -> Checkpoint:
    """The source after a change of all weights, as after fine-tuning."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in source.weights.items()}
    return Checkpoint(source.config, weights, source.architecture)


def export(folder: Path, saved: Checkpoint) -> Path:
    folder.mkdir()
    write_transformers(folder, saved)
    return folder


@pytest.mark.parametrize("kind", BERT_LIKE)
def test_transformers_computes_the_same_hidden_states_from_an_export(kind, tmp_path):
    original = make_bert_folder(tmp_path / "source", kind=kind)
    saved = perturbed(read_source(tmp_path / "source"))
    peer, report = transformers.AutoModel.from_pretrained(export(tmp_path / "out", saved), output_loading_info=True)
    assert type(peer) is type(original)
    assert not report["unexpected_keys"]
    assert all("pooler" in name for name in report["missing_keys"])
    assert_same_hidden_states(build(saved), peer.eval(), pairs_batch(peer))
    if kind.startswith(("BERT", "ALBERT")):
        assert not report["missing_keys"]


@pytest.mark.parametrize("kind", BERT_LIKE)
@pytest.mark.parametrize("labels", [{0: "bad", 1: "good", 2: "so so"}, {0: "score"}], ids=["classes", "regression"])
def test_transformers_computes_the_same_logits_from_an_export(kind, labels, tmp_path):
    make_bert_folder(tmp_path / "source", "ForSequenceClassification", kind, id2label=labels)
    saved = perturbed(read_source(tmp_path / "source"))
    if len(labels) == 1:
        saved = saved._replace(config=saved.config.replace(label_mean=500.0, label_std=20.0))
    folder = export(tmp_path / "out", saved)
    peer, report = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    assert peer.config.id2label == labels
    batch = pairs_batch(peer)
    with torch.no_grad():
        torch.testing.assert_close(
            peer.eval()(**bert_inputs(batch, peer.config)).logits, build(saved)(*batch), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", BERT_LIKE)
def test_transformers_computes_the_same_labels_of_tokens_from_an_export(kind, tmp_path):
    make_bert_folder(tmp_path / "source", "ForTokenClassification", kind, id2label={0: "O", 1: "B-x", 2: "I-x"})
    saved = perturbed(read_source(tmp_path / "source"))
    folder = export(tmp_path / "out", saved)
    peer, report = transformers.AutoModelForTokenClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    assert peer.config.id2label == saved.config.id2label
    batch = pairs_batch(peer)
    with torch.no_grad():
        logits = peer.eval()(**bert_inputs(batch, peer.config)).logits
        torch.testing.assert_close(logits[batch[1] == 1], build(saved)(*batch)[batch[1] == 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "head"), LM_HEADS)
def test_transformers_computes_the_same_token_logits_from_an_export(kind, head, tmp_path):
    make_bert_folder(tmp_path / "source", head, kind)
    saved = perturbed(read_source(tmp_path / "source"))
    is_discriminator = saved.architecture == "FunnelForPreTraining"
    auto = transformers.AutoModelForPreTraining if is_discriminator else transformers.AutoModelForMaskedLM
    peer, report = auto.from_pretrained(export(tmp_path / "out", saved), output_loading_info=True)
    assert not report["missing_keys"]
    assert all("pooler" in name for name in report["unexpected_keys"])
    batch = pairs_batch(peer)
    with torch.no_grad():
        expected = peer.eval()(**bert_inputs(batch, peer.config))[0][batch[1] == 1]
        logits = build(saved)(*batch)[batch[1] == 1]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", BERT_LIKE)
def test_transformers_computes_the_same_span_logits_before_and_after_an_export(kind, tmp_path):
    original = make_bert_folder(tmp_path / "source", SPAN_HEAD, kind)
    source = read_source(tmp_path / "source")
    assert source.architecture == "FunnelForQuestionAnswering"
    saved = perturbed(source)
    auto = transformers.AutoModelForQuestionAnswering
    exported, report = auto.from_pretrained(export(tmp_path / "out", saved), output_loading_info=True)
    assert type(exported) is type(original)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    batch = pairs_batch(original)
    is_token = batch[1] == 1
    for peer, model in ((original, build(source)), (exported.eval(), build(saved))):
        with torch.no_grad():
            output = peer(**bert_inputs(batch, peer.config))
            expected, logits = torch.stack([output.start_logits, output.end_logits], -1)[is_token], model(*batch)[is_token]
        assert expected.std() > 0.1
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_model_with_decoder_layers_is_not_exported_as_a_bert(tmp_path):
    make_bert_folder(tmp_path / "source", SPAN_HEAD)
    source = read_source(tmp_path / "source")
    saved = Checkpoint(source.config.replace(num_decoder_layers=1), source.weights, source.architecture)
    with pytest.raises(FunnelError, match="transformers has no BERT with num_decoder_layers 1"):
        export(tmp_path / "out", saved)


@pytest.mark.parametrize("kind", BERT_LIKE)
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForMaskedLM", SPAN_HEAD])
def test_export_and_import_are_bit_exact(kind, head, tmp_path):
    make_bert_folder(tmp_path / "source", head, kind)
    source = read_source(tmp_path / "source")
    back = read_source(export(tmp_path / "out", Checkpoint(source.config, source.weights, source.architecture)))
    assert are_equal(back.weights, source.weights)
    assert (back.config, back.architecture) == (source.config, source.architecture)
    original, written = load_file(tmp_path / "source/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert set(written) == set(original) - set(source.unused)
    assert all(torch.equal(tensor, original[name]) for name, tensor in written.items())


def test_units_of_a_regression_survive_export_and_import(tmp_path):
    make_bert_folder(tmp_path / "source", "ForSequenceClassification", num_labels=1)
    source = read_source(tmp_path / "source")
    config = source.config.replace(label_mean=50_000.0, label_std=20_000.0, model_max_length=10, text_columns=("a", "b"))
    back = read_source(export(tmp_path / "out", Checkpoint(config, source.weights, source.architecture)))
    assert back.config == config
    for name, tensor in source.weights.items():
        torch.testing.assert_close(back.weights[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering"])
def test_decision_threshold_survives_export_and_import(head, tmp_path):
    make_bert_folder(tmp_path / "source", head)
    source = read_source(tmp_path / "source")
    problem = {"problem_type": "multi_label_classification"} if head == "ForSequenceClassification" else {}
    config = source.config.replace(decision_threshold=0.25, **problem)
    back = read_source(export(tmp_path / "out", Checkpoint(config, source.weights, source.architecture)))
    assert back.architecture == source.architecture
    assert back.config == config


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("BERT", {"blocks": "2,2"}, r"no BERT with pooling \(blocks 2,2\); export it to ONNX instead$"),
        ("BERT", {"blocks": "2x2"}, r"no BERT with repeated layers \(blocks 2x2\); export it to ONNX instead$"),
        ("RoBERTa", {"classifier_act": "relu"}, "no RoBERTa with classifier_act 'relu'; export"),
        ("RoBERTa", {"position_offset": 0}, r"no such RoBERTa \(invalid pad_token_id -1: expected .*\); export"),
        ("BERT", {"distance_buckets": 8}, "no BERT with distance_buckets 8; export"),
        (
            "MPNet",
            {"distance_buckets": 16},
            r"no such MPNet \(relative_attention_num_buckets 16 is not supported, only 32\); exp",
        ),
        ("BERT", {"d_head": 4}, "no BERT with d_head 4; export"),
        ("BERT", {"token_type_embeddings": 0}, r"no such BERT \(invalid type_vocab_size 0: expected .*\); export"),
        ("BERT", {"family": "funnel"}, "no Funnel-Transformer with relative_attention False; export"),
        ("BERT", {"family": "funnel", "relative_attention": True}, "no Funnel-Transformer with position_embeddings 40; export"),
    ],
)
def test_models_that_transformers_does_not_have_are_errors(kind, changes, words, tmp_path):
    make_bert_folder(tmp_path / "source", kind=kind)
    config = read_source(tmp_path / "source").config.replace(**changes)
    model = FunnelForSequenceClassification(config)
    with pytest.raises(FunnelError, match=f"^transformers has {words}"):
        export(tmp_path / "out", Checkpoint(config, model.state_dict(), type(model).__name__))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("cls_name", ["FunnelModel", "FunnelForPreTraining"])
def test_other_heads_are_errors(cls_name, tmp_path):
    make_bert_folder(tmp_path / "source")
    config = read_source(tmp_path / "source").config
    with pytest.raises(FunnelError, match=f"^transformers has no BERT with the head of a {cls_name}$"):
        export(tmp_path / "out", Checkpoint(config, MODELS[cls_name](config).state_dict(), cls_name))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lm_head_transform": False}, "no BERT with lm_head_transform False"),
        ({"num_decoder_layers": 1}, "no BERT with num_decoder_layers 1"),
        ({"family": "funnel", "relative_attention": False}, "no Funnel-Transformer with relative_attention False"),
    ],
)
def test_masked_language_models_that_transformers_does_not_have_are_errors(changes, words, tmp_path):
    make_bert_folder(tmp_path / "source", "ForMaskedLM")
    config = read_source(tmp_path / "source").config.replace(**changes)
    model = MODELS["FunnelForMaskedLM"](config)
    with pytest.raises(FunnelError, match=f"^transformers has {words}$"):
        export(tmp_path / "out", Checkpoint(config, model.state_dict(), "FunnelForMaskedLM"))


def test_fields_without_an_effect_do_not_prevent_an_export(tmp_path):
    make_bert_folder(tmp_path / "source")
    source = read_source(tmp_path / "source")
    config = source.config.replace(
        **{"separate_cls": False, "truncate_seq": False, "pool_q_only": False, "pooling_type": "max"},
        **{"num_decoder_layers": 2, "id2label": {0: "x"}, "model_max_length": 9, "lm_head_transform": False},
    )
    folder = export(tmp_path / "out", Checkpoint(config, source.weights, source.architecture))
    model = FunnelBaseModel(config).eval()
    model.load_state_dict(source.weights, strict=False)
    peer = transformers.AutoModel.from_pretrained(folder).eval()
    assert_same_hidden_states(model, peer, pairs_batch(peer))

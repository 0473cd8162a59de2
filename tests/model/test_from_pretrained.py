"""from_pretrained: sources, layouts, classifier heads, warnings."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import padded_batch, shared, tiny_config

from funnel.errors import FunnelError
from funnel.model.heads import (
    MODELS,
    FunnelBaseModel,
    FunnelForMultipleChoice,
    FunnelForSequenceClassification,
    FunnelForTokenClassification,
    FunnelModel,
)

FIXTURES = Path(__file__).parent.parent / "fixtures/written_by_0_1"
OUTPUT_PROJECTIONS = ("attention.post_proj.weight", "attention.post_proj.bias", "ffn.linear_2.weight", "ffn.linear_2.bias")
CLASSIFIER_OUTPUT = ("classifier.linear_out.weight", "classifier.linear_out.bias")


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def saved(tmp_path):
    """Folder of a classifier with the layout 1,2,1 and two labels."""
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config(num_decoder_layers=0, id2label={0: "bad", 1: "good"}))
    model.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def assert_same_weights(model, expected_state, except_for=()):
    for name, tensor in model.state_dict().items():
        if name not in except_for:
            assert torch.equal(tensor, expected_state[name]), name


def layer_weights(model, block: int, layer: int) -> dict[str, torch.Tensor]:
    return model.encoder.layers(block)[layer].state_dict()


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_loaded_unchanged_in_evaluation_mode(name, tmp_path, no_warnings):
    torch.manual_seed(0)
    model = MODELS[name](tiny_config(blocks="1,2x2,1")).eval()
    model.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved", str(tmp_path / "saved")):
        loaded = MODELS[name].from_pretrained(path)
        assert loaded.config == model.config
        assert not loaded.training
        assert_same_weights(loaded, model.state_dict())


def test_a_run_is_loaded_from_its_best_checkpoint(no_warnings):
    from_run = FunnelForSequenceClassification.from_pretrained(FIXTURES / "run")
    from_best = FunnelForSequenceClassification.from_pretrained(FIXTURES / "run/best")
    assert from_run.config == from_best.config
    assert_same_weights(from_run, from_best.state_dict())


def test_a_run_without_a_best_checkpoint_is_an_error(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FunnelError, match="no best checkpoint yet"):
        FunnelForSequenceClassification.from_pretrained(tmp_path)


def test_a_transformers_checkpoint_is_loaded(tmp_path, no_warnings):
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "vocab_size": 99, "block_sizes": [1, 1]}
    peer = transformers.FunnelForSequenceClassification(transformers.FunnelConfig(**sizes)).eval()
    peer.save_pretrained(tmp_path)
    model = FunnelForSequenceClassification.from_pretrained(tmp_path)
    ids, mask, types = padded_batch([8, 8])
    with torch.no_grad():
        expected = peer(ids, attention_mask=mask, token_type_ids=types).logits
        torch.testing.assert_close(model(ids, mask, types), expected, rtol=0, atol=1e-5)


def test_a_folder_in_the_original_format_is_loaded(no_warnings):
    model = FunnelForSequenceClassification.from_pretrained(shared("golden/original/b2-1x2-1x2_shared"))
    assert (model.config.layout, model.config.num_labels) == ("2,1x2,1x2", 3)


def test_a_bert_is_converted_with_a_new_head_and_layout(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 34}
    peer = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    peer.save_pretrained(tmp_path)
    shutil.copy(FIXTURES / "converted/tokenizer.json", tmp_path)
    with pytest.warns(UserWarning, match=r"newly initialized classifier\."):
        model = FunnelForSequenceClassification.from_pretrained(tmp_path, blocks="1,1,1,1", num_labels=3)
    assert (model.config.layout, model.config.num_labels) == ("1,1,1,1", 3)
    assert model(torch.randint(34, (2, 9))).shape == (2, 3)
    value = peer.state_dict()["encoder.layer.2.attention.self.value.weight"]
    assert torch.equal(layer_weights(model, 2, 0)["attention.v_head.weight"], value)


@pytest.mark.slow
def test_minilm_becomes_a_deep_classifier(minilm):
    with pytest.warns(UserWarning, match="newly initialized"):
        model = FunnelForSequenceClassification.from_pretrained(minilm, blocks="2,2,2,2,2,2,2", num_labels=2)
    assert model.config.layout == "2,2,2,2,2,2,2"
    states, _ = model.encode(torch.randint(1000, 2000, (2, 20)))
    # The new blocks start as the identity, so [CLS] changes little (its LayerNorms are estimated, not calibrated).
    cls_before, cls_after = states[6][:, 0], states[-1][:, 0]
    assert torch.cosine_similarity(cls_before, cls_after).min() > 0.9


def test_a_hub_id_is_downloaded(saved, monkeypatch):
    from funnel.weights import load

    requested = []
    monkeypatch.setattr(load, "resolve", lambda source: requested.append(source) or saved)
    model = FunnelForSequenceClassification.from_pretrained("funnel-transformer/some-model")
    assert requested == ["funnel-transformer/some-model"]
    assert model.config.layout == "1,2,1"


def test_a_name_that_is_neither_a_folder_nor_a_hub_id_is_an_error(tmp_path):
    with pytest.raises(FunnelError, match="no such folder"):
        FunnelBaseModel.from_pretrained(tmp_path / "none")


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_the_documented_call_works(no_warnings):
    model = FunnelForSequenceClassification.from_pretrained(FIXTURES / "run", blocks="2,2,2,2,2,2,2", num_labels=2)
    assert (model.config.layout, model.config.id2label) == ("2,2,2,2,2,2,2", {0: "no", 1: "yes"})
    assert not model.training
    assert model(torch.randint(5, 34, (3, 20))).shape == (3, 2)


def test_old_layers_are_kept_and_new_ones_start_as_the_identity(saved, no_warnings):
    old = FunnelForSequenceClassification.from_pretrained(saved)
    new = FunnelForSequenceClassification.from_pretrained(saved, blocks="1,2,2,1")
    assert new.config.layout == "1,2,2,1"
    for block, layer in ((0, 0), (1, 0), (1, 1), (2, 0)):
        for name, tensor in layer_weights(old, block, layer).items():
            assert torch.equal(layer_weights(new, block, layer)[name], tensor), (block, layer, name)
    for block, layer in ((2, 1), (3, 0)):
        assert not any(layer_weights(new, block, layer)[name].any() for name in OUTPUT_PROJECTIONS)
    for name in ("embeddings.word_embeddings.weight", *CLASSIFIER_OUTPUT):
        assert torch.equal(new.state_dict()[name], old.state_dict()[name])


def test_repeats_are_part_of_the_layout(saved, no_warnings):
    model = FunnelForSequenceClassification.from_pretrained(saved, blocks="1,1x2,1x3")
    assert model.config.layout == "1,1x2,1x3"
    assert [len(block) for block in model.encoder.blocks] == [1, 1, 1]


@pytest.mark.parametrize(("init", "is_copy"), [("copy", True), ("random", False)])
def test_init_determines_how_new_layers_start(saved, init, is_copy):
    model = FunnelForSequenceClassification.from_pretrained(saved, blocks="1,2,2", init=init)
    old, new = layer_weights(model, 2, 0), layer_weights(model, 2, 1)
    assert torch.equal(new["ffn.linear_2.weight"], old["ffn.linear_2.weight"]) == is_copy
    assert new["ffn.linear_2.weight"].any()


@pytest.mark.parametrize(("keep", "source"), [("first", 0), ("last", 1)])
def test_keep_determines_which_layers_remain(saved, keep, source):
    old = FunnelForSequenceClassification.from_pretrained(saved)
    new = FunnelForSequenceClassification.from_pretrained(saved, blocks="1,1,1", keep=keep)
    for name, tensor in layer_weights(old, 1, source).items():
        assert torch.equal(layer_weights(new, 1, 0)[name], tensor)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"blocks": "2,,2"}, "invalid blocks '2,,2'"),
        ({"blocks": "1,1", "init": "zero"}, "zero"),
        ({"blocks": "1,1", "keep": "best"}, "best"),
        ({"num_labels": 0}, "invalid num_labels 0"),
        ({"num_labels": 2, "id2label": {0: "a", 1: "b", 2: "c"}}, "num_labels is 2, but id2label has 3 names"),
        ({"id2label": {1: "a", 2: "b"}}, "id2label"),
        ({"id2label": ["a", "b"]}, "invalid id2label"),
        ({"id2label": {0: "a", 1: "a"}}, "different names"),
        ({"num_labels": "2"}, "invalid num_labels '2'"),
        ({"num_labels": 2.0}, "invalid num_labels 2.0"),
        ({"blocks": (2, 2)}, r"invalid blocks \(2, 2\)"),
        ({"init": "zero"}, "unknown init 'zero'"),
        ({"keep": "best"}, "unknown keep 'best'"),
    ],
)
def test_invalid_arguments_are_errors(saved, arguments, words):
    with pytest.raises(FunnelError, match=words):
        FunnelForSequenceClassification.from_pretrained(saved, **arguments)


@pytest.mark.parametrize("path", [None, 3, b"model"])
def test_a_path_of_the_wrong_type_is_an_error(path):
    with pytest.raises(FunnelError, match="invalid path_or_hub_id"):
        FunnelBaseModel.from_pretrained(path)


def test_a_decoder_is_kept_in_a_new_layout(tmp_path, no_warnings):
    model = FunnelModel(tiny_config())
    model.save_pretrained(tmp_path / "model")
    loaded = FunnelModel.from_pretrained(tmp_path / "model", blocks="1,2,1,1")
    for name, tensor in model.decoder.state_dict().items():
        assert torch.equal(loaded.decoder.state_dict()[name], tensor)


# --- heads ------------------------------------------------------------------------------------------------------------


def test_a_backbone_loads_into_every_class(tmp_path):
    body = FunnelModel(tiny_config())
    body.save_pretrained(tmp_path / "body")
    for name, cls in MODELS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = cls.from_pretrained(tmp_path / "body").state_dict()
        for key, tensor in body.state_dict().items():
            if key in loaded:
                assert torch.equal(loaded[key], tensor), (name, key)


def test_a_model_with_a_decoder_needs_decoder_weights(tmp_path):
    FunnelForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "classifier")
    with pytest.raises(FunnelError, match=r"missing decoder\.layers"):
        FunnelModel.from_pretrained(tmp_path / "classifier")


def test_weights_without_a_head_give_a_warning_that_names_source_and_weights(tmp_path):
    FunnelModel(tiny_config()).save_pretrained(tmp_path / "body")
    with pytest.warns(UserWarning, match=r"body: newly initialized classifier\.linear_hidden\.weight.*train the head"):
        FunnelForSequenceClassification.from_pretrained(tmp_path / "body")


def output_rows(model) -> torch.Tensor:
    """The output layer's weights and biases, [num_labels, d + 1]."""
    layer = model.classifier.linear_out
    return torch.cat([layer.weight, layer.bias[:, None]], dim=1)


@pytest.mark.parametrize(
    ("arguments", "sources", "warning"),
    [
        ({"num_labels": 2}, {0: 0, 1: 1}, None),
        ({"id2label": {0: "good", 1: "bad"}}, {0: 1, 1: 0}, None),
        ({"id2label": {"1": "bad", "0": "new", "2": "good"}}, {1: 0, 2: 1}, "classifier: 2 of 3 labels kept; new: new;"),
        ({"id2label": {0: "no", 1: "yes"}}, {}, r"new classifier \(the weights have the labels bad, good\); train the head"),
        ({"num_labels": 3}, {}, r"new classifier \(the weights have the labels bad, good\);"),
        ({"num_labels": 1}, {}, r"new classifier \(the weights are for single-label classification\);"),
    ],
)
@pytest.mark.parametrize("blocks", [None, "1,2,1,1"])
def test_outputs_are_matched_by_label(saved, arguments, sources, warning, blocks):
    old = FunnelForSequenceClassification.from_pretrained(saved)
    with warnings.catch_warnings() if warning is None else pytest.warns(UserWarning, match=f"classifier: {warning}"):
        if warning is None:
            warnings.simplefilter("error")
        new = FunnelForSequenceClassification.from_pretrained(saved, blocks=blocks, **arguments)
    for row, values in enumerate(output_rows(new)):
        assert torch.equal(values, output_rows(old)[sources[row]]) if row in sources else values[:-1].any()
        assert row in sources or not (values == output_rows(old)).all(1).any()
    assert torch.equal(new.classifier.linear_hidden.weight, old.classifier.linear_hidden.weight)
    if blocks is None:
        assert_same_weights(new, old.state_dict(), except_for=CLASSIFIER_OUTPUT)


def test_new_labels_without_names_are_numbered(saved):
    with pytest.warns(UserWarning, match="new classifier"):
        model = FunnelForSequenceClassification.from_pretrained(saved, num_labels=3)
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert model(*padded_batch([9, 5])).shape == (2, 3)


def test_one_label_means_regression(saved):
    with pytest.warns(UserWarning, match="new classifier"):
        model = FunnelForSequenceClassification.from_pretrained(saved, num_labels=1)
    assert (model.config.problem_type, model.config.num_labels) == ("regression", 1)


def test_a_regression_keeps_its_output_under_another_name(tmp_path, no_warnings):
    units = {"label_mean": 5.0, "label_std": 2.0}
    old = FunnelForSequenceClassification(tiny_config(id2label={0: "score"}, problem_type="regression", **units)).eval()
    old.save_pretrained(tmp_path / "old")
    new = FunnelForSequenceClassification.from_pretrained(tmp_path / "old", id2label={0: "quality"})
    assert torch.equal(new(*padded_batch([9, 5])), old(*padded_batch([9, 5])))


def test_a_token_classifiers_outputs_are_matched_by_label(tmp_path, no_warnings):
    old = FunnelForTokenClassification(tiny_config(id2label={0: "a", 1: "b"}))
    old.save_pretrained(tmp_path / "old")
    new = FunnelForTokenClassification.from_pretrained(tmp_path / "old", id2label={0: "b", 1: "a"})
    assert torch.equal(new.classifier.weight, old.classifier.weight.flip(0))
    assert torch.equal(new.classifier.bias, old.classifier.bias.flip(0))


def test_a_multi_label_classifier_remains_one(tmp_path):
    config = tiny_config(problem_type="multi_label_classification", id2label={0: "a", 1: "b"})
    FunnelForSequenceClassification(config).save_pretrained(tmp_path / "old")
    with pytest.warns(UserWarning, match="classifier: 1 of 3 labels kept; new: c, d; dropped: b;"):
        new = FunnelForSequenceClassification.from_pretrained(tmp_path / "old", id2label={0: "a", 1: "c", 2: "d"})
    assert new.config.problem_type == "multi_label_classification"


def test_dropping_labels_needs_no_training(tmp_path, no_warnings):
    old = FunnelForSequenceClassification(tiny_config(id2label={0: "a", 1: "b", 2: "c"}))
    old.save_pretrained(tmp_path / "old")
    new = FunnelForSequenceClassification.from_pretrained(tmp_path / "old", id2label={0: "c", 1: "a"})  # without a warning
    assert torch.equal(new.classifier.linear_out.weight, old.classifier.linear_out.weight[[2, 0]])


def test_the_output_of_a_multiple_choice_model_is_not_a_label(tmp_path, no_warnings):
    model = FunnelForMultipleChoice(tiny_config())
    model.save_pretrained(tmp_path / "old")
    assert_same_weights(FunnelForMultipleChoice.from_pretrained(tmp_path / "old"), model.state_dict())
    warnings.simplefilter("default")
    with pytest.warns(UserWarning, match="new classifier .the weights are those of a FunnelForMultipleChoice"):
        FunnelForSequenceClassification.from_pretrained(tmp_path / "old", num_labels=1)


def test_a_new_layout_and_head_can_be_saved_and_loaded(saved, tmp_path, no_warnings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FunnelForSequenceClassification.from_pretrained(saved, blocks="1,1,1,1", num_labels=3)
    model.save_pretrained(tmp_path / "new")
    loaded = FunnelForSequenceClassification.from_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new/config.json").read_text())["block_sizes"] == [1, 1, 1, 1]
    assert_same_weights(loaded, model.state_dict())

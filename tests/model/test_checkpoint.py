"""Checkpoint folders: atomic writes, and one-line errors for every kind of damage."""

import json
import os
import pickle

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file

from funnel.errors import FunnelError
from funnel.model import checkpoint
from funnel.model.checkpoint import (
    Checkpoint,
    best_checkpoint,
    is_funnel_checkpoint,
    load_checkpoint,
    load_config,
    load_weights,
    read_weight_file,
    save_checkpoint,
)
from funnel.model.heads import FunnelBaseModel, FunnelForSequenceClassification, FunnelModel


@pytest.fixture
def saved(tmp_path):
    """An intact checkpoint folder, for the tests to damage."""
    torch.manual_seed(0)
    FunnelBaseModel(tiny_config()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def assert_load_fails(folder, *words):
    """Both ways of loading fail with a one-line error that contains the words."""

    def load_into_model():
        loaded = load_checkpoint(folder)
        load_weights(FunnelBaseModel(loaded.config), loaded.weights, str(folder))

    for load in (load_into_model, lambda: FunnelBaseModel.from_pretrained(folder)):
        with pytest.raises(FunnelError) as error:
            load()
        message = str(error.value)
        assert "\n" not in message
        for word in words:
            assert word in message


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_missing_folder_is_an_error(tmp_path):
    assert_load_fails(tmp_path / "none", "none", "no such folder")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_an_error(saved, name):
    (saved / name).unlink()
    with pytest.raises(FunnelError, match=f"{name}.*[Nn]o such file"):
        load_checkpoint(saved)
    with pytest.raises(FunnelError, match=r"model\.safetensors" if name == "model.safetensors" else str(saved)):
        FunnelBaseModel.from_pretrained(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "nul\0", '{"a": 1}', "\xff"])
def test_a_damaged_config_is_an_error(saved, text):
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FunnelError, match=r"config\.json"):
        load_checkpoint(saved)
    with pytest.raises(FunnelError, match=r"config\.json"):
        FunnelBaseModel.from_pretrained(saved)


def test_an_unknown_config_field_is_an_error(saved):
    change_config(saved, d_modle=3)
    assert_load_fails(saved, "unknown field 'd_modle'")


def test_a_config_with_different_sizes_is_an_error(saved):
    change_config(saved, d_inner=64)
    assert_load_fails(saved, "ffn.linear_1.weight", "[32, 16]", "[64, 16]")


def test_a_config_with_a_different_layout_is_an_error(saved):
    change_config(saved, block_sizes=[1, 3, 1])
    assert_load_fails(saved, "missing encoder.blocks.1.2.")
    change_config(saved, block_sizes=[1, 1, 1])
    assert_load_fails(saved, "unexpected encoder.blocks.1.1.")


@pytest.mark.parametrize(
    "field", ["vocab_size", "d_model", "n_head", "d_inner", "position_embeddings", "token_type_embeddings"]
)
def test_a_config_of_a_huge_model_is_an_error_before_memory_is_allocated(saved, field):
    change_config(saved, **{field: 9_999_998})
    with pytest.raises(FunnelError, match=r"weights and config do not match: config\.json implies at least"):
        load_checkpoint(saved)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_safetensors_file_is_an_error(saved, size):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert_load_fails(saved, "model.safetensors", "damaged")


def test_a_safetensors_file_with_a_wrong_header_size_is_an_error(saved):
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[:8] = (2**60).to_bytes(8, "little")
    path.write_bytes(bytes(data))
    assert_load_fails(saved, "model.safetensors", "damaged")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error(saved, value):
    weights = load_file(saved / "model.safetensors")
    weights["encoder.blocks.1.0.ffn.linear_1.bias"][3] = value
    save_file(weights, saved / "model.safetensors")
    assert_load_fails(saved, "encoder.blocks.1.0.ffn.linear_1.bias", "1 of 32")


def test_integer_weights_are_an_error(saved):
    weights = load_file(saved / "model.safetensors")
    weights["embeddings.layer_norm.bias"] = weights["embeddings.layer_norm.bias"].int()
    save_file(weights, saved / "model.safetensors")
    assert_load_fails(saved, "embeddings.layer_norm.bias", "torch.int32", "float32")


def test_a_folder_in_another_format_names_the_command_that_converts_it(saved):
    (saved / "config.json").write_text('{"model_type": "bert"}')
    assert not is_funnel_checkpoint(saved)
    for load in (load_checkpoint, load_config):
        with pytest.raises(FunnelError, match=r"funnel convert"):
            load(saved)


@pytest.mark.parametrize("value", ["funnel-2", None])
def test_an_unknown_format_is_named(saved, value):
    change_config(saved, format=value)
    with pytest.raises(FunnelError, match=f"unknown format {value!r}, expected 'funnel-1'"):
        load_checkpoint(saved)


# --- other weight files -----------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return print, ("a pickle ran code",)


@pytest.mark.parametrize("content", [{"a": Malicious()}, Malicious(), [Malicious()]])
def test_pickles_never_run_code(tmp_path, content, capfd):
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    with pytest.raises(FunnelError, match="more than tensors"):
        read_weight_file(path)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(FunnelError, match=r"pytorch_model\.bin"):
        read_weight_file(path)
    assert "ran code" not in capfd.readouterr().out


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 3}, torch.ones(2)])
def test_a_pickle_without_a_dictionary_of_tensors_is_an_error(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(FunnelError, match="not a dictionary of tensors"):
        read_weight_file(tmp_path / "model.pt")


def test_a_truncated_pickle_is_an_error(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.ones(1000)}, path)
    content = path.read_bytes()
    for size in (0, 10, 500, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(FunnelError, match=r"model\.pt"):
            read_weight_file(path)


def test_shards_outside_the_index_files_folder_are_an_error(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(FunnelError, match="not in the same folder"):
        read_weight_file(index)


def test_weights_that_the_index_lists_but_no_shard_has_are_an_error(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "shard.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "shard.safetensors", "b": "shard.safetensors"}}))
    with pytest.raises(FunnelError, match="missing b"):
        read_weight_file(index)


# --- saving -----------------------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_checkpoint_intact(saved, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_weights", fail)
    with pytest.raises(FunnelError, match="No space left"):
        FunnelBaseModel(tiny_config()).save_pretrained(saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_the_old_checkpoint_is_found_after_a_save_was_killed_between_its_renames(saved):
    expected = FunnelBaseModel.from_pretrained(saved).state_dict()
    saved.rename(saved.with_name(".model.old"))
    loaded = FunnelBaseModel.from_pretrained(saved).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    FunnelBaseModel(tiny_config()).save_pretrained(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_replaced_checkpoint_contains_nothing_of_the_old_one(saved):
    (saved / "evaluation.json").write_text("old")
    model = FunnelForSequenceClassification(tiny_config())
    save_checkpoint(saved, Checkpoint(model.config, model.state_dict(), type(model).__name__))
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert load_checkpoint(saved).architecture == "FunnelForSequenceClassification"


def test_extra_files_become_part_of_the_checkpoint(saved):
    model = FunnelBaseModel(tiny_config())
    extra = lambda folder: (folder / "tokenizer.json").write_text("{}")  # noqa: E731
    save_checkpoint(saved, Checkpoint(model.config, model.state_dict(), "FunnelBaseModel"), extra, keep=2)
    assert (saved / "tokenizer.json").read_text() == "{}"
    assert not (saved.with_name("model-1") / "tokenizer.json").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_file_permissions_follow_the_umask(tmp_path, umask):
    previous = os.umask(umask)
    try:
        FunnelBaseModel(tiny_config()).save_pretrained(tmp_path / "model")
    finally:
        os.umask(previous)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o666 & ~umask}


def test_save_pretrained_keeps_the_tokenizer_and_refuses_to_delete_other_files(tmp_path):
    model = FunnelBaseModel(tiny_config())
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model/tokenizer.json").read_text() == "{}"
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FunnelError, match="contains other files"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").exists()


# --- loading into models ----------------------------------------------------------------------------------------------


def test_load_weights_returns_the_head_weights_that_it_did_not_load():
    weights = FunnelForSequenceClassification(tiny_config()).state_dict()
    three_labels = FunnelForSequenceClassification(tiny_config(id2label={0: "a", 1: "b", 2: "c"}))
    assert load_weights(three_labels, weights, "source") == ["classifier.linear_out.weight", "classifier.linear_out.bias"]
    assert torch.equal(three_labels.classifier.linear_hidden.weight, weights["classifier.linear_hidden.weight"])


def test_load_weights_ignores_a_decoder_that_the_model_does_not_have():
    weights = FunnelModel(tiny_config()).state_dict()
    assert load_weights(FunnelBaseModel(tiny_config()), weights, "source") == []
    with pytest.raises(FunnelError, match=r"source: .*missing decoder\.layers\.0\."):
        load_weights(FunnelModel(tiny_config()), FunnelBaseModel(tiny_config()).state_dict(), "source")


def test_a_run_resolves_to_the_checkpoint_in_best(saved):
    assert best_checkpoint(saved) == saved
    run = saved.parent
    (run / "run.json").write_text("{}")
    with pytest.raises(FunnelError, match="no best checkpoint yet"):
        best_checkpoint(run)
    saved.rename(run / "best")
    assert best_checkpoint(run) == run / "best"


def test_save_pretrained_refuses_to_replace_a_file(tmp_path):
    (tmp_path / "data.csv").write_text("mine")
    with pytest.raises(FunnelError, match="expected a folder, found a file"):
        FunnelBaseModel(tiny_config()).save_pretrained(tmp_path / "data.csv")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"data.csv": "mine"}


def test_an_onnx_export_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.onnx").touch()
    with pytest.raises(FunnelError, match="an ONNX export, which only onnxruntime reads; use the checkpoint it was made from"):
        load_checkpoint(tmp_path)

"""Checkpoint folders: whole or not at all, and every kind of damage told in one line."""

import json
import os
import pickle

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file

from funnel.errors import FunnelError
from funnel.model import checkpoint
from funnel.model.heads import FunnelBaseModel, FunnelForSequenceClassification


@pytest.fixture
def saved(tmp_path):
    """A good checkpoint, to be damaged."""
    torch.manual_seed(0)
    FunnelBaseModel(tiny_config()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def expect_error(folder, *words):
    with pytest.raises(FunnelError) as error:
        FunnelBaseModel.from_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_folder(tmp_path):
    expect_error(tmp_path / "none", "none", "no such folder")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(saved, name):
    (saved / name).unlink()
    expect_error(saved, name, "no such file")


@pytest.mark.parametrize("text", ["", "{", "[]", "nul\0", '{"a": 1}', "\xff"])
def test_a_damaged_config(saved, text):
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    expect_error(saved, "config.json")


def test_an_unknown_field(saved):
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**values, "d_modle": 3}))
    expect_error(saved, "d_modle")


def test_a_config_of_other_sizes(saved):
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**values, "d_inner": 64}))
    expect_error(saved, "ffn.linear_1.weight", "[32, 16]", "[64, 16]")


def test_a_config_of_another_layout(saved):
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**values, "block_sizes": [1, 3, 1]}))
    expect_error(saved, "missing encoder.blocks.1.2.")
    (saved / "config.json").write_text(json.dumps({**values, "block_sizes": [1, 1, 1]}))
    expect_error(saved, "left over encoder.blocks.1.1.")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_cut_off_safetensors_file(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    expect_error(saved, "model.safetensors", "damaged")


def test_a_safetensors_header_that_lies(saved):
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[:8] = (2**60).to_bytes(8, "little")
    path.write_bytes(bytes(data))
    expect_error(saved, "model.safetensors", "damaged")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(saved, bad):
    weights = load_file(saved / "model.safetensors")
    weights["encoder.blocks.1.0.ffn.linear_1.bias"][3] = bad
    save_file(weights, saved / "model.safetensors")
    expect_error(saved, "encoder.blocks.1.0.ffn.linear_1.bias", "1 of 32")


def test_a_folder_of_another_format_says_how_to_bring_it_in(saved):
    (saved / "config.json").write_text('{"model_type": "bert"}')
    expect_error(saved, "convert_weights.py")


class Bomb:
    def __reduce__(self):
        return print, ("a pickle ran code",)


@pytest.mark.parametrize("content", [{"a": Bomb()}, Bomb(), [Bomb()]])
def test_pickles_never_run(tmp_path, content, capfd):
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    with pytest.raises(FunnelError, match="more than tensors"):
        checkpoint.read_weights(path)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(FunnelError, match=r"pytorch_model\.bin"):
        checkpoint.read_weights(path)
    assert "ran code" not in capfd.readouterr().out


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 3}, torch.ones(2)])
def test_a_pickle_that_is_no_table_of_tensors(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(FunnelError, match="table of tensors"):
        checkpoint.read_weights(tmp_path / "model.pt")


def test_a_cut_off_pickle(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.ones(1000)}, path)
    for keep in (0, 10, 500, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(FunnelError, match=r"model\.pt"):
            checkpoint.read_weights(path)


def test_shards_must_lie_in_their_own_folder(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(FunnelError, match="not in its own folder"):
        checkpoint.read_weights(index)


def test_a_failed_save_leaves_the_old_checkpoint(saved, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_weights", fail)
    with pytest.raises(FunnelError, match="No space left"):
        FunnelBaseModel(tiny_config()).save_pretrained(saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_a_save_that_died_between_its_renames_is_found(saved):
    expected = FunnelBaseModel.from_pretrained(saved).state_dict()
    saved.rename(saved.with_name(".model.old"))
    found = FunnelBaseModel.from_pretrained(saved).state_dict()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    FunnelBaseModel(tiny_config()).save_pretrained(saved)
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_a_replaced_checkpoint_has_nothing_of_the_old_one(saved):
    (saved / "evaluation.json").write_text("old")
    model = FunnelForSequenceClassification(tiny_config())
    checkpoint.save(saved, model.config, model.state_dict(), type(model).__name__)
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((saved / "config.json").read_text())["architectures"] == ["FunnelForSequenceClassification"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path, umask):
    former = os.umask(umask)
    try:
        FunnelBaseModel(tiny_config()).save_pretrained(tmp_path / "model")
    finally:
        os.umask(former)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o666 & ~umask}


def test_saving_loses_no_other_files(tmp_path):
    """What the checkpoint does not have is either kept (the tokenizer) or refused, never removed."""
    model = FunnelBaseModel(tiny_config())
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model/tokenizer.json").read_text() == "{}"
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FunnelError, match="has other files"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "thesis.txt").exists()

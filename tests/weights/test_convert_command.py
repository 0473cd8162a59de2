"""`funnel convert` and convert_weights.py: what they print, and that errors leave nothing behind."""

import json

import pytest
import torch
from conftest import run_command, tiny_config
from safetensors.torch import load_file, save_file
from weight_sources import are_equal, make_bert_folder, make_transformers_folder, transformers

import convert_weights
from funnel.cli.convert import convert
from funnel.cli.main import main as funnel_main
from funnel.errors import FunnelError
from funnel.model.checkpoint import load_checkpoint
from funnel.model.heads import FunnelBaseModel, FunnelForSequenceClassification
from funnel.weights.load import read_source_config


def test_summary_says_what_was_read_left_out_and_written(tmp_path):
    make_transformers_folder(tmp_path / "source", "FunnelForMaskedLM")
    weights = load_file(tmp_path / "source/model.safetensors")
    weights["lm_head.weight"] = weights["funnel.embeddings.word_embeddings.weight"].clone()
    save_file(weights, tmp_path / "source/model.safetensors")
    done = run_command("convert_weights.py", "source", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "read      source: transformers format, FunnelForMaskedLM, blocks 1,2" in done.stdout
    assert "unused    lm_head.weight (tied to the word embeddings)" in done.stdout
    assert "config.json, model.safetensors, tokenizer.json" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def rename_weight(weights):
    weights["stray"] = weights.pop("funnel.encoder.blocks.0.0.ffn.linear_1.bias")


def reshape_weight(weights):
    weights["funnel.encoder.blocks.0.0.ffn.linear_1.bias"] = torch.zeros(7)


def make_non_finite(weights):
    weights["funnel.encoder.blocks.0.0.ffn.linear_1.bias"][0] = torch.nan


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (rename_weight, ["missing encoder.blocks.0.0.ffn.linear_1.bias", "unexpected stray"]),
        (reshape_weight, ["encoder.blocks.0.0.ffn.linear_1.bias", "[7]", "[32]"]),
        (make_non_finite, ["encoder.blocks.0.0.ffn.linear_1.bias", "not finite"]),
    ],
)
def test_mismatched_weights_print_one_line_and_write_nothing(damage, words, tmp_path):
    folder = make_transformers_folder(tmp_path / "source")
    weights = load_file(folder / "model.safetensors")
    damage(weights)
    save_file(weights, folder / "model.safetensors")
    done = run_command("convert_weights.py", "source", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("convert_weights.py: error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_file_is_named(missing, tmp_path):
    folder = make_transformers_folder(tmp_path / "source")
    (folder / missing).unlink()
    with pytest.raises(FunnelError, match=missing.replace(".", r"\.")):
        convert(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def save_native(folder):
    FunnelBaseModel(tiny_config()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make_folder", [make_transformers_folder, save_native])
@pytest.mark.parametrize("to", ["funnel", "huggingface"])
def test_weights_without_a_tokenizer_are_converted_with_a_warning(make_folder, to, tmp_path):
    folder = make_folder(tmp_path / "source")
    (folder / "vocab.txt").unlink(missing_ok=True)
    with pytest.warns(UserWarning, match=r"source: no tokenizer found; copy the model's .* into .*out"):
        convert(str(folder), tmp_path / "out", to)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_family_of_a_bert_like_model_is_printed(tmp_path, capsys):
    make_bert_folder(tmp_path / "source", kind="ALBERT")
    convert(str(tmp_path / "source"), tmp_path / "out")
    assert f"read      {tmp_path / 'source'}: ALBERT format, FunnelBaseModel, blocks 1x4" in capsys.readouterr().out


def test_bert_is_written_in_its_own_format(tmp_path):
    peer = make_bert_folder(tmp_path / "source", "ForSequenceClassification")
    convert(str(tmp_path / "source"), tmp_path / "ours")
    convert(str(tmp_path / "ours"), tmp_path / "out", "huggingface")
    written = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(written) is type(peer)
    assert are_equal(written.state_dict(), peer.state_dict())
    tokenizer_config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert tokenizer_config["model_max_length"] == 40  # position embeddings


def test_model_that_transformers_does_not_have_is_one_line_and_writes_nothing(tmp_path):
    make_bert_folder(tmp_path / "source")
    config = read_source_config(tmp_path / "source").replace(blocks="2,2")
    FunnelForSequenceClassification(config).save_pretrained(tmp_path / "deep")
    done = run_command("convert_weights.py", "deep", "out", "--to", "huggingface", cwd=tmp_path)
    assert done.returncode == 2
    message = "transformers has no BERT with pooling (blocks 2,2); export it to ONNX instead"
    assert done.stderr.strip().splitlines()[-1] == f"convert_weights.py: error: {message}"
    assert not (tmp_path / "out").exists()


def test_existing_output_folder_is_not_touched(tmp_path):
    make_transformers_folder(tmp_path / "source")
    (tmp_path / "out").mkdir()
    with pytest.raises(FunnelError, match="out already exists; choose a new folder"):
        convert(str(tmp_path / "source"), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_error_about_the_source_names_no_flag(tmp_path):
    with pytest.raises(FunnelError, match=r"^invalid SOURCE 'no-such-folder': no such folder") as error:
        convert("no-such-folder", tmp_path / "out")
    assert error.value.parameter is None


def test_subcommand_and_script_are_equivalent(tmp_path, capsys):
    make_transformers_folder(tmp_path / "source")
    assert funnel_main(["convert", str(tmp_path / "source"), str(tmp_path / "first")]) == 0
    assert convert_weights.main([str(tmp_path / "source"), str(tmp_path / "second")]) == 0
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("wrote"))
    assert second == first.replace("first", "second")
    assert are_equal(load_checkpoint(tmp_path / "first").weights, load_checkpoint(tmp_path / "second").weights)

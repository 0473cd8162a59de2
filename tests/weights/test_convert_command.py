"""`funnel convert` and convert_weights.py: what they print, and that errors leave nothing behind."""

import pytest
import torch
from conftest import run_command, tiny_config
from safetensors.torch import load_file, save_file
from weight_sources import are_equal, make_bert_folder, make_transformers_folder

import convert_weights
from funnel.cli.convert import convert
from funnel.cli.main import main as funnel_main
from funnel.errors import FunnelError
from funnel.model.checkpoint import load_checkpoint
from funnel.model.heads import FunnelBaseModel


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


def test_converting_a_bert_requires_its_tokenizer(tmp_path):
    make_bert_folder(tmp_path / "source")
    (tmp_path / "source/vocab.txt").unlink()
    with pytest.raises(FunnelError, match=r"source: no tokenizer found, but converting a BERT requires the id of \[CLS\]"):
        convert(str(tmp_path / "source"), tmp_path / "out")
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

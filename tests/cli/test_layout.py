"""`funnel layout`."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, tiny_config

from funnel.cli.main import main
from funnel.model.config import FunnelConfig, released_config
from funnel.model.flops import total_flops
from funnel.model.heads import FunnelForSequenceClassification
from funnel.weights import from_original, load


def test_shows_costs_and_plan(capsys):
    assert main(["layout", "--blocks", "4,4,4,2"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^block 3 +2 +16 +64 ", output, re.MULTILINE)
    assert "layer 2.3: keep from 2.3\nlayer 3.0: identity from 2.0\nlayer 3.1: identity from 2.1" in output
    config = tiny_config(vocab_size=30522, d_model=768, n_head=12, d_head=64, d_inner=3072, num_decoder_layers=0)
    model = FunnelForSequenceClassification(config.replace(blocks="4,4,4,2"))
    assert f"{sum(p.numel() for p in model.parameters()):,}" in output


def test_table_shows_repeats_shares_and_totals(capsys):
    assert main(["layout", "--blocks", "2,3x2"]) == 0
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    header, *rows, total = (re.split(r"  +", line) for line in table)
    columns = ["length at 128", "length at 512", "parameters", "GFLOPs at 128", "GFLOPs at 512", "MiB at 128", "MiB at 512"]
    assert header[1:] == ["layers", *columns]
    assert [row[0] for row in rows] == ["embeddings", "block 0", "block 1", "head"]
    assert rows[2][1:4] == ["3 x 2", "64", "256"]
    assert total[0] == "total"
    parameters = [int(row[-6].replace(",", "")) for row in rows]
    assert sum(parameters) == int(total[1].replace(",", ""))
    assert sum(int(row[-5].rstrip("%")) for row in rows) in range(98, 103)


@pytest.mark.parametrize(
    ("weights", "against", "paper", "at_128", "at_512"),
    [
        ("xlarge", "24", (0.73, 1.22), 0.75, 0.73),
        ("large", "24", (0.58, 1.00), 0.60, 0.59),
        ("intermediate", "12", (0.88, 1.39), 0.93, 0.91),
        ("medium", "12", (0.88, 1.00), 0.93, 0.91),
        ("small", "12", (0.58, 1.00), 0.62, 0.61),
    ],
)
def test_relative_costs_agree_with_the_paper(weights, against, paper, at_128, at_512, capsys):
    """The paper's table 2 counts positions times layers. We also count the keys and values that a pooling layer computes
    at the previous block's length, and attention scores."""
    blocks = released_config(weights).blocks
    positions = sum(block.runs / 2**number for number, block in enumerate(blocks))
    assert positions / int(against) == pytest.approx(paper[0], abs=0.006)
    assert main(["layout", "--weights", weights, "--against", against]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("compared with"))
    *flops, parameters = (float(number) for number in re.findall(r"(\d+\.\d+) of", line))
    assert flops == [at_128, at_512]
    assert paper[0] - 0.006 < flops[1] <= flops[0] < paper[0] + 0.06
    assert parameters == pytest.approx(paper[1], abs=0.011)


def test_reads_a_checkpoint_and_a_layout_plan(tmp_path, capsys):
    FunnelForSequenceClassification(tiny_config(num_decoder_layers=0)).save_pretrained(tmp_path / "weights")
    layers = [{"layer": "0.0", "start": "copy", "source": "1.1"}, {"layer": "1.0", "start": "random"}]
    (tmp_path / "plan.json").write_text(json.dumps({"layers": layers}))
    options = ["--weights", str(tmp_path / "weights"), "--blocks", "1,1", "--layout-plan", str(tmp_path / "plan.json")]
    assert main(["layout", *options]) == 0
    assert "layer 0.0: copy from 1.1\nlayer 1.0: random" in capsys.readouterr().out


@pytest.mark.parametrize(("source", "layout"), [("run", "1,2,1"), ("bert", "4"), ("original", "2,1x2")])
def test_reads_configs_of_every_format_without_weights(source, layout, tmp_path, capsys):
    if source == "run":
        FunnelForSequenceClassification(tiny_config(num_decoder_layers=0)).save_pretrained(tmp_path / "best")
        (tmp_path / "run.json").write_text("{}")
    elif source == "bert":
        bert_config(tmp_path)
    else:
        values = {**dict.fromkeys(from_original.FIELDS.values(), 8), "block_size": "2_1x2", "dropout": 0.1, "dropatt": 0.1,
                  "dropact": 0.0, "pooling_type": "mean", "separate_cls": True, "pool_q_only": True}  # fmt: skip
        (tmp_path / from_original.CONFIG).write_text(json.dumps(values))
    assert main(["layout", "--weights", str(tmp_path), "--blocks", "1,1"]) == 0
    assert f"({layout})" in capsys.readouterr().out.splitlines()[0]


def test_tiny_is_the_model_in_the_package(tmp_path, monkeypatch, capsys):
    FunnelForSequenceClassification(tiny_config(num_decoder_layers=0)).save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(load, "TINY_FOLDER", tmp_path / "tiny")
    assert main(["layout", "--weights", "tiny", "--blocks", "1,1"]) == 0
    assert "d_model 16, classifier without decoder, weights from tiny (1,2,1)" in capsys.readouterr().out


def bert_config(folder: Path, **changes) -> str:
    """Writes the config of a BERT of 4 layers, without weights; returns the folder's name."""
    values = {"model_type": "bert", "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
              "intermediate_size": 64, **changes}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def test_costs_of_a_bert_are_relative_to_its_own_layout(tmp_path, capsys):
    bert = bert_config(tmp_path)
    config = FunnelConfig(vocab_size=99, blocks="4", d_model=32, n_head=4, d_head=8, d_inner=64, num_decoder_layers=0,
                          relative_attention=False, position_embeddings=512, token_type_embeddings=2)  # fmt: skip
    for against in ("4", "2,2"):
        assert main(["layout", "--weights", bert, "--blocks", "2,1,1", "--against", against]) == 0
        output = capsys.readouterr().out
        flops = [total_flops(config.replace(blocks=layout), 128) for layout in ("2,1,1", against)]
        assert f"compared with {against}: {flops[0] / flops[1]:.2f} of its FLOPs at 128 tokens" in output
        assert "1.00 of its parameters" in output
        assert "layer 0.1: keep from 0.1\nlayer 1.0: keep from 0.2\nlayer 2.0: keep from 0.3" in output


def test_costs_are_shown_up_to_the_number_of_positions(tmp_path, capsys):
    for positions, lengths in ((200, ["128", "200"]), (80, ["80"])):
        assert main(["layout", "--weights", bert_config(tmp_path, max_position_embeddings=positions)]) == 0
        output = capsys.readouterr().out
        assert re.findall(r"GFLOPs at (\d+)", output) == lengths
        assert re.findall(r"FLOPs at (\d+) tokens", output) == lengths


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--blocks", "2,0"), "--blocks '2,0'"),
        (("--against", "0"), "--against 0"),
        (("--weights", "huge"), "huge"),
        (("--init", "magic"), "--init 'magic'"),
        (("--keep", "none"), "--keep 'none'"),
        (("--layout-plan", "missing.json"), "missing.json"),
        (("--plot", "pyproject.toml/funnel.png"), "pyproject.toml is not a writable folder"),
        (("--plot", "funnel.xyz"), "--plot funnel.xyz: unknown image format; expected a name in .png, .svg, .pdf"),
        (("--plot", "runs"), "--plot runs: unknown image format"),
        (("--layout-plan", "plan.json", "--init", "copy"), "--init has no effect with a layout plan"),
    ],
)
def test_invalid_values_print_one_line_and_exit_with_status_2(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    if "--plot" in arguments:
        pytest.importorskip("matplotlib", reason="needs the extra plot")
    assert main(["layout", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_plots_the_layout(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    assert main(["layout", "--blocks", "2,2,2x2", "--plot", str(tmp_path / "funnel.png")]) == 0
    assert (tmp_path / "funnel.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_replaces_a_file_only_with_overwrite(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    path = tmp_path / "funnel.svg"
    path.write_text("mine")
    assert main(["layout", "--blocks", "1", "--plot", str(path)]) == 2
    assert capsys.readouterr().out == ""
    assert path.read_text() == "mine"
    assert main(["layout", "--blocks", "1", "--plot", str(path), "--overwrite"]) == 0
    assert "<svg" in path.read_text()

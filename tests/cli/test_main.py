"""python -m funnel: what it prints and what it refuses."""

import json
import re
import subprocess
import sys
import warnings

import pytest
from conftest import ROOT, tiny_config

import convert_weights
import train
from funnel.cli.common import run_command
from funnel.cli.main import main
from funnel.errors import FunnelError
from funnel.model.config import released_config
from funnel.model.heads import FunnelForSequenceClassification
from funnel.weights import from_original


def test_layout_shows_costs_and_plan(capsys):
    assert main(["layout", "--blocks", "4,4,4,2"]) == 0
    out = capsys.readouterr().out
    assert "block 3          2      16      64" in out
    assert "layer 2.3 keep of 2.3\nlayer 3.0 identity of 2.0\nlayer 3.1 identity of 2.1" in out
    model = FunnelForSequenceClassification(tiny_config(vocab_size=30522, block_sizes=(4, 4, 4, 2), d_model=768, n_head=12, d_head=64,
                                                 d_inner=3072, num_decoder_layers=0))  # fmt: skip
    assert f"{sum(p.numel() for p in model.parameters()):,}" in out


@pytest.mark.parametrize(
    ("weights", "against", "paper", "ours_at_128", "ours_at_512"),
    [
        ("xlarge", "24", (0.73, 1.22), 0.75, 0.73),
        ("large", "24", (0.58, 1.00), 0.60, 0.59),
        ("intermediate", "12", (0.88, 1.39), 0.93, 0.91),
        ("medium", "12", (0.88, 1.00), 0.93, 0.91),
        ("small", "12", (0.58, 1.00), 0.62, 0.61),
    ],
)
def test_the_papers_relative_costs(weights, against, paper, ours_at_128, ours_at_512, capsys):
    """Table 2. The paper's FLOPs are the share of the positions at which layers run; ours also have the keys and values
    that a pooling layer computes at the former length, and attention's scores."""
    config = released_config(weights)
    shares = [r * n / 2**b for b, (n, r) in enumerate(zip(config.block_sizes, config.repeats, strict=True))]
    assert sum(shares) / int(against) == pytest.approx(paper[0], abs=0.006)
    assert main(["layout", "--weights", weights, "--against", against]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("against"))
    at_128, at_512, parameters = (float(x) for x in re.findall(r"(\d+\.\d+) of", line))
    assert (at_128, at_512) == (ours_at_128, ours_at_512)
    assert paper[0] - 0.006 < at_512 <= at_128 < paper[0] + 0.06
    assert parameters == pytest.approx(paper[1], abs=0.011)


def test_layout_reads_a_checkpoint_and_a_plan(tmp_path, capsys):
    FunnelForSequenceClassification(tiny_config(num_decoder_layers=0)).save_pretrained(tmp_path / "mine")
    rows = [{"layer": "0.0", "start": "copy", "source": "1.1"}, {"layer": "1.0", "start": "random"}]
    (tmp_path / "plan.json").write_text(json.dumps({"layers": rows}))
    arguments = ["layout", "--weights", str(tmp_path / "mine"), "--blocks", "1,1", "--layout-plan", str(tmp_path / "plan.json")]
    assert main(arguments) == 0
    assert "layer 0.0 copy of 1.1\nlayer 1.0 random" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["run", "bert", "original"])
def test_layout_reads_configs_of_every_format_without_weights(kind, tmp_path, capsys):
    if kind == "run":
        FunnelForSequenceClassification(tiny_config(num_decoder_layers=0)).save_pretrained(tmp_path / "best")
        (tmp_path / "run.json").write_text("{}")
    elif kind == "bert":
        values = {"model_type": "bert", "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
                  "intermediate_size": 64}  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(values))
    else:
        values = {**dict.fromkeys(from_original.FIELDS.values(), 8), "block_size": "2_1x2", "dropout": 0.1, "dropatt": 0.1,
                  "dropact": 0.0, "pooling_type": "mean", "separate_cls": True, "pool_q_only": True}  # fmt: skip
        (tmp_path / from_original.CONFIG).write_text(json.dumps(values))
    assert main(["layout", "--weights", str(tmp_path), "--blocks", "1,1"]) == 0
    layout = {"run": "1,2,1", "bert": "2,1,1", "original": "2,1x2"}[kind]
    assert f"({layout})" in capsys.readouterr().out.splitlines()[0]


def test_an_error_has_a_traceback_with_debug_only(capsys):
    assert main(["layout", "--blocks", "x"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(FunnelError, match="'x' is no block"):
        main(["--debug", "layout", "--blocks", "x"])


def test_standard_output_that_is_full_or_closed_is_no_traceback():
    """As head closes it behind the lines that it wants, and as a full disk ends a log."""
    command = f"{sys.executable} -m funnel layout"
    full = subprocess.run(f"{command} > /dev/full", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert full.returncode == 2
    assert full.stderr == "funnel: error: [Errno 28] No space left on device\n"
    script = (
        f"import os, subprocess; r, w = os.pipe(); os.close(r); print(subprocess.run({command.split()}, stdout=w).returncode)"
    )
    closed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (closed.stdout, closed.stderr) == ("141\n", "")


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        (main, ("layout", "--colour"), "--colour"),
        (main, ("predict",), "required: RUN;"),
        (main, (), "required: COMMAND"),
        (train.main, ("--epochs", "many"), "--epochs: invalid float value: 'many'"),
        (convert_weights.main, ("here",), "required: out"),
    ],
)
def test_arguments_that_no_command_knows_are_told_in_one_line(program, arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        program(list(arguments))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--blocks", "2,0"), "'0' is no block"),
        (("--against", "0"), "'0' is no block"),
        (("--weights", "tiny"), "no such released model"),
        (("--layout-plan", "missing.json"), "missing.json"),
        (("--plot", "no/such/folder/funnel.png"), "cannot be written"),
    ],
)
def test_mistakes_are_one_line_with_status_2(arguments, words, capsys):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib", reason="needs the extra plot")
    assert main(["layout", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_the_funnel_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    assert main(["layout", "--blocks", "2,2,2x2", "--plot", str(tmp_path / "funnel.png")]) == 0
    assert (tmp_path / "funnel.png").read_bytes().startswith(b"\x89PNG")


def test_a_warning_is_one_line(capsys):
    assert run_command("x", lambda: warnings.warn("something\nodd", stacklevel=2)) == 0
    assert capsys.readouterr().err == "x: warning: something odd\n"

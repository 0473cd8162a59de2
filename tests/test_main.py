"""python -m funnel: what it prints and what it refuses."""

import json

import pytest
from conftest import tiny

from funnel.__main__ import main
from funnel.heads import FunnelForSequenceClassification


def test_layout_shows_costs_and_plan(capsys):
    assert main(["layout", "--blocks", "4,4,4,2"]) == 0
    out = capsys.readouterr().out
    assert "block 3          2      16      64" in out
    assert "layer 2.3 keep of 2.3\nlayer 3.0 identity of 2.0\nlayer 3.1 identity of 2.1" in out
    model = FunnelForSequenceClassification(tiny(vocab_size=30522, block_sizes=(4, 4, 4, 2), d_model=768, n_head=12, d_head=64,
                                                 d_inner=3072, num_decoder_layers=0))  # fmt: skip
    assert f"{sum(p.numel() for p in model.parameters()):,}" in out


def test_the_papers_shorter_models_cost_what_the_paper_says(capsys):
    """Table 2: B6-3x2-3x2 has the FLOPs of B6-6-6 and the parameters of a 12-layer model."""
    assert main(["layout", "--blocks", "6,3x2,3x2", "--weights", "medium"]) == 0
    out = capsys.readouterr().out
    assert "FLOPs at 128: 1.00 of 6,3x2,3x2" in out
    assert "3 x 2" in out


def test_layout_reads_a_checkpoint_and_a_plan(tmp_path, capsys):
    FunnelForSequenceClassification(tiny(num_decoder_layers=0)).save_pretrained(tmp_path / "mine")
    rows = [{"layer": "0.0", "start": "copy", "source": "1.1"}, {"layer": "1.0", "start": "random"}]
    (tmp_path / "plan.json").write_text(json.dumps({"layers": rows}))
    arguments = ["layout", "--weights", str(tmp_path / "mine"), "--blocks", "1,1", "--layout-plan", str(tmp_path / "plan.json")]
    assert main(arguments) == 0
    assert "layer 0.0 copy of 1.1\nlayer 1.0 random" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--blocks", "2,0"), "'0' is no block"),
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

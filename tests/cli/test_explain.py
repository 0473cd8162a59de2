"""`funnel explain`."""

import json

from funnel.analysis.rollout import Explanation, Position
from funnel.cli.explain import LEGEND, format_explanation
from funnel.cli.main import main
from funnel.inference.classifier import Prediction


def write_settings(run, **settings):
    (run / "run.json").write_text(json.dumps({"version": 2, "command": "x", "settings": settings}))


def test_prints_tokens_and_every_block(classifier_folder, capsys):
    assert main(["explain", str(classifier_folder), "the very good film"]) == 0
    output = capsys.readouterr().out
    assert "very good" in output
    assert output.count("block") == 3


def test_bars_are_proportional_to_contributions():
    blocks = [[Position([0], 0.25), Position([1], 0.75)], [Position([0, 1], 1.0)]]
    explanation = Explanation([" [CLS]", " good"], [0.2, 0.8], blocks, Prediction("yes", 0.9, {"yes": 0.9, "no": 0.1}))
    assert format_explanation(explanation).splitlines() == [
        "yes (90.0%)",
        *LEGEND.splitlines(),
        "",
        "tokens: 2 positions",
        f"   20.0% {'#' * 10:<40} [CLS]",
        f"   80.0% {'#' * 40} good",
        "",
        "block 0: 2 positions",
        f"   25.0% {'#' * 13:<40} [CLS]",
        f"   75.0% {'#' * 40} good",
        "",
        "block 1: 1 position",
        f"  100.0% {'#' * 40} [CLS] good",
    ]
    assert format_explanation(explanation._replace(prediction=Prediction(2.5, None, {}))).startswith("2.5\n")


def test_pairs_must_match_the_training_texts(classifier_folder, capsys):
    run = classifier_folder.parent
    write_settings(run, columns=["first", "second"])
    assert main(["explain", str(run), "a film"]) == 2
    assert "--pair is required" in capsys.readouterr().err
    write_settings(run, columns=["text"])
    assert main(["explain", str(run), "a", "--pair", "b"]) == 2
    assert "was trained on single texts (text), not on pairs" in capsys.readouterr().err


def test_truncation_prints_a_warning(classifier_folder, capsys):
    write_settings(classifier_folder.parent, max_length=6, columns=["text"])
    assert main(["explain", str(classifier_folder.parent), "good " * 5]) == 0
    assert "warning: 1 text was truncated to 6 tokens" in capsys.readouterr().err
    assert main(["explain", str(classifier_folder.parent), "good"]) == 0
    assert "warning" not in capsys.readouterr().err

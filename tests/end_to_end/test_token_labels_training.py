"""Token labels from training to predictions: files, a resumed run, exports, a report."""

import json
import random
from pathlib import Path

import pytest
import torch

import train
from funnel import TokenClassifier
from funnel.cli.main import main
from funnel.model.checkpoint import load_checkpoint

PLACES = ["york", "paris", "rome", "new york", "rio de janeiro"]


def write_sentences(path: Path, n: int, seed: int) -> None:
    """Sentences such as "i saw rome" in which places are marked; a few are longer than the maximum length."""
    generator, lines = random.Random(seed), []
    for number in range(n):
        for _ in range(8 if number % 10 == 0 else 1):
            place = generator.choice(PLACES).split()
            lines += [f"{word}\tO" for word in generator.choice(["i saw", "he is in", "the film of"]).split()]
            lines += [f"{word}\t{'I' if i else 'B'}-place" for i, word in enumerate(place)]
        lines.append("")
    path.write_text("\n".join(lines))


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    write_sentences(tmp_path / "train.conll", 60, seed=0)
    write_sentences(tmp_path / "dev.conll", 20, seed=1)
    options = [
        "--weights",
        "none",
        "--blocks",
        "1,1",
        "--max-length",
        "16",
        "--batch-size",
        "8",
        "--lr",
        "2e-3",
        "--dtype",
        "fp32",
    ]
    return ["--data", str(tmp_path), "--steps", "40", "--device", "cpu", *options]


def test_a_model_learns_tags_from_training_to_the_report(arguments, tmp_path, capsys):
    assert train.main([*arguments, "--eval-every", "20", "--out", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    assert "IOB2 tags, 1 type of entities: place" in output
    assert "training windows" in output
    scores = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert scores[-1]["f1"] > 0.9
    first, second = TokenClassifier.load(tmp_path / "run", "cpu")("I saw Rome  he is in New\nYork " * 3)[:2]
    assert (first.text, first.label, second.text, second.label) == ("Rome", "place", "New\nYork", "place")
    assert main(["evaluate", str(tmp_path / "run"), str(tmp_path / "dev.conll")]) == 0
    assert f"f1 {scores[-1]['f1']:.4f}" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "place" in (tmp_path / "run/report.html").read_text()


def test_a_stopped_run_resumes_bit_for_bit(arguments, tmp_path, monkeypatch):
    options = [*arguments, "--save-every", "5", "--eval-every", "10", "--label-smoothing", "0.1", "--class-weights", "balanced"]
    options[options.index("40")] = "15"
    assert train.main([*options, "--out", str(tmp_path / "whole")]) == 0
    take_step, steps = train.train_step, []

    def interrupted(*args, **kwargs):
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return take_step(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert train.main([*options, "--out", str(tmp_path / "stopped")]) != 0
    monkeypatch.undo()
    assert train.main(["--resume", "--out", str(tmp_path / "stopped")]) == 0
    expected, actual = (load_checkpoint(tmp_path / name / "last").weights for name in ("whole", "stopped"))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)

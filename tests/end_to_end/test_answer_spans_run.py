"""Answer spans from training to predictions: a small model learns to find names and cities."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from squad_files import squad, write

import train
from funnel.cli.main import main
from funnel.model.checkpoint import load_checkpoint

OPTIONS = [
    "--weights",
    "none",
    "--blocks",
    "1,1",
    "--batch-size",
    "8",
    "--lr",
    "2e-3",
    "--layer-lr-decay",
    "1",
    "--device",
    "cpu",
]
LENGTHS = ["--max-length", "24", "--max-query-length", "8", "--doc-stride", "4"]  # several windows per context


def run_training(data: Path, out: Path, *more: str) -> int:
    return train.main([*OPTIONS, *LENGTHS, "--data", str(data), "--out", str(out), *more])


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_answer_spans_from_training_to_predictions(tmp_path, capsys):
    data, run = write(tmp_path / "two.json", squad(12, unanswerable=True)), tmp_path / "run"
    assert run_training(data, run, "--steps", "150", "--eval-every", "75") == 0
    output = capsys.readouterr().out
    assert "dev is split off by article" in output
    assert [line for line in log_of(run) if line["split"] == "dev"][-1]["f1"] > 0.8
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert (settings["doc_stride"], settings["max_query_length"], settings["columns"]) == (4, 8, ["question", "context"])
    config = json.loads((run / "best/config.json").read_text())
    assert config["decision_threshold"] is not None

    assert main(["evaluate", str(run), str(data)]) == 0
    assert "has-answer f1" in capsys.readouterr().out
    assert main(["predict", str(run), "--file", str(data), "--out", str(tmp_path / "predictions.json")]) == 0
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    assert len(predictions) == 72
    assert sum(predictions[name] == "" for name in predictions if name.endswith("king")) >= 20
    capsys.readouterr()
    assert main(["predict", str(run), "Who lives there?", "--pair", "Hugo lives in Rome. The city is old."]) == 0
    assert capsys.readouterr().out.startswith("Hugo\t")
    assert main(["report", str(run)]) == 0
    assert main(["convert", str(run), str(tmp_path / "hf"), "--to", "huggingface"]) == 0
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    capsys.readouterr()
    assert main(["convert", str(run), str(tmp_path / "onnx"), "--to", "onnx", "--quantize", "int8"]) == 0
    best = [line for line in log_of(run) if line["split"] == "dev"]
    assert f"f1 {max(line['f1'] for line in best):.4f}" in capsys.readouterr().out.split("int8")[0]


@pytest.mark.slow
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, monkeypatch, capsys):
    data, whole, stopped = write(tmp_path / "two.json", squad(12, unanswerable=True)), tmp_path / "whole", tmp_path / "stopped"
    steps = ["--steps", "16", "--eval-every", "6", "--grad-accum", "2"]
    assert run_training(data, whole, *steps) == 0
    original, taken = train.train_step, []

    def stop_after_nine_steps(*arguments, **options):
        taken.append(original(*arguments, **options))
        if len(taken) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken[-1]

    monkeypatch.setattr(train, "train_step", stop_after_nine_steps)
    assert run_training(data, stopped, *steps) == 143
    monkeypatch.undo()
    assert train.main(["--out", str(stopped), "--resume"]) == 0
    assert "resumed at step 9" in capsys.readouterr().out
    for name in ("last", "best"):
        expected, actual = load_checkpoint(whole / name), load_checkpoint(stopped / name)
        assert actual.config == expected.config  # with the threshold
        assert all(torch.equal(actual.weights[key], expected.weights[key]) for key in expected.weights)
    dev_lines = [[line for line in log_of(run) if line["split"] == "dev"] for run in (whole, stopped)]
    assert dev_lines[0] == dev_lines[1]


@pytest.mark.slow
def test_an_invalid_file_is_an_error_on_one_line(tmp_path, capsys):
    values = squad(3)
    values["data"][1]["paragraphs"][0]["qas"][1]["answers"][0]["answer_start"] = 5
    data = write(tmp_path / "x.json", values)
    assert run_training(data, tmp_path / "run", "--steps", "2") == 2
    error = capsys.readouterr().err
    assert error == (
        f"train.py: error: {data}, question 1-0-who: the answer 'Bert' is not at answer_start 5 of the context; "
        "it begins at character 0\n"
    )
    assert run_training(data, tmp_path / "run", "--label-smoothing", "0.1") == 2

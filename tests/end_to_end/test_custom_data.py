"""Custom files from training to predictions, and GLUE from training to a submission."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest

import train
from funnel.cli.main import main


def run_training(tmp_path: Path, *arguments: str) -> int:
    """Trains a small model from scratch into tmp_path/run; returns the exit status."""
    options = ["--weights", "none", "--blocks", "1,1", "--epochs", "2", "--batch-size", "8", "--lr", "1e-3"]
    return train.main([*options, *arguments, "--out", str(tmp_path / "run")])


LABELS = {"classes": ("bad", "good"), "scores": (-1, 1.5), "pairs": ("no", "yes")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LABELS)
def test_custom_data_from_training_to_predictions(tmp_path, kind, capsys):
    data = tmp_path / "mine.jsonl"
    rows = [{"review": f"a {('bad', 'good')[i % 2]} film", "then": "very", "stars": LABELS[kind][i % 2]} for i in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["--text-column", "review", "--label-column", "stars"] + ["--text-pair-column", "then"] * (kind == "pairs")
    assert run_training(tmp_path, "--data", str(data), *columns) == 0
    output = capsys.readouterr().out
    settings = json.loads((tmp_path / "run/run.json").read_text())["settings"]
    assert (settings["task"], settings["train_examples"], settings["dev_examples"]) == ("custom", 54, 6)
    config = json.loads((tmp_path / "run/best/config.json").read_text())
    if kind == "scores":
        assert "regression" in output
        assert config["problem_type"] == "regression"
        assert "pearson" in output
    else:
        names = sorted(LABELS[kind])
        assert config["id2label"] == dict(zip("01", names, strict=True))
        assert config["label2id"] == dict(zip(names, (0, 1), strict=True))
        assert f"{names[0]} (30), {names[1]} (30)" in output
    assert main(["predict", str(tmp_path / "run"), "--file", str(data)]) == 0
    predictions = [json.loads(line) for line in (tmp_path / "run/predictions-mine.jsonl").read_text().splitlines()]
    assert [row["index"] for row in predictions] == list(range(60))
    assert all(("probabilities" in row) == (kind != "scores") for row in predictions)


@pytest.mark.slow
def test_glue_submission_after_training(tmp_path, capsys):
    for name, rows in (("train", "good film\t1\nbad\t0\ngood\t1\n"), ("dev", "good film\t1\nbad\t0\n")):
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\n" + rows)
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\ta good film\n1\t\n")
    assert run_training(tmp_path, "--task", "sst2", "--data", str(tmp_path)) == 0
    run = str(tmp_path / "run")
    assert main(["submit", run, "--data", str(tmp_path), "--out", str(tmp_path / "answers")]) == 0
    assert len((tmp_path / "answers/SST-2.tsv").read_text().splitlines()) == 3
    assert main(["predict", run, "--file", str(tmp_path / "test.tsv")]) == 0
    assert len((tmp_path / "run/predictions-test.tsv").read_text().splitlines()) == 3
    assert "wrote 2 predictions to" in capsys.readouterr().out


@pytest.mark.slow
def test_file_names_need_not_be_utf8(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.csv")
    Path(name).write_text("text,label\nx,a\ny,b\n" * 10)
    assert run_training(tmp_path, "--data", name) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"]["data"] == name
    assert main(["predict", str(tmp_path / "run"), "--file", name]) == 0
    assert len(list((tmp_path / "run").glob("predictions-*.csv"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{}/own.csv", "--task", "sst2"], "--task sst2: expected a folder as data, found a file"),
        (["--data", "{}/none.csv"], "none.csv: no such file"),
        (["--dev", "x.csv"], "--dev only applies to your own data"),
        (["--label-column", "x"], "--label-column only applies to your own data"),
        (["--data", "{}/own.csv", "--dev", "{}/dev.csv"], "dev.csv, line 2: .*'c'"),
        (["--data", "{}/own.csv", "--dev-share", "0.01"], "--dev-share 0.01 of 4 examples leaves"),
        (["--data", "{}/own.xlsx"], "--data .*own.xlsx: a spreadsheet; save it as CSV UTF-8"),
        (
            ["--data", "{}/own.csv", "--dev", "{}/own.csv", "--dev-share", "0.5"],
            "--dev-share cannot be combined with a dev file; use one of them",
        ),
        (["--task", "demo", "--dev-share", "0.5"], "--dev-share only applies to your own data"),
        (["--task", "demo", "--text-column", "x"], "--text-column only applies to your own data"),
        (["--layout-plan", "x.json", "--init", "copy"], "--init has no effect with a layout plan"),
        (["--data", "{}/gzipped.csv"], "gzipped.csv: gzip-compressed"),
        (["--data", "{}/empty"], "--data .*empty: no training file in this folder"),
        (
            ["--data", "{}/own.csv", "--label-column", "nope"],
            "no column 'nope'; choose --label-column from text, label$",
        ),
        (["--data", "{}/own.csv", "--blocks", "1000"], "invalid --blocks '1000': .* numbers from 1 to 999"),
        (["--data", "{}/own.csv", "--layout-plan", "nope.json"], "error: --layout-plan: cannot read nope.json"),
        (["--task", "nonsense", "--lr", "-1"], "invalid --lr -1.0: expected a number"),
    ],
)
def test_invalid_input_prints_one_line_and_starts_no_run(tmp_path, arguments, message, capsys):
    (tmp_path / "own.csv").write_text("text,label\nx,a\ny,b\nz,a\nw,b\n")
    (tmp_path / "dev.csv").write_text("text,label\nx,c\n")
    (tmp_path / "gzipped.csv").write_bytes(gzip.compress(b"text,label\nx,a\n"))
    (tmp_path / "own.xlsx").touch()
    (tmp_path / "empty").mkdir()
    assert run_training(tmp_path, *(argument.format(tmp_path) for argument in arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(message, error), error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()

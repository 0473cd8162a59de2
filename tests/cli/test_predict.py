"""`funnel predict`."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
from conftest import reference_probabilities

from funnel.cli.main import main

TEXTS = ["", "a good film", "the very bad film " * 9, "good"]


@pytest.fixture
def run(classifier_folder) -> Path:
    """A run trained on single texts."""
    return write_run(classifier_folder, "text")


@pytest.fixture
def pair_run(classifier_folder) -> Path:
    """A run trained on text pairs."""
    return write_run(classifier_folder, "first", "second")


def write_run(checkpoint: Path, *columns: str, max_length: int = 128) -> Path:
    record = {"version": 2, "command": "x", "settings": {"max_length": max_length, "columns": columns}}
    (checkpoint.parent / "run.json").write_text(json.dumps(record))
    return checkpoint.parent


def set_standard_input(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


# --- texts and standard input -----------------------------------------------------------------------------------------


def test_prints_one_line_per_text(classifier_folder, capsys, monkeypatch):
    assert main(["predict", str(classifier_folder), *TEXTS]) == 0
    lines = capsys.readouterr().out.split("\n")[:-1]
    for line, text in zip(lines, TEXTS, strict=True):
        probabilities = reference_probabilities(classifier_folder, text)
        label = ["no", 'yes, "really"', "a b"][probabilities.index(max(probabilities))]
        assert line == f"{label}\t{max(probabilities):.1%}\t{text.strip()}"
    set_standard_input(monkeypatch, ("\ufeff" + "".join(f"{text}\r\n" for text in TEXTS)).encode())
    assert main(["predict", str(classifier_folder)]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == lines


def test_pairs_are_arguments_or_tab_separated_lines(classifier_folder, capsys, monkeypatch):
    pairs = [("a film", "not bad"), ("good", "bad")]
    assert main(["predict", str(classifier_folder), "a film", "good", "--pair", "not bad", "--pair", "bad"]) == 0
    output = capsys.readouterr().out
    for line, pair in zip(output.splitlines(), pairs, strict=True):
        assert f"\t{max(reference_probabilities(classifier_folder, *pair)):.1%}\t{pair[0]}\t{pair[1]}" in line
    set_standard_input(monkeypatch, b"a film\tnot bad\ngood\tbad\n")
    assert main(["predict", str(write_run(classifier_folder, "first", "second"))]) == 0
    assert capsys.readouterr().out == output


def test_texts_may_follow_options(classifier_folder, capsys):
    assert main(["predict", str(classifier_folder), "a film", "good"]) == 0
    output = capsys.readouterr().out
    assert main(["predict", str(classifier_folder), "--dtype", "fp32", "a film", "good"]) == 0
    assert capsys.readouterr().out == output
    assert main(["predict", str(classifier_folder), "--dtype", "fp32", "a film", "--god"]) == 2


def test_pair_classifier_requires_pairs(pair_run, capsys):
    assert main(["predict", str(pair_run), "a film"]) == 2
    assert "was trained on text pairs (first, second); --pair is required" in capsys.readouterr().err


@pytest.mark.parametrize(("line", "tabs"), [("good", "0 tabs"), ("good\tbad\tworse", "2 tabs")])
def test_pair_lines_must_have_exactly_one_tab(line, tabs, pair_run, capsys, monkeypatch):
    set_standard_input(monkeypatch, f"a film\tbad\n{line}\n".encode())
    assert main(["predict", str(pair_run)]) == 2
    error = capsys.readouterr().err
    assert "standard input, line 2: expected two texts separated by a tab" in error
    assert tabs in error


def test_single_text_classifier_rejects_pairs(run, tmp_path, capsys):
    (tmp_path / "new.csv").write_text("text,more\na,b\n")
    for arguments in (("a", "--pair", "b"), ("--file", str(tmp_path / "new.csv"), "--text-pair-column", "more")):
        assert main(["predict", str(run), *arguments]) == 2
        assert "was trained on single texts (text), not on pairs" in capsys.readouterr().err


def test_truncated_texts_are_counted_in_a_warning(classifier_folder, tmp_path, capsys):
    run = write_run(classifier_folder, "text", max_length=6)
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": "good " * n}) + "\n" for n in (4, 5, 1, 6)))
    assert main(["predict", str(run), "--file", str(tmp_path / "new.jsonl")]) == 0
    assert "warning: 2 texts were truncated to 6 tokens" in capsys.readouterr().err
    assert main(["predict", str(run), "good " * 5]) == 0
    assert "warning: 1 text was truncated to 6 tokens" in capsys.readouterr().err
    assert main(["predict", str(run), "good"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_characters_outside_the_locale_encoding_are_escaped(classifier_folder, monkeypatch):
    output = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(output, "ascii"))
    assert main(["predict", str(classifier_folder), "un café"]) == 0
    assert output.getvalue().decode("ascii").endswith("un caf\\xe9\n")


def test_arguments_that_are_not_utf8_are_an_error(classifier_folder, capsys):
    assert main(["predict", str(classifier_folder), "a film", os.fsdecode(b"caf\xe9")]) == 2
    error = capsys.readouterr().err
    assert r"caf\udce9" in error
    assert "UTF-8" in error


@pytest.mark.parametrize(
    ("content", "message"), [(b"good\ncaf\xe9\n", "line 2: not UTF-8 text"), (b"good\n\0\n", "line 2: contains a NUL byte")]
)
def test_standard_input_that_is_not_text_is_an_error(content, message, classifier_folder, capsys, monkeypatch):
    set_standard_input(monkeypatch, content)
    assert main(["predict", str(classifier_folder)]) == 2
    assert f"standard input, {message}" in capsys.readouterr().err


def test_a_folder_that_is_neither_run_nor_checkpoint_is_described(run, tmp_path, capsys):
    assert main(["predict", str(tmp_path), "x"]) == 2
    assert "neither a run nor a checkpoint; choose one of the runs in it: run" in capsys.readouterr().err
    (run / "run.json").unlink()
    assert main(["predict", str(run), "x"]) == 2
    assert "neither a run nor a checkpoint; it contains best" in capsys.readouterr().err


def test_a_run_without_best_checkpoint_is_an_error(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    assert main(["predict", str(tmp_path), "x"]) == 2
    assert "no best checkpoint yet" in capsys.readouterr().err


# --- files ------------------------------------------------------------------------------------------------------------


def test_file_predictions_use_the_training_columns(classifier_folder, tmp_path, capsys):
    run = write_run(classifier_folder, "review")
    (tmp_path / "new.csv").write_text("text,review\nx,a good film\n")
    assert main(["predict", str(run), "--file", str(tmp_path / "new.csv")]) == 0
    assert f"wrote 1 prediction to {run / 'predictions-new.csv'}" in capsys.readouterr().out
    rows = list(csv.reader((run / "predictions-new.csv").open()))
    expected = reference_probabilities(classifier_folder, "a good film")
    assert rows[0][5:] == ["review"]
    assert rows[1][5:] == ["a good film"]
    assert [float(p) for p in rows[1][2:5]] == pytest.approx(expected, abs=1e-6)


def test_file_predictions_fall_back_to_the_text_column(classifier_folder, tmp_path):
    run, out = write_run(classifier_folder, "review"), tmp_path / "out.jsonl"
    (tmp_path / "new.jsonl").write_text('{"text": "good"}\n')
    assert main(["predict", str(run), "--file", str(tmp_path / "new.jsonl"), "--out", str(out)]) == 0
    probabilities = json.loads(out.read_text())["probabilities"].values()
    assert list(probabilities) == pytest.approx(reference_probabilities(classifier_folder, "good"), abs=1e-6)


@pytest.mark.parametrize("options", [(), ("--text-column", "other")])
def test_file_predictions_of_pairs_use_both_columns(options, pair_run, classifier_folder, tmp_path):
    out = tmp_path / "out.jsonl"
    (tmp_path / "new.jsonl").write_text('{"first": "a film", "other": "a film", "second": "bad"}\n')
    assert main(["predict", str(pair_run), "--file", str(tmp_path / "new.jsonl"), "--out", str(out), *options]) == 0
    probabilities = json.loads(out.read_text())["probabilities"].values()
    assert list(probabilities) == pytest.approx(reference_probabilities(classifier_folder, "a film", "bad"), abs=1e-6)


def test_a_missing_second_column_is_an_error(pair_run, tmp_path, capsys):
    (tmp_path / "new.jsonl").write_text('{"text": "a film"}\n')
    assert main(["predict", str(pair_run), "--file", str(tmp_path / "new.jsonl")]) == 2
    assert "new.jsonl: no column 'second'; choose --text-pair-column from text" in capsys.readouterr().err


def test_a_missing_text_column_is_an_error(classifier_folder, tmp_path, capsys):
    (tmp_path / "other.csv").write_text("body\nx\n")
    assert main(["predict", str(write_run(classifier_folder, "review")), "--file", str(tmp_path / "other.csv")]) == 2
    assert "other.csv: no column 'review'; choose --text-column from body" in capsys.readouterr().err


def test_predictions_replace_neither_inputs_nor_other_files(run, tmp_path, capsys, monkeypatch):
    path, other = tmp_path / "new.csv", tmp_path / "other.csv"
    path.write_text("text\nx\n")
    other.write_text("mine")
    (run / "metrics.jsonl").touch()
    monkeypatch.setattr("funnel.inference.classifier.Classifier.load", None)
    for out in (path, tmp_path / "missing/../new.csv", run / "metrics.jsonl"):
        assert main(["predict", str(run), "--file", str(path), "--out", str(out), "--overwrite"]) == 2
        assert f"--out {out}: this command reads the file" in capsys.readouterr().err
    assert main(["predict", str(run), "--file", str(path), "--out", str(other)]) == 2
    assert "already exists; choose another name, or add --overwrite" in capsys.readouterr().err
    assert (path.read_text(), other.read_text()) == ("text\nx\n", "mine")


def test_out_is_replaced_with_overwrite_and_the_default_output_always(run, tmp_path):
    for name in ("new.csv", "out.csv", "run/predictions-new.csv"):
        (tmp_path / name).write_text("text\nx\n")
    file = ["--file", str(tmp_path / "new.csv")]
    assert main(["predict", str(run), *file, "--out", str(tmp_path / "out.csv"), "--overwrite"]) == 0
    assert main(["predict", str(run), *file]) == 0
    assert (tmp_path / "out.csv").read_text() == (run / "predictions-new.csv").read_text() != "text\nx\n"


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ([], {"text"}),
        (["--keep-columns"], {"text", "id", "input label"}),
        (["--keep-columns", "id"], {"text", "id"}),
        (["--keep-columns", "text", "id"], {"text", "id"}),
    ],
)
def test_columns_of_the_file_are_copied_to_the_predictions(options, columns, run, tmp_path):
    (tmp_path / "new.csv").write_text("id,text,label\n07,a film,yes\n")
    out = tmp_path / "out.jsonl"
    assert main(["predict", str(run), "--file", str(tmp_path / "new.csv"), "--out", str(out), *options]) == 0
    values = json.loads(out.read_text())
    assert values.keys() - {"index", "label", "probabilities"} == columns
    assert {"id": "07", "text": "a film", "input label": "yes"} | values == {"id": "07", "input label": "yes"} | values


def test_an_unknown_column_to_copy_is_an_error(run, tmp_path, capsys):
    (tmp_path / "new.csv").write_text("id,text\n7,a film\n")
    assert main(["predict", str(run), "--file", str(tmp_path / "new.csv"), "--keep-columns", "nope"]) == 2
    assert "new.csv: no column 'nope'; choose --keep-columns from id, text" in capsys.readouterr().err


def test_a_malformed_file_is_an_error_and_writes_nothing(run, tmp_path, capsys):
    (tmp_path / "blank.csv").write_text("text\nx\n\ny\n")
    assert main(["predict", str(run), "--file", str(tmp_path / "blank.csv")]) == 2
    assert "blank.csv, line 3: blank" in capsys.readouterr().err
    assert not list(run.glob("*predictions*"))


def test_file_names_need_not_be_utf8(run, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.csv"))
    path.write_text("text\nx\n")
    assert main(["predict", str(run), "--file", str(path)]) == 0
    assert len(list(run.glob("predictions-*.csv"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("text", "--file", "x.csv"), "give either TEXT or --file, not both"),
        (("text", "--out", "x.csv"), "--out requires --file"),
        (("--file", "x.csv", "--out", "x.json"), "--out x.json: unknown format"),
        (("text", "--keep-columns"), "--keep-columns requires --file"),
        (("--text-column", "x"), "--text-column requires --file"),
        (("--file", "x.csv", "--pair", "a"), "--pair cannot be combined with --file"),
        (("text", "--pair", "a", "--pair", "b"), "--pair: got 2 for 1 text;"),
        (("--file", "missing.csv"), "--file missing.csv: no such file"),
        (("--file", "texts.txt"), "expected a .tsv"),
    ],
)
def test_invalid_arguments_print_one_line(arguments, message, classifier_folder, capsys):
    assert main(["predict", str(classifier_folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

"""`funnel evaluate`."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, tiny_config

from funnel.cli.evaluate import format_evaluation
from funnel.cli.main import main
from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.heads import FunnelForSequenceClassification
from funnel.problems.calibration import calibrate


@pytest.fixture
def labeled(tmp_path) -> Path:
    """A labeled file for the classifier in `classifier_folder`."""
    path = tmp_path / "labeled.jsonl"
    rows = [{"text": f"{word} film", "label": label} for word in ("good", "bad") for label in CLASSES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_record(run: Path, **values) -> None:
    (run / "run.json").write_text(json.dumps({"version": 2, "command": "x", "settings": {}} | values))


def test_prints_metrics_classes_confusions_and_errors(classifier_folder, labeled, capsys):
    assert main(["evaluate", str(classifier_folder), str(labeled)]) == 0
    output = capsys.readouterr().out
    first, classes, calibration, confusion, errors = output.split("\n\n")
    assert re.fullmatch(r"labeled\.jsonl: 6 examples, loss \d\.\d{4}, accuracy 0\.3333, f1 \(macro\) \d\.\d{4}", first)
    assert [line.split()[0] for line in classes.splitlines()] == ["class", "no", "yes,", "a", "micro", "macro", "weighted"]
    assert re.fullmatch(r"expected calibration error 0\.\d{4} \(mean probability 0\.\d{4}, accuracy 0\.3333\)", calibration)
    assert confusion.startswith("confusion matrix\nlabel")
    assert errors.count("predicted") == 4
    assert max(map(len, output.splitlines())) <= 80


def test_uses_the_runs_metrics_and_label_column(classifier_folder, labeled, capsys):
    labeled.write_text(labeled.read_text().replace('"label"', '"stars"'))
    write_record(classifier_folder.parent, settings={"metrics": ["matthews"]}, arguments={"label_column": "stars"})
    assert main(["evaluate", str(classifier_folder.parent), str(labeled)]) == 0
    assert re.match(r"labeled\.jsonl: 6 examples, loss \d\.\d{4}, matthews", capsys.readouterr().out)
    labeled.write_text(labeled.read_text().replace('"stars"', '"label"'))  # the default name
    assert main(["evaluate", str(classifier_folder.parent), str(labeled)]) == 0


def test_results_are_written_as_json(classifier_folder, labeled, tmp_path, capsys):
    out = tmp_path / "results.json"
    command = ["evaluate", str(classifier_folder), str(labeled), "--out", str(out)]
    assert main(command) == 0
    values = json.loads(out.read_text())
    assert values["scores"]["accuracy"] == pytest.approx(1 / 3)
    assert len(values["mistakes"]) == 4
    assert main(command) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_scores_are_evaluated(tmp_path, capsys):
    tokenizer = FunnelTokenizer.train(["good bad film"] * 5)
    config = tiny_config(
        vocab_size=tokenizer.vocab_size, num_decoder_layers=0, id2label={0: "score"}, problem_type="regression"
    )
    FunnelForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    (tmp_path / "scores.csv").write_text("text,label\ngood film,1e6\nbad,1000\nfilm,2.5\n")
    assert main(["evaluate", str(tmp_path / "model"), str(tmp_path / "scores.csv")]) == 0
    first, errors = capsys.readouterr().out.split("\n\n")
    assert re.findall(r"(\w+) -?[\d.]+", first) == ["loss", "pearson", "spearman", "rmse"]
    labels = re.findall(r"label ([\d.e+]+), predicted", errors)
    assert labels == ["1000000", "1000", "2.5"]
    assert re.match(r"scores\.csv: 3 examples, loss 3\.3\d+e\+11, ", first)


def test_an_overflow_is_an_error(classifier_folder, labeled, monkeypatch, capsys):
    monkeypatch.setattr("funnel.inference.predictor.predict", lambda *_, **__: torch.full((6, 3), torch.nan))
    assert main(["evaluate", str(classifier_folder), str(labeled), "--dtype", "fp16"]) == 2
    assert "the logits of 6 examples of labeled.jsonl are not finite in fp16; use --dtype bf16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.csv"], "error: file missing.csv: no such file"),
        (["labeled.jsonl", "--label-column", "nope"], "--label-column"),
        (["labeled.jsonl", "--text-column", "nope"], "--text-column"),
        (["labeled.jsonl", "--out", "results.txt"], "--out results.txt: expected the name of a .json file"),
        (["labeled.jsonl", "--out", "run/best/config.json", "--overwrite"], "this command reads the file"),
    ],
)
def test_invalid_arguments_print_one_line(arguments, message, classifier_folder, labeled, monkeypatch, capsys):
    monkeypatch.chdir(labeled.parent)
    assert main(["evaluate", "run/best", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def evaluation(n_classes: int) -> dict:
    labels = [f"class {i} with a long name that goes on" for i in range(n_classes)]
    matrix = [[1000 * (i == j) + (i + 1 == j) for j in range(n_classes)] for i in range(n_classes)]
    classes = [{"label": label, "precision": 0.5, "recall": 0.25, "f1": 1 / 3, "examples": 1001} for label in labels]
    average = {"label": "micro average", "precision": 0.5, "recall": 0.25, "f1": 1 / 3, "examples": 1001 * n_classes}
    mistake = {"text": "good " * 99, "label": "a", "predicted": "b", "probability": [0.1, 0.9]}
    return {
        "examples": 1, "unit": "decision", "labels": labels, "confusion": matrix, "classes": classes, "averages": [average],
        "calibration": calibrate(np.array([0.5]), np.array([True])), "mistakes": [mistake] * 20,
    }  # fmt: skip


@pytest.mark.parametrize(("n_classes", "title"), [(2, "confusion matrix"), (50, "most frequent confusions")])
def test_output_is_at_most_80_characters_wide(n_classes, title, capsys):
    output = format_evaluation("x.csv", {"loss": 0.5}, evaluation(n_classes))
    assert title in output
    assert max(map(len, output.splitlines())) <= 80
    assert output.startswith("x.csv: 1 example, loss 0.5000\n")


def test_of_many_classes_the_ten_with_the_lowest_f1_are_printed():
    errors = evaluation(50)
    for i, row in enumerate(errors["classes"]):
        row |= {"label": f"class {i}", "f1": (i * 7 % 50) / 50}
    errors["classes"][0]["examples"] = 0  # a class without examples is not a bad one
    table = format_evaluation("x.csv", {}, errors).split("\n\n")[1].splitlines()
    assert table[0] == "classes with the lowest F1 (10 of 50; --out writes all)"
    expected = sorted(errors["classes"][1:], key=lambda row: row["f1"])[:10]
    assert [line.split("  ")[0] for line in table[2:]] == [*(row["label"] for row in expected), "micro average"]

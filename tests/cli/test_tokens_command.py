"""`funnel predict` and `funnel evaluate` with a token classifier."""

import gzip
import io
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_config

from funnel import TokenClassifier
from funnel.cli.main import main
from funnel.data.tagged import TaggedFile
from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.heads import FunnelForTokenClassification

WORDS = "in\tO\nnew\tB-place\nyork\tI-place\n\nsaw\tO\n"


@pytest.fixture
def run(tmp_path) -> Path:
    """A checkpoint folder with a random token classifier."""
    torch.manual_seed(1)
    tokenizer = FunnelTokenizer.train(["in new york i saw , ."] * 5)
    labels = {0: "O", 1: "B-place", 2: "I-place"}
    config = tiny_config(vocab_size=tokenizer.vocab_size, id2label=labels, num_decoder_layers=1, model_max_length=8)
    FunnelForTokenClassification(config).save_pretrained(tmp_path / "run")
    tokenizer.save(tmp_path / "run")
    return tmp_path / "run"


def test_entities_of_texts_are_printed_with_positions(run, capsys):
    text = "I saw New  York."
    assert main(["predict", str(run), text, "--dtype", "fp32"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "I saw New York."
    expected = TokenClassifier.load(run, dtype="fp32")(text)
    rows = [[e.label, f"{e.probability:.1%}", f"{e.start}-{e.end}", " ".join(e.text.split())] for e in expected]
    assert [line.strip().split("\t") for line in lines] == (rows or [["(no entities)"]])


def test_standard_input_is_read_line_by_line(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"new york\n\nsaw\n")))
    assert main(["predict", str(run)]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  ")] == ["new york", "", "saw"]


def test_tags_of_a_column_file_are_written_to_a_column_file(run, tmp_path, capsys):
    (tmp_path / "x.conll").write_text(WORDS)
    assert main(["predict", str(run), "--file", str(tmp_path / "x.conll")]) == 0
    assert "wrote predictions for 2 sentences to" in capsys.readouterr().out
    written = list(TaggedFile(run / "predictions-x.conll").rows())
    assert [sentence.words for sentence in written] == [["in", "new", "york"], ["saw"]]
    classifier = TokenClassifier.load(run)
    tags = classifier.tag([sentence.words for sentence in written])
    assert [sentence.tags for sentence in written] == [classifier.tag_names(row) for row in tags]


def test_default_outputs_of_files_that_differ_in_their_unknown_suffix_differ(run, tmp_path):
    for name in ("eng.testa", "eng.testb"):
        (tmp_path / name).write_text(WORDS)
        assert main(["predict", str(run), "--file", str(tmp_path / name)]) == 0
    assert {path.name for path in run.glob("predictions-eng*")} == {
        "predictions-eng.testa.conll",
        "predictions-eng.testb.conll",
    }


def test_tags_of_objects_are_written_in_order_with_empty_sentences(run, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"tokens": ["new york", "a"]}\n{"tokens": []}\n{"tokens": ["i"]}\n')
    assert main(["predict", str(run), "--file", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["index"], row["tokens"], len(row["tags"])) for row in rows] == [
        (0, ["new york", "a"], 2),
        (1, [], 0),
        (2, ["i"], 1),
    ]


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.jsonl"])
def test_entities_of_a_file_of_texts_are_written_as_objects(name, run, tmp_path):
    content = 'text\n"in New York, i"\nsaw\n' if "csv" in name else '{"text": "in New York, i"}\n{"text": "saw"}\n'
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt") as file:
        file.write(content)
    assert main(["predict", str(run), "--file", str(tmp_path / name)]) == 0
    rows = [json.loads(line) for line in (run / "predictions-x.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["in New York, i", "saw"]
    for row in rows:
        assert all(row["text"][e["start"] : e["end"]] == e["text"] for e in row["entities"])


def test_evaluate_prints_scores_by_type_and_writes_them(run, tmp_path, capsys):
    (tmp_path / "x.conll").write_text(WORDS)
    assert main(["evaluate", str(run), str(tmp_path / "x.conll"), "--out", str(tmp_path / "out.json")]) == 0
    output = capsys.readouterr().out
    assert "x.conll: 2 examples, loss" in output
    assert all(word in output for word in ("f1", "precision", "recall", "accuracy", "place", "confusion"))
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["scores"].keys() == {"loss", "f1", "precision", "recall", "accuracy"}
    assert [row["label"] for row in values["classes"]] == ["place"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "{run}", "{tmp}/bad.conll"], "bad.conll, line 2: unknown label 'B-zoo'"),
        (["evaluate", "{run}", "{tmp}/none.conll"], "error: file .*none.conll: no such file"),
        (
            ["evaluate", "{run}", "{tmp}/bad.conll", "--label-column", "5"],
            "line 1: no column 5; choose --label-column from 0 to 1",
        ),
        (["predict", "{run}", "--file", "{tmp}/bad.conll", "--out", "x.csv"], "--out x.csv: unknown format"),
        (
            ["predict", "{run}", "--file", "{tmp}/t.csv", "--out", "{tmp}/x.conll"],
            "the entities of texts are written to .jsonl",
        ),
        (["predict", "{run}", "--file", "{tmp}/none.csv"], "none.csv: no such file"),
        (["predict", "{run}", "a", "--ensemble", "{run}"], "--ensemble averages the predictions of text classifiers"),
        (["evaluate", "{run}", "{tmp}/ok.conll", "--ensemble", "{run}"], "--ensemble averages the predictions"),
        (["predict", "{run}", "a", "--pair", "b"], "--pair has no effect for a token classifier"),
        (["explain", "{run}", "a"], "expected a text classifier, found a token classifier"),
    ],
)
def test_invalid_arguments_are_errors_on_one_line(arguments, message, run, tmp_path, capsys):
    (tmp_path / "bad.conll").write_text("a\tO\nb\tB-zoo\n")
    (tmp_path / "ok.conll").write_text(WORDS)
    (tmp_path / "t.csv").write_text("text\na\n")
    assert main([argument.format(run=run, tmp=tmp_path) for argument in arguments]) != 0
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert re.search(message, error), error

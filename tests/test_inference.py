"""A trained classifier at work."""

import csv
import gzip
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config

import train
from funnel import inference
from funnel.cli.main import main
from funnel.data.files import ExampleFile
from funnel.data.tasks import TASKS, get_task, locate_files
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.inference import Classifier, Prediction, write_predictions, write_submission
from funnel.model.heads import FunnelForMaskedLM, FunnelForSequenceClassification

WORDS = ["good", "bad", "film", "a", "the", "very", "not"]
TEXTS = ["", "a good film", "the very bad film " * 9, "good"] * 3


@pytest.fixture
def checkpoint(tmp_path):
    """A random classifier with three classes, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = FunnelTokenizer.train([" ".join(WORDS)] * 5)
    labels = {0: "no", 1: 'yes, "really"', 2: "a\tb"}
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_decoder_layers=0, id2label=labels)
    FunnelForSequenceClassification(config).save_pretrained(tmp_path / "run/best")
    tokenizer.save(tmp_path / "run/best")
    return tmp_path / "run/best"


def expected(checkpoint, text, pair=None):
    """The probabilities of one text, computed alone."""
    model = FunnelForSequenceClassification.from_pretrained(checkpoint)
    encoding = FunnelTokenizer.load(checkpoint).encode([text], None if pair is None else [pair])[0]
    with torch.no_grad():
        logits = model(torch.tensor([encoding.input_ids]), None, torch.tensor([encoding.token_type_ids]))
    return logits[0].double().softmax(0).tolist()


def test_texts_come_back_in_their_order_with_all_probabilities(checkpoint):
    classify = Classifier.load(checkpoint)
    found = classify(TEXTS)
    for text, one in zip(TEXTS, found, strict=True):
        probabilities = expected(checkpoint, text)
        assert list(one.probabilities.values()) == pytest.approx(probabilities, abs=1e-6)
        assert one.probability == max(one.probabilities.values()) == one.probabilities[one.label]
    assert classify([]) == []


def test_a_single_text_and_pairs(checkpoint):
    classify = Classifier.load(checkpoint)
    one = classify("a good film", "not bad")
    assert isinstance(one, Prediction)
    assert list(one.probabilities.values()) == pytest.approx(expected(checkpoint, "a good film", "not bad"), abs=1e-6)
    assert classify(["a good film"], ["not bad"])[0].label == one.label


def test_texts_are_cut_as_in_training(checkpoint):
    (checkpoint.parent / "run.json").write_text(json.dumps({"settings": {"max_length": 6}}))
    for folder in (checkpoint, checkpoint.parent):
        classify = Classifier.load(folder)
        assert classify("a good film a bad") == classify("a good film a good")
    (checkpoint.parent / "run.json").unlink()
    assert Classifier.load(checkpoint)("a good film a bad") != Classifier.load(checkpoint)("a good film a good")


def test_what_is_no_classifier_is_refused(checkpoint, tmp_path):
    FunnelForMaskedLM(tiny_config()).save_pretrained(tmp_path / "lm")
    with pytest.raises(FunnelError, match="holds a FunnelForMaskedLM, not a classifier"):
        Classifier.load(tmp_path / "lm")
    with pytest.raises(FunnelError, match="none"):
        Classifier.load(tmp_path / "none")


def read_back(path):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        if ".jsonl" in path.name:
            return [(row["label"], list(row["probabilities"].values())) for row in map(json.loads, file)]
        rows = list(csv.reader(file)) if ".csv" in path.name else [line.rstrip("\n").split("\t") for line in file]
    assert [row[0] for row in rows[1:]] == [str(i) for i in range(len(rows) - 1)]
    return [(row[1], [float(p) for p in row[2:]]) for row in rows[1:]]


@pytest.mark.parametrize("name", ["out.csv", "out.tsv", "out.jsonl", "out.jsonl.gz", "out.csv.gz"])
@pytest.mark.parametrize("source", ["in.csv", "in.jsonl"])
def test_a_file_of_texts_becomes_a_file_of_predictions(checkpoint, tmp_path, monkeypatch, source, name):
    monkeypatch.setattr(inference, "CHUNK", 5)
    with (tmp_path / source).open("w", newline="") as file:
        if source == "in.csv":
            csv.writer(file).writerows([["id", "text"], *([i, t] for i, t in enumerate(TEXTS))])
        else:
            file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    classify = Classifier.load(checkpoint)
    assert write_predictions(classify.of_file(ExampleFile(tmp_path / source, ("text",))), tmp_path / "new" / name) == len(TEXTS)
    for (label, probabilities), one in zip(read_back(tmp_path / "new" / name), classify(TEXTS), strict=True):
        assert label.split() == str(one.label).split()
        assert probabilities == pytest.approx(list(one.probabilities.values()), abs=1e-6)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


def test_a_mistake_in_the_file_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "CHUNK", 1)
    (tmp_path / "in.tsv").write_text("text\tmore\na\tb\nc\n")
    with pytest.raises(FunnelError, match=r"in.tsv, line 3: 1 fields"):
        write_predictions(
            Classifier.load(checkpoint).of_file(ExampleFile(tmp_path / "in.tsv", ("text",))), tmp_path / "out.tsv"
        )
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize("name", ["sst2", "stsb", "mnli"])
def test_answers_for_the_glue_server(name, checkpoint, tmp_path):
    """As its FAQ has them: a line of names, the row's number and the label as it stands in the training file."""
    texts = TASKS[name].columns
    folder = tmp_path / "data"
    folder.mkdir()
    task = TASKS[name]
    for file in task.files.values():
        (folder / file.path).write_text("")
    for file in task.tests.values():
        header = "\t".join(["index", *texts])
        (folder / file.path).write_text(
            header + "\n" + "".join(f"{i}\t" + "\t".join(["a good film"] * len(texts)) + "\n" for i in range(3))
        )
    tokenizer = FunnelTokenizer.load(checkpoint)
    labels = {0: "score"} if task.labels is None else dict(enumerate(task.labels.values()))
    problem = "regression" if task.labels is None else "single_label_classification"
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_decoder_layers=0, id2label=labels, problem_type=problem)
    model = FunnelForSequenceClassification(config)
    classify = Classifier(model, tokenizer)
    if task.labels is None:
        with torch.no_grad():
            model.classifier.linear_out.bias += 7  # beyond the scale
    paths = write_submission(classify, locate_files(task, folder), tmp_path / "answers")
    names = {"sst2": ["SST-2.tsv"], "stsb": ["STS-B.tsv"], "mnli": ["AX.tsv", "MNLI-m.tsv", "MNLI-mm.tsv"]}[name]
    assert sorted(path.name for path in paths) == names
    for path in paths:
        header, *rows = path.read_text().splitlines()
        assert header == "index\tprediction"
        assert [row.split("\t")[0] for row in rows] == ["0", "1", "2"]
        answers = {row.split("\t")[1] for row in rows}
        assert answers == {"5.000"} if task.labels is None else answers <= task.labels.keys()


def run(tmp_path, *arguments):
    shared_arguments = ["--weights", "none", "--blocks", "1,1", "--epochs", "2", "--batch-size", "8", "--lr", "1e-3"]
    return train.main([*shared_arguments, *arguments, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("kind", ["classes", "scores", "pairs"])
def test_own_data_is_trained_evaluated_and_predicted(tmp_path, kind, capsys):
    sign = {True: {"classes": "good", "scores": 1.5, "pairs": "yes"}, False: {"classes": "bad", "scores": -1, "pairs": "no"}}
    rows = [
        {"review": f"a {'good' if i % 2 else 'bad'} film", "then": "very", "stars": sign[bool(i % 2)][kind]} for i in range(60)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["--text-column", "review", "--label-column", "stars"] + ["--text-pair-column", "then"] * (kind == "pairs")
    assert run(tmp_path, "--data", str(tmp_path / "mine.jsonl"), *columns, "--predict", str(tmp_path / "mine.jsonl")) == 0
    out = capsys.readouterr().out
    assert "54 texts to train on, 6 in dev" in out
    config = json.loads((tmp_path / "run/best/config.json").read_text())
    if kind == "scores":
        assert "regression" in out
        assert config["problem_type"] == "regression"
        assert "pearson" in out
    else:
        names = sorted({row["stars"] for row in rows})
        assert config["id2label"] == dict(zip("01", names, strict=True))
        assert config["label2id"] == dict(zip(names, (0, 1), strict=True))
        assert f"{names[0]} (30), {names[1]} (30)" in out
    predictions = [json.loads(line) for line in (tmp_path / "run/predictions-mine.jsonl").read_text().splitlines()]
    assert [row["index"] for row in predictions] == list(range(60))
    assert all(("probabilities" in row) == (kind != "scores") for row in predictions)


def test_glue_answers_after_training(tmp_path, capsys):
    for name, label in (("train", "\t1\nbad\t0\ngood\t1\n"), ("dev", "\t1\nbad\t0\n")):
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\ngood film" + label)
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\ta good film\n1\t\n")
    arguments = ["--task", "sst2", "--data", str(tmp_path), "--glue-submission", str(tmp_path / "answers")]
    assert run(tmp_path, *arguments, "--predict", str(tmp_path / "test.tsv")) == 0
    assert len((tmp_path / "answers/SST-2.tsv").read_text().splitlines()) == 3
    assert len((tmp_path / "run/predictions-test.tsv").read_text().splitlines()) == 3
    assert "2 predictions in" in capsys.readouterr().out


def test_the_file_to_predict_may_call_its_texts_otherwise(tmp_path, capsys):
    (tmp_path / "own.csv").write_text("review,label\nx,a\ny,b\n" * 10)
    (tmp_path / "new.csv").write_text("text\nx\n")
    (tmp_path / "other.csv").write_text("body\nx\n")
    arguments = ["--data", str(tmp_path / "own.csv"), "--text-column", "review", "--predict"]
    assert run(tmp_path, *arguments, str(tmp_path / "other.csv")) == 2
    assert "other.csv: no column 'review'; rename one, or predict after training with" in capsys.readouterr().err
    assert run(tmp_path, *arguments, str(tmp_path / "new.csv")) == 0
    assert len((tmp_path / "run/predictions-new.csv").read_text().splitlines()) == 2


def test_a_file_name_that_is_not_utf8_is_a_name(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.csv")
    Path(name).write_text("text,label\nx,a\ny,b\n" * 10)
    assert run(tmp_path, "--data", name, "--predict", name) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"]["data"] == name
    assert len(list((tmp_path / "run").glob("predictions-*.csv"))) == 1


def test_answers_that_cannot_be_written_are_told_before_training(tmp_path, capsys):
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\ngood film\t1\nbad\t0\n")
    for folder in ("test.tsv", "test.tsv/inner"):
        assert run(tmp_path, "--task", "sst2", "--data", str(tmp_path), "--glue-submission", str(tmp_path / folder)) == 2
        assert "test.tsv is no folder that can be written" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_answers_are_written_all_or_none(checkpoint, tmp_path):
    task = get_task("mnli")
    names = {name: ExampleFile(tmp_path / f"{name}.tsv", ("text",)) for name in ("first", "second")}
    for file in names.values():
        file.path.write_text("text\nx\n")
    labels = {name: name for name in Classifier.load(checkpoint).model.config.id2label.values()}
    out = tmp_path / "out"
    (out / ".second.tsv.part").mkdir(parents=True)  # in the way
    with pytest.raises(FunnelError, match=r"--glue-submission .*cannot be written"):
        write_submission(Classifier.load(checkpoint), replace(task, labels=labels, tests=names), out)
    assert [path.name for path in out.iterdir()] == [".second.tsv.part"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "{}/own.csv", "--task", "sst2"], "takes a folder for --data; for a file of your own leave --task out"),
        (["--data", "{}/none.csv"], "none.csv: no such file"),
        (["--dev", "x.csv"], "--dev: belongs to a file of your own"),
        (["--label-column", "x"], "--label-column: belongs to a file of your own"),
        (["--data", "{}/own.csv", "--dev", "{}/dev.csv"], "dev.csv, line 2: label 'c' is none of a, b"),
        (["--data", "{}/own.csv", "--dev-share", "0.01"], "--dev-share 0.01 of 4 examples leaves"),
        (
            ["--data", "{}/own.csv", "--predict", "{}/own.txt"],
            "--predict .*own.txt: no such file; it takes a .tsv, .csv or .jsonl file",
        ),
        (["--predict", "{}/none.csv"], "--predict .*none.csv: no such file"),
        (["--predict", "{}/blank.jsonl"], "blank.jsonl: no column 'sentence'; name it with --text-column; there are body"),
        (["--glue-submission", "x"], "demo is no task of GLUE"),
        (["--data", "{}/own.xlsx"], "it takes a .tsv, .csv or .jsonl file"),
        (["--data", "{}/own.csv", "--predict", "{}/blank.csv"], "blank.csv, line 3: blank"),
        (["--data", "{}/own.csv", "--dev", "{}/own.csv", "--dev-share", "0.5"], "--dev is what to evaluate on"),
        (["--task", "demo", "--dev-share", "0.5"], "--dev-share: demo has texts to evaluate on"),
        (["--task", "demo", "--text-column", "x"], "--text-column: belongs to a file of your own"),
        (["--layout-plan", "x.json", "--init", "copy"], "--init: --layout-plan says it of every layer"),
        (["--data", "{}/packed.csv"], "packed.csv: is packed with gzip"),
        (["--data", "{}"], "is a folder; say with --task which task's files it has"),
        (["--task", "nonsense", "--lr", "-1"], "--lr -1.0: it takes a number above 0 and below 1000"),
    ],
)
def test_mistakes_in_own_data_are_one_line_and_start_nothing(tmp_path, arguments, words, capsys):
    (tmp_path / "own.csv").write_text("text,label\nx,a\ny,b\nz,a\nw,b\n")
    (tmp_path / "dev.csv").write_text("text,label\nx,c\n")
    (tmp_path / "blank.csv").write_text("text\nx\n\n")
    (tmp_path / "blank.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "packed.csv").write_bytes(gzip.compress(b"text,label\nx,a\n"))
    (tmp_path / "own.xlsx").touch()
    assert run(tmp_path, *(argument.format(tmp_path) for argument in arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(words, error), error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


def standard_input(content):
    return io.TextIOWrapper(io.BytesIO(content.encode()))


def test_predict_prints_a_line_a_text(checkpoint, capsys, monkeypatch):
    assert main(["predict", str(checkpoint), *TEXTS[:4]]) == 0
    lines = capsys.readouterr().out.split("\n")[:-1]
    for line, text in zip(lines, TEXTS[:4], strict=True):
        probabilities = expected(checkpoint, text)
        label = ["no", 'yes, "really"', "a b"][probabilities.index(max(probabilities))]
        assert line == f"{label}\t{max(probabilities):.1%}\t{text.strip()}"
    monkeypatch.setattr("sys.stdin", standard_input("\ufeff" + "".join(f"{text}\r\n" for text in TEXTS[:4])))
    assert main(["predict", str(checkpoint)]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == lines


def test_predict_takes_pairs(checkpoint, capsys, monkeypatch):
    assert main(["predict", str(checkpoint), "a film", "good", "--pair", "not bad", "--pair", "bad"]) == 0
    given = capsys.readouterr().out
    for line, pair in zip(given.splitlines(), [("a film", "not bad"), ("good", "bad")], strict=True):
        assert f"\t{max(expected(checkpoint, *pair)):.1%}\t{pair[0]}\t{pair[1]}" in line
    (checkpoint.parent / "run.json").write_text('{"settings": {"max_length": 128, "columns": ["first", "second"]}}')
    monkeypatch.setattr("sys.stdin", standard_input("a film\tnot bad\ngood\tbad\n"))
    assert main(["predict", str(checkpoint.parent)]) == 0
    assert capsys.readouterr().out == given


def test_pairs_are_not_lost_in_silence(checkpoint, tmp_path, capsys):
    classify = Classifier.load(checkpoint)
    for wrong in (("a", ["b"]), (["a"], "b"), (["a", "b"], ["c"])):
        with pytest.raises(FunnelError, match="second text"):
            classify(*wrong)
    (checkpoint.parent / "run.json").write_text('{"settings": {"max_length": 128, "columns": ["first", "second"]}}')
    (tmp_path / "new.jsonl").write_text('{"first": "a film", "one": "a film", "second": "bad"}\n')
    for flags in ((), ("--text-column", "one")):
        out = tmp_path / "out.jsonl"
        assert main(["predict", str(checkpoint.parent), "--file", str(tmp_path / "new.jsonl"), "--out", str(out), *flags]) == 0
        found = json.loads(out.read_text())["probabilities"].values()
        assert list(found) == pytest.approx(expected(checkpoint, "a film", "bad"), abs=1e-6)
    (tmp_path / "new.jsonl").write_text('{"text": "a film"}\n')
    assert main(["predict", str(checkpoint.parent), "--file", str(tmp_path / "new.jsonl")]) == 2
    assert "no column 'second'; name it with --text-pair-column" in capsys.readouterr().err


def test_a_classifier_of_pairs_wants_pairs(checkpoint, capsys, monkeypatch):
    (checkpoint.parent / "run.json").write_text('{"settings": {"max_length": 128, "columns": ["first", "second"]}}')
    assert main(["predict", str(checkpoint.parent), "a film"]) == 2
    assert "was trained on pairs (first, second); give second texts, too (--pair TEXT)" in capsys.readouterr().err
    for line, words in (("good", "has no tab"), ("good\tbad\tworse", "has 2 tabs")):
        monkeypatch.setattr("sys.stdin", standard_input(f"a film\tbad\n{line}\n"))
        assert main(["predict", str(checkpoint.parent)]) == 2
        assert f"standard input, line 2: {words}" in capsys.readouterr().err
    assert main(["explain", str(checkpoint.parent), "a film"]) == 2
    assert "give second texts, too" in capsys.readouterr().err


def test_a_classifier_of_single_texts_wants_no_pairs(checkpoint, tmp_path, capsys):
    (checkpoint.parent / "run.json").write_text('{"settings": {"max_length": 128, "columns": ["text"]}}')
    (tmp_path / "new.csv").write_text("text,more\na,b\n")
    for arguments in (("predict", "a", "--pair", "b"), ("explain", "a", "--pair", "b"),
                      ("predict", "--file", str(tmp_path / "new.csv"), "--text-pair-column", "more")):  # fmt: skip
        assert main([arguments[0], str(checkpoint.parent), *arguments[1:]]) == 2
        assert "was trained on single texts (text); leave second texts out" in capsys.readouterr().err


def test_texts_may_stand_behind_options(checkpoint, capsys):
    assert main(["predict", str(checkpoint), "a film", "good"]) == 0
    out = capsys.readouterr().out
    assert main(["predict", str(checkpoint), "--dtype", "fp32", "a film", "good"]) == 0
    assert capsys.readouterr().out == out
    with pytest.raises(SystemExit):
        main(["predict", str(checkpoint), "--dtype", "fp32", "a film", "--god"])


def test_texts_that_are_cut_are_told(checkpoint, tmp_path, capsys):
    (checkpoint.parent / "run.json").write_text('{"settings": {"max_length": 6, "columns": ["text"]}}')
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": "good " * n}) + "\n" for n in (4, 5, 1, 6)))
    assert main(["predict", str(checkpoint.parent), "--file", str(tmp_path / "new.jsonl")]) == 0
    assert "warning: 2 texts have more than 6 tokens" in capsys.readouterr().err
    for command in ("predict", "explain"):
        assert main([command, str(checkpoint.parent), "good " * 5]) == 0
        assert "warning: 1 text has more than 6 tokens" in capsys.readouterr().err
        assert main([command, str(checkpoint.parent), "good"]) == 0
        assert "warning" not in capsys.readouterr().err


def test_letters_that_the_locale_lacks_stop_nothing(checkpoint, monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, "ascii"))
    assert main(["predict", str(checkpoint), "un café"]) == 0
    assert out.getvalue().decode("ascii").endswith("un caf\\xe9\n")


def test_an_argument_that_is_not_utf8_is_named(checkpoint, capsys):
    assert main(["predict", str(checkpoint), "a film", os.fsdecode(b"caf\xe9")]) == 2
    assert r"error: 'caf\udce9': a text that is not UTF-8" in capsys.readouterr().err


def test_a_run_without_a_best_checkpoint_says_so(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    assert main(["predict", str(tmp_path), "x"]) == 2
    assert "the run has no best checkpoint yet" in capsys.readouterr().err


def test_bytes_on_standard_input_that_are_no_text_are_an_error(checkpoint, capsys, monkeypatch):
    for content, words in ((b"good\ncaf\xe9\n", "line 2: not UTF-8 text"), (b"good\n\0\n", "line 2: has a NUL byte")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert main(["predict", str(checkpoint)]) == 2
        assert f"standard input, {words}" in capsys.readouterr().err


def test_predict_reads_the_columns_of_training_and_writes_a_file(checkpoint, tmp_path, capsys):
    run = checkpoint.parent
    (run / "run.json").write_text('{"settings": {"max_length": 128, "columns": ["review"]}}')
    (tmp_path / "new.csv").write_text("text,review\nx,a good film\n")
    assert main(["predict", str(run), "--file", str(tmp_path / "new.csv")]) == 0
    rows = list(csv.reader((run / "predictions-new.csv").open()))
    assert [float(p) for p in rows[1][2:]] == pytest.approx(expected(checkpoint, "a good film"), abs=1e-6)
    (tmp_path / "other.jsonl").write_text('{"text": "good"}\n')
    assert main(["predict", str(run), "--file", str(tmp_path / "other.jsonl"), "--out", str(tmp_path / "o.jsonl")]) == 0
    found = json.loads((tmp_path / "o.jsonl").read_text())
    assert list(found["probabilities"].values()) == pytest.approx(expected(checkpoint, "good"), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("text", "--file", "x.csv"), "not both"),
        (("text", "--out", "x.csv"), "--out: belongs to --file"),
        (("text", "--pair", "a", "--pair", "b"), "given 2 times for 1 texts"),
        (("--file", "missing.csv"), "--file missing.csv: no such file"),
        (("--file", "texts.txt"), "it takes a .tsv"),
    ],
)
def test_mistakes_of_predict_are_one_line(arguments, words, checkpoint, capsys):
    assert main(["predict", str(checkpoint), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_explain_prints_every_block(checkpoint, capsys):
    assert main(["explain", str(checkpoint), "the very good film"]) == 0
    out = capsys.readouterr().out
    assert "very good" in out
    assert out.count("block") == 3

"""Trained classifiers: loading, predictions, prediction files, GLUE submissions."""

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, reference_probabilities, tiny_config

from funnel import inference
from funnel.data.files import ExampleFile
from funnel.data.tasks import TASKS, get_task
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.inference import Classifier, InputFormat, Prediction, write_glue_submission, write_predictions
from funnel.model.heads import FunnelForMaskedLM, FunnelForSequenceClassification

TEXTS = ["", "a good film", "the very bad film " * 9, "good"] * 3


def write_settings(run: Path, **settings) -> None:
    (run / "run.json").write_text(json.dumps({"version": 2, "command": "x", "settings": settings}))


# --- predictions ------------------------------------------------------------------------------------------------------


def test_predictions_are_in_order_and_contain_all_probabilities(classifier_folder):
    classifier = Classifier.load(classifier_folder)
    for text, prediction in zip(TEXTS, classifier(TEXTS), strict=True):
        expected = reference_probabilities(classifier_folder, text)
        assert list(prediction.probabilities.values()) == pytest.approx(expected, abs=1e-6)
        assert prediction.probability == max(prediction.probabilities.values()) == prediction.probabilities[prediction.label]
    assert classifier([]) == []


def test_one_text_gives_one_prediction(classifier_folder):
    classifier = Classifier.load(classifier_folder)
    prediction = classifier("a good film", "not bad")
    assert isinstance(prediction, Prediction)
    expected = reference_probabilities(classifier_folder, "a good film", "not bad")
    assert list(prediction.probabilities.values()) == pytest.approx(expected, abs=1e-6)
    assert classifier(["a good film"], ["not bad"])[0].label == prediction.label


@pytest.mark.parametrize("arguments", [("a", ["b"]), (["a"], "b"), (["a", "b"], ["c"])])
def test_pairs_must_match_texts(arguments, classifier_folder):
    with pytest.raises(FunnelError, match="pair"):
        Classifier.load(classifier_folder)(*arguments)


def test_check_pairs_compares_with_the_training_columns(classifier_folder):
    Classifier.load(classifier_folder).check_pairs(True)  # unknown
    write_settings(classifier_folder.parent, columns=["first", "second"])
    Classifier.load(classifier_folder).check_pairs(True)
    with pytest.raises(FunnelError, match=r"trained on text pairs \(first, second\); pair is required"):
        Classifier.load(classifier_folder).check_pairs(False)
    write_settings(classifier_folder.parent, columns=["text"])
    Classifier.load(classifier_folder).check_pairs(False)
    with pytest.raises(FunnelError, match=r"trained on single texts \(text\)"):
        Classifier.load(classifier_folder).check_pairs(True)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_texts_are_truncated_as_in_training(classifier_folder):
    write_settings(classifier_folder.parent, max_length=6)
    for folder in (classifier_folder, classifier_folder.parent):
        classifier = Classifier.load(folder)
        assert classifier("a good film a bad") == classifier("a good film a good")
        assert classifier.n_truncated == 2
    (classifier_folder.parent / "run.json").unlink()
    classifier = Classifier.load(classifier_folder)
    assert classifier("a good film a bad") != classifier("a good film a good")
    assert classifier.n_truncated == 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"settings": {"max_length": 64, "columns": ["a", "b"]}}, InputFormat(64, ("a", "b"))),
        ({"settings": {"max_length": 64, "columns": [3]}}, InputFormat(64)),  # a file without column names
        ({"settings": {"max_length": "x", "columns": None}}, InputFormat()),
        ({"settings": []}, InputFormat()),
        ({}, InputFormat()),
    ],
)
def test_input_format_is_read_from_run_json(content, expected, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert InputFormat.of_run(tmp_path) == expected


def test_only_classifiers_are_loaded(tmp_path):
    FunnelForMaskedLM(tiny_config()).save_pretrained(tmp_path / "lm")
    with pytest.raises(FunnelError, match="expected a FunnelForSequenceClassification, found a FunnelForMaskedLM"):
        Classifier.load(tmp_path / "lm")
    with pytest.raises(FunnelError, match="missing"):
        Classifier.load(tmp_path / "missing")


def test_a_run_of_version_0_1_still_loads():
    fixtures = ROOT / "tests/fixtures/written_by_0_1"
    expected = json.loads((fixtures / "expected.json").read_text())
    classifier = Classifier.load(fixtures / "run", device="cpu", dtype="fp32")
    assert classifier.inputs == InputFormat(128, ("text",))
    torch.testing.assert_close(
        classifier.logits(expected["texts"]), torch.tensor(expected["classifier_logits"]), rtol=0, atol=1e-5
    )


# --- prediction files -------------------------------------------------------------------------------------------------


def read_predictions(path: Path) -> list[tuple[str, list[float]]]:
    """Labels and probabilities."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        if ".jsonl" in path.name:
            return [(row["label"], list(row["probabilities"].values())) for row in map(json.loads, file)]
        rows = list(csv.reader(file)) if ".csv" in path.name else [line.rstrip("\n").split("\t") for line in file]
    assert [row[0] for row in rows[1:]] == [str(i) for i in range(len(rows) - 1)]
    return [(row[1], [float(p) for p in row[2:]]) for row in rows[1:]]


@pytest.mark.parametrize("name", ["out.csv", "out.tsv", "out.jsonl", "out.jsonl.gz", "out.csv.gz"])
@pytest.mark.parametrize("source", ["in.csv", "in.jsonl"])
def test_predictions_of_a_file_are_written_in_order(classifier_folder, tmp_path, monkeypatch, source, name):
    monkeypatch.setattr(inference, "CHUNK_SIZE", 5)
    with (tmp_path / source).open("w", newline="") as file:
        if source == "in.csv":
            csv.writer(file).writerows([["id", "text"], *([i, t] for i, t in enumerate(TEXTS))])
        else:
            file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    classifier = Classifier.load(classifier_folder)
    out = tmp_path / "new" / name
    assert write_predictions(classifier.predict_file(ExampleFile(tmp_path / source, ("text",))), out) == len(TEXTS)
    for (label, probabilities), prediction in zip(read_predictions(out), classifier(TEXTS), strict=True):
        assert label.split() == str(prediction.label).split()
        assert probabilities == pytest.approx(list(prediction.probabilities.values()), abs=1e-6)
    assert [path.name for path in out.parent.iterdir()] == [name]


def test_tsv_fields_contain_no_tabs_and_no_quoting(classifier_folder, tmp_path):
    write_predictions(Classifier.load(classifier_folder)(["good"]), tmp_path / "out.tsv")
    header = (tmp_path / "out.tsv").read_text().splitlines()[0].split("\t")
    assert header == ["index", "label", "probability of no", 'probability of yes, "really"', "probability of a b"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("out.csv", "index,label\n0,2.5\n1,-0.123457\n"),
        ("out.tsv", "index\tlabel\n0\t2.5\n1\t-0.123457\n"),
        ("out.jsonl", '{"index": 0, "label": 2.5}\n{"index": 1, "label": -0.12345678}\n'),
    ],
)
def test_scores_are_written_without_probabilities(name, content, tmp_path):
    predictions = [Prediction(2.5, None, {}), Prediction(-0.12345678, None, {})]
    assert write_predictions(predictions, tmp_path / name) == 2
    assert (tmp_path / name).read_text() == content


def test_a_malformed_input_file_leaves_no_output(classifier_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "CHUNK_SIZE", 1)
    (tmp_path / "in.tsv").write_text("text\tmore\na\tb\nc\n")
    classifier = Classifier.load(classifier_folder)
    with pytest.raises(FunnelError, match=r"in\.tsv, line 3: 1 field"):
        write_predictions(classifier.predict_file(ExampleFile(tmp_path / "in.tsv", ("text",))), tmp_path / "out.tsv")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_prediction_files_of_unknown_format_are_rejected(tmp_path):
    with pytest.raises(FunnelError, match=r"out\.txt: unknown format"):
        write_predictions([], tmp_path / "out.txt")


# --- GLUE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "files"), [("sst2", ["SST-2.tsv"]), ("stsb", ["STS-B.tsv"]), ("mnli", ["AX.tsv", "MNLI-m.tsv", "MNLI-mm.tsv"])]
)
def test_glue_submission_follows_the_servers_format(name, files, classifier_folder, tmp_path):
    """As in GLUE's FAQ: a header, then the index and the label as written in the training file."""
    task = TASKS[name]
    tests = {test: file.in_folder(tmp_path) for test, file in task.tests.items()}
    for file in tests.values():
        row = "\t".join(["a good film"] * len(file.text_columns))
        header = "\t".join(map(str, file.text_columns))
        file.path.write_text(f"index\t{header}\n" + "".join(f"{i}\t{row}\n" for i in range(3)))
    tokenizer = FunnelTokenizer.load(classifier_folder)
    labels = {0: "score"} if task.labels is None else dict(enumerate(task.labels.values()))
    problem = "regression" if task.labels is None else "single_label_classification"
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_decoder_layers=0, id2label=labels, problem_type=problem)
    model = FunnelForSequenceClassification(config)
    if task.labels is None:
        with torch.no_grad():
            model.classifier.linear_out.bias += 7  # above the highest score that the server accepts
    paths = write_glue_submission(Classifier(model, tokenizer), replace(task, tests=tests), tmp_path / "answers")
    assert sorted(path.name for path in paths) == files
    for path in paths:
        header, *rows = path.read_text().splitlines()
        assert header == "index\tprediction"
        assert [row.split("\t")[0] for row in rows] == ["0", "1", "2"]
        answers = {row.split("\t")[1] for row in rows}
        assert answers == {"5.000"} if task.labels is None else answers <= task.labels.keys()


@pytest.fixture
def three_class_task(tmp_path, classifier_folder):
    """MNLI with two one-line test files and the classifier's labels."""
    tests = {name: ExampleFile(tmp_path / f"{name}.tsv", ("text",)) for name in ("first", "second")}
    for file in tests.values():
        file.path.write_text("text\nx\n")
    labels = {name: name for name in Classifier.load(classifier_folder).model.config.id2label.values()}
    return replace(get_task("mnli"), labels=labels, tests=tests)


def test_glue_submission_is_written_completely_or_not_at_all(three_class_task, classifier_folder, tmp_path, monkeypatch):
    write_text = Path.write_text

    def fail_at_second(path, *args, **kwargs):
        if "second" in path.name:
            raise OSError("disk full")
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", fail_at_second)
    with pytest.raises(FunnelError, match=r"cannot write .*second\.tsv \(disk full\)"):
        write_glue_submission(Classifier.load(classifier_folder), three_class_task, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_glue_submission_requires_the_tasks_labels(three_class_task, classifier_folder, tmp_path):
    task = replace(three_class_task, labels={"0": "negative", "1": "positive"})
    with pytest.raises(FunnelError, match=r"the classifier's labels are no, .*, but MNLI has negative, positive"):
        write_glue_submission(Classifier.load(classifier_folder), task, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_malformed_glue_test_file_writes_nothing(three_class_task, classifier_folder, tmp_path):
    (tmp_path / "second.tsv").write_text("text\nx\ty\n")
    with pytest.raises(FunnelError, match=r"second\.tsv, line 2"):
        write_glue_submission(Classifier.load(classifier_folder), three_class_task, tmp_path / "out")
    assert not (tmp_path / "out").exists()

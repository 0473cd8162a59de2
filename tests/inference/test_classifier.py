"""Trained classifiers: loading, predictions, prediction files, GLUE submissions."""

import csv
import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, reference_probabilities, tiny_config

from funnel.data.files import Example, ExampleFile
from funnel.data.tasks import TASKS, get_task
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.inference import classifier as classifier_module
from funnel.inference.classifier import Classifier, Prediction
from funnel.inference.predictions import write_glue_submission, write_predictions
from funnel.inference.predictor import InputFormat
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


@pytest.mark.parametrize("convert", [tuple, np.array, iter, lambda texts: dict.fromkeys(texts).keys()])
def test_texts_may_be_any_iterable_of_strings(convert, classifier_folder):
    classifier = Classifier.load(classifier_folder)
    texts, pairs = ["a good film", "bad"], ["not bad", "good"]
    assert classifier(convert(texts)) == classifier(texts)
    assert classifier(convert(texts), convert(pairs)) == classifier(texts, pairs)
    assert classifier(convert([])) == []


def test_texts_may_be_a_pandas_series(classifier_folder):
    pandas = pytest.importorskip("pandas")
    classifier = Classifier.load(classifier_folder)
    assert classifier(pandas.Series(TEXTS, index=range(7, 7 + len(TEXTS)))) == classifier(TEXTS)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "texts has type NoneType"),
        (3, "texts has type int"),
        (b"a film", "texts has type bytes"),
        ({"text": ["a film"]}, "texts has type dict"),
        (np.array([["a", "film"]]), "texts has type ndarray"),
        (["a", 1], r"texts\[1\] has type int \(1\): expected a string"),
        (["a", None], r"texts\[1\] has type NoneType"),
        ([["a", "film"]], r"texts\[0\] has type list"),
        (np.array(["a", np.nan], dtype=object), r"texts\[1\] has type float"),
    ],
)
def test_non_string_inputs_are_errors(texts, message, classifier_folder):
    classifier = Classifier.load(classifier_folder)
    with pytest.raises(FunnelError, match=message):
        classifier(texts)
    with pytest.raises(FunnelError, match=message.replace("texts", "pairs") if texts is not None else message):
        classifier(texts if texts is None else ["a"], texts)


def test_logits_that_are_not_finite_are_an_error(classifier_folder, tmp_path):
    classifier = Classifier.load(classifier_folder, dtype="bf16")
    torch.nn.init.constant_(next(classifier.model.classifier.parameters()), math.nan)
    with pytest.raises(FunnelError, match=r"logits of 2 examples of the input are not finite in bf16; use dtype fp32"):
        classifier(["a", "b"])
    (tmp_path / "in.csv").write_text("text\na good film\n")
    with pytest.raises(FunnelError, match="not finite"):
        next(classifier.predict_file(ExampleFile(tmp_path / "in.csv", ("text",))))


def test_no_texts_have_no_logits(classifier_folder):
    assert Classifier.load(classifier_folder).logits([]).shape == (0, 3)


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


def test_a_call_checks_the_training_columns(classifier_folder):
    classifier = Classifier.load(classifier_folder)
    for columns, arguments in ((("text",), (["a"], ["b"])), (("first", "second"), (["a"],)), (("first", "second"), ("a",))):
        classifier.inputs = InputFormat(16, columns)
        with pytest.raises(FunnelError, match="the classifier was trained on"):
            classifier(*arguments)


def test_the_checkpoints_input_format_takes_precedence(classifier_folder, tmp_path):
    write_settings(classifier_folder.parent, max_length=6, columns=["text"])
    values = json.loads((classifier_folder / "config.json").read_text())
    values |= {"model_max_length": 9, "text_columns": ["first", "second"]}
    (classifier_folder / "config.json").write_text(json.dumps(values))
    assert Classifier.load(classifier_folder.parent).inputs == InputFormat(9, ("first", "second"))
    copy = classifier_folder.rename(tmp_path / "copy")  # without a run
    assert Classifier.load(copy).inputs == InputFormat(9, ("first", "second"))


def test_a_regression_with_several_outputs_is_an_error(classifier_folder):
    values = json.loads((classifier_folder / "config.json").read_text())
    (classifier_folder / "config.json").write_text(json.dumps(values | {"problem_type": "regression"}))
    with pytest.raises(FunnelError, match=r"regression with \d outputs"):
        Classifier.load(classifier_folder)


def test_maximum_length_is_limited_by_the_position_embeddings(tmp_path):
    config = tiny_config(position_embeddings=20, position_offset=2)
    assert InputFormat.of_checkpoint(config.replace(model_max_length=100), tmp_path).max_length == 18
    assert InputFormat.of_checkpoint(config.replace(model_max_length=10), tmp_path).max_length == 10
    assert InputFormat.of_checkpoint(config, tmp_path).max_length == 18


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
    with pytest.raises(
        FunnelError, match="expected a trained model with a head, found a FunnelForMaskedLM; fine-tune it first"
    ):
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


def read_predictions(path: Path) -> list[tuple[str, list[float], str]]:
    """Labels, probabilities and texts."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        if ".jsonl" in path.name:
            return [(row["label"], list(row["probabilities"].values()), row["text"]) for row in map(json.loads, file)]
        rows = list(csv.reader(file, delimiter="," if ".csv" in path.name else "\t", strict=True))
    assert [row[0] for row in rows[1:]] == [str(i) for i in range(len(rows) - 1)]
    return [(row[1], [float(p) for p in row[2:-1]], row[-1]) for row in rows[1:]]


@pytest.mark.parametrize("name", ["out.csv", "out.tsv", "out.jsonl", "out.jsonl.gz", "out.csv.gz"])
@pytest.mark.parametrize("source", ["in.csv", "in.jsonl"])
def test_predictions_of_a_file_are_written_in_order(classifier_folder, tmp_path, monkeypatch, source, name):
    monkeypatch.setattr(classifier_module, "CHUNK_SIZE", 5)
    with (tmp_path / source).open("w", newline="") as file:
        if source == "in.csv":
            csv.writer(file).writerows([["id", "text"], *([i, t] for i, t in enumerate(TEXTS))])
        else:
            file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    classifier = Classifier.load(classifier_folder)
    out = tmp_path / "new" / name
    file = ExampleFile(tmp_path / source, ("text",))
    assert write_predictions(classifier.predict_file(file), file, out) == len(TEXTS)
    predictions = zip(read_predictions(out), TEXTS, classifier(TEXTS), strict=True)
    for (label, probabilities, copied), text, prediction in predictions:
        assert (label, copied) == (prediction.label, text)
        assert probabilities == pytest.approx(list(prediction.probabilities.values()), abs=1e-6)
    assert [path.name for path in out.parent.iterdir()] == [name]


def rows(*predictions: Prediction, text: str = "good") -> list[tuple[Example, Prediction]]:
    return [(Example(text, None, None, number), prediction) for number, prediction in enumerate(predictions, 1)]


@pytest.mark.parametrize("name", ["out.csv", "out.tsv"])
@pytest.mark.parametrize("text", ['a "good" film', '"a', "a\tb", "a, b", "a\nb", "a\r\nb", "", " a "])
def test_fields_are_quoted(name, text, tmp_path):
    prediction = Prediction("a\tb", 1.0, {"a\tb": 1.0})
    write_predictions(rows(prediction, text=text), ExampleFile(Path("in"), ("text",)), tmp_path / name)
    with (tmp_path / name).open(newline="") as file:
        header, row = csv.reader(file, delimiter="," if name == "out.csv" else "\t", strict=True)
    assert header == ["index", "label", "probability of a\tb", "text"]
    assert row == ["0", "a\tb", "1.000000", text]


def test_a_lone_carriage_return_is_written_as_a_line_feed(tmp_path):
    write_predictions(rows(Prediction(2.5, None, {}), text="a\rb"), ExampleFile(Path("in"), ("text",)), tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == b'index,label,text\n0,2.5,"a\nb"\n'


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
def test_copied_columns_do_not_hide_those_of_the_predictions(name, tmp_path):
    source = ExampleFile(Path("in"), ("label",), extra_columns=("input label", "index"))
    row = (Example("good", None, None, 1, ("x", "7")), Prediction(2.5, None, {}))
    write_predictions([row], source, tmp_path / name)
    if name == "out.csv":
        content = "index,label,input label,input input label,input index\n0,2.5,good,x,7\n"
    else:
        content = '{"index": 0, "label": 2.5, "input label": "good", "input input label": "x", "input index": "7"}\n'
    assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("out.csv", "index,label,text\n0,2.5,good\n1,-0.12345678,good\n"),
        ("out.tsv", "index\tlabel\ttext\n0\t2.5\tgood\n1\t-0.12345678\tgood\n"),
        ("out.jsonl", '{"index": 0, "label": 2.5, "text": "good"}\n{"index": 1, "label": -0.12345678, "text": "good"}\n'),
    ],
)
def test_scores_are_written_without_probabilities(name, content, tmp_path):
    predictions = rows(Prediction(2.5, None, {}), Prediction(-0.12345678, None, {}))
    assert write_predictions(predictions, ExampleFile(Path("in"), ("text",)), tmp_path / name) == 2
    assert (tmp_path / name).read_text() == content


def test_a_malformed_input_file_leaves_no_output(classifier_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier_module, "CHUNK_SIZE", 1)
    (tmp_path / "in.tsv").write_text("text\tmore\na\tb\nc\n")
    classifier, file = Classifier.load(classifier_folder), ExampleFile(tmp_path / "in.tsv", ("text",))
    with pytest.raises(FunnelError, match=r"in\.tsv, line 3: 1 field"):
        write_predictions(classifier.predict_file(file), file, tmp_path / "out.tsv")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_prediction_files_of_unknown_format_are_rejected(tmp_path):
    with pytest.raises(FunnelError, match=r"out\.txt: unknown format"):
        write_predictions([], ExampleFile(Path("in"), ("text",)), tmp_path / "out.txt")


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_accepts_label_names_and_the_tasks_spellings(classifier_folder, tmp_path):
    """As on the predictions themselves, so that all metrics are known."""
    classifier = Classifier.load(classifier_folder)
    spellings = dict(zip("012", classifier.model.config.id2label.values(), strict=True))
    labels = [prediction.label for prediction in classifier(TEXTS)]
    spelled = [next(spelling for spelling, name in spellings.items() if name == label) for label in labels]
    for written in (labels, spelled):
        lines = [json.dumps({"text": t, "label": label}) for t, label in zip(TEXTS, written, strict=True)]
        (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
        source = ExampleFile(tmp_path / "in.jsonl", ("text",), "label")
        scores, errors = classifier.evaluate_file(source, ("accuracy",), spellings)
        assert scores["accuracy"] == 1
        assert errors["mistakes"] == []
        assert sum(map(sum, errors["confusion"])) == errors["examples"] == len(TEXTS)


def test_an_unknown_label_is_an_error_with_its_line(classifier_folder, tmp_path):
    (tmp_path / "in.csv").write_text("text,label\na,no\nb,No\n")
    source = ExampleFile(tmp_path / "in.csv", ("text",), "label")
    with pytest.raises(FunnelError, match=r"in\.csv, line 3: unknown label 'No'; the labels are no"):
        Classifier.load(classifier_folder).evaluate_file(source, ("accuracy",))


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

"""Several labels per text: metrics, threshold, and from a file to predictions."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config

import train
from funnel import Classifier
from funnel.cli.main import main
from funnel.data.dataset import Dataset, Rows, Truncation
from funnel.data.files import parse_labels
from funnel.errors import FunnelError
from funnel.problems.classification import Classification
from funnel.problems.metrics import MULTI_LABEL
from funnel.problems.multi_label import DEFAULT_THRESHOLD, MultiLabel, best_threshold
from funnel.problems.regression import Regression


def dataset_of(labels):
    """A data set without texts."""
    n = len(labels)
    ones = np.ones(n, np.int32)
    return Dataset(np.ones(n, np.int32), Rows(np.arange(n), ones, ones, labels, np.zeros(n, np.uint64)), 0, Truncation())


def label_sets():
    random = np.random.default_rng(0)
    for n, k, share in itertools.product((1, 2, 17), (1, 2, 5), (0.0, 0.3, 1.0)):
        for predicted_share in (0.0, 0.5, 1.0):
            labels = (random.random((n, k)) < share).astype(np.float32)
            yield random.random((n, k)) < predicted_share, labels


def test_metrics_equal_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    for predictions, labels in label_sets():
        # scikit-learn reads a single column as the classes of one label per example
        both = [np.pad(array.astype(int), ((0, 0), (0, 1))) for array in (labels, predictions)]
        for name, average in (("f1 (micro)", "micro"), ("f1 (macro)", "macro")):
            expected = metrics.f1_score(*both, average=average, zero_division=0)
            if average == "macro":  # without the added class, whose F1 is 0
                expected *= both[0].shape[1] / labels.shape[1]
            assert MULTI_LABEL[name](predictions, labels) == pytest.approx(expected), (predictions, labels)
        assert MULTI_LABEL["subset accuracy"](predictions, labels) == pytest.approx(metrics.accuracy_score(*both))


def f1_at(threshold, probabilities, labels):
    predicted = probabilities > threshold
    hits, total = (predicted & (labels > 0)).sum(), predicted.sum() + (labels > 0).sum()
    return 2 * hits / total if total else 0.0


@pytest.mark.parametrize("seed", range(40))
def test_the_best_threshold_has_the_highest_f1_of_all(seed):
    random = np.random.default_rng(seed)
    probabilities = random.random((random.integers(1, 8), random.integers(1, 4)))
    if seed % 2:  # with ties
        probabilities = probabilities.round(1)
    labels = (random.random(probabilities.shape) < 0.4).astype(np.float32)
    threshold = best_threshold(probabilities, labels)
    if not labels.any():
        assert threshold == DEFAULT_THRESHOLD
        return
    values = np.unique(np.append(probabilities, [0, 1]))
    candidates = np.concatenate([values, (values[1:] + values[:-1]) / 2, values - 1e-9])
    best = max(f1_at(t, probabilities, labels) for t in candidates if t >= 0)
    assert f1_at(threshold, probabilities, labels) == pytest.approx(best)
    assert 0 <= threshold <= 1


@pytest.mark.parametrize("probabilities", [[[np.nan]], [[np.inf]]])
def test_the_threshold_stays_at_its_default_if_probabilities_are_not_finite(probabilities):
    assert best_threshold(np.array(probabilities), np.ones((1, 1))) == DEFAULT_THRESHOLD


@pytest.mark.parametrize("probability", [0.0, 1.0, 1e-300])
def test_saturated_probabilities_give_a_threshold(probability):
    probabilities = np.full((3, 2), probability)
    threshold = best_threshold(probabilities, np.ones((3, 2)))
    assert 0 <= threshold <= 1
    if probability > 0:
        assert f1_at(threshold, probabilities, np.ones((3, 2))) == 1


def options(**values):
    return SimpleNamespace(**{"label_smoothing": 0.0, "class_weights": None, **values})


LABELS = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]], np.float32)


def problem_with(kind, n_labels, **values):
    return kind(tiny_config(num_decoder_layers=0, id2label={i: f"l{i}" for i in range(n_labels)}, **values))


def multi_label():
    return problem_with(MultiLabel, 3, problem_type="multi_label_classification")


def test_balanced_weights_are_inverse_frequencies_and_one_for_absent_classes():
    problem = multi_label()
    problem.prepare(dataset_of(LABELS), options(class_weights="balanced"))
    # counts 3, 1, 0: 4 / (2 classes x count); an absent class is weighted as if it occurred once
    assert problem.class_weights.tolist() == pytest.approx([4 / 6, 4 / 2, 4 / 2])


def test_balanced_weights_of_classes_equal_scikit_learns():
    utils = pytest.importorskip("sklearn.utils.class_weight")
    labels = np.array([0, 0, 0, 1, 2, 2], np.int32)
    problem = problem_with(Classification, 3)
    problem.prepare(dataset_of(labels), options(class_weights="balanced"))
    expected = utils.compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert problem.class_weights.numpy() == pytest.approx(expected)


def test_label_smoothing_and_class_weights_change_the_training_loss_only():
    problem, logits = multi_label(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    plain = problem.mean_loss(logits, dataset_of(LABELS))
    targets = torch.from_numpy(LABELS)
    assert float(problem.loss(logits, targets)) == pytest.approx(plain)
    problem.prepare(dataset_of(LABELS), options(label_smoothing=0.2, class_weights="balanced"))
    smooth = targets * 0.8 + 0.1
    losses = -(smooth * F.logsigmoid(logits) + (1 - smooth) * F.logsigmoid(-logits))
    assert float(problem.loss(logits, targets)) == pytest.approx(float((losses * torch.tensor([2 / 3, 2, 2])).mean()))
    assert problem.mean_loss(logits, dataset_of(LABELS)) == pytest.approx(plain)


@pytest.mark.parametrize("values", [{"label_smoothing": 0.1}, {"class_weights": "balanced"}])
def test_scores_have_neither_label_smoothing_nor_class_weights(values):
    problem = Regression(tiny_config(num_decoder_layers=0, id2label={0: "score"}, problem_type="regression"))
    name = next(iter(values))
    with pytest.raises(FunnelError, match=f"{name} has no effect for a regression; omit it") as error:
        problem.prepare(dataset_of(np.ones(2, np.float32)), options(**values))
    assert error.value.parameter == name


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a,b", ["a", "b"]),
        (" a , b ,", ["a", "b"]),
        ("", []),
        ("a,a", ["a"]),
        ('["a, b", "c"]', ["a, b", "c"]),
        ("[1, 2]", ["1", "2"]),
        ("[]", []),
        ("[a", ["[a"]),
    ],
)
def test_labels_are_a_json_list_or_separated_by_commas(text, labels):
    assert parse_labels(text) == labels


# --- from a file to predictions ---------------------------------------------------------------------------------------

WORDS = {"good": "fine", "long": "slow", "loud": "noise, much"}


def texts_and_labels():
    for flags in list(itertools.product((False, True), repeat=3)) * 8:
        chosen = [word for word, flag in zip(WORDS, flags, strict=True) if flag]
        yield " ".join(["a film", *chosen]), [WORDS[word] for word in chosen]


def write_file(path):
    rows = list(texts_and_labels())
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "label": labels}) + "\n" for text, labels in rows))
    else:  # a label with a comma needs a JSON list
        lines = [f'{text},"{",".join(labels).replace("noise, much", "noise")}"' for text, labels in rows]
        path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_multi_label_from_training_to_predictions(tmp_path, suffix, capsys):
    path, run = write_file(tmp_path / f"mine{suffix}"), tmp_path / "run"
    command = ["--data", str(path), "--weights", "none", "--blocks", "1,1", "--steps", "60", "--batch-size", "16"]
    command += ["--lr", "3e-3", "--out", str(run), "--class-weights", "balanced", "--label-smoothing", "0.05"]
    if suffix == ".csv":
        command += ["--problem", "multi-label"]
    assert train.main(command) == 0
    assert "3 classes" in capsys.readouterr().out
    config = json.loads((run / "best/config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    names = list(config["id2label"].values())
    assert names == sorted(name if suffix == ".jsonl" else name.partition(",")[0] for name in WORDS.values())

    classifier = Classifier.load(run, device="cpu", dtype="fp32")
    threshold = config["decision_threshold"]
    assert classifier.problem.decision_threshold == threshold
    text = "a film good loud"
    prediction = classifier(text)
    expected = classifier.logits([text])[0].double().sigmoid().tolist()
    assert list(prediction.probabilities.values()) == pytest.approx(expected)
    assert prediction.label == [name for name, p in zip(names, expected, strict=True) if p > threshold]
    assert prediction.label == [name for name in names if name.startswith(("fine", "noise"))]  # it has learned the words

    assert main(["evaluate", str(run), str(path), "--out", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["scores"]["f1 (micro)"] == pytest.approx(1.0)
    assert scores["threshold"] == threshold
    assert main(["predict", str(run), "--file", str(path), "--out", str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows[:2]] == [[], [name for name in names if name.startswith("noise")]]
    assert main(["report", str(run)]) == 0

"""Ensembles: averages that NumPy confirms, and the classifiers that do not fit together."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_config

from funnel import Ensemble
from funnel.cli.main import main
from funnel.data.custom import ColumnChoice
from funnel.data.encoding import encode_texts
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.inference.classifier import Classifier
from funnel.inference.predictor import InputFormat
from funnel.model.heads import FunnelForSequenceClassification

TEXTS = ["a good film", "the very bad film", "", "not good not bad"] * 3
REGRESSION = {"problem_type": "regression", "id2label": {0: "score"}}
MULTI_LABEL = {"problem_type": "multi_label_classification"}


def make_classifier(seed: int, columns: tuple[str, ...] = (), **changes) -> Classifier:
    """A random classifier with a tokenizer, layout and maximum length of its own."""
    torch.manual_seed(seed)
    tokenizer = FunnelTokenizer.train(["good bad film a the very not"] * 5 if seed % 2 else ["a good film"] * 5)
    values = {"blocks": ("1,1", "2", "1,1,1")[seed % 3], "id2label": {0: "no", 1: "yes", 2: "maybe"}, **changes}
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_decoder_layers=0, **values)
    model = FunnelForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.linear_out.weight *= 20  # confident predictions, which differ
    return Classifier(model, tokenizer, InputFormat(8 + seed, columns))


def probabilities(classifier) -> np.ndarray:
    return np.array([list(prediction.probabilities.values()) for prediction in classifier(TEXTS)])


def test_probabilities_are_means():
    members = [make_classifier(seed) for seed in range(3)]
    predictions = Ensemble(members)(TEXTS)
    expected = np.mean([probabilities(member) for member in members], axis=0)
    np.testing.assert_allclose([list(p.probabilities.values()) for p in predictions], expected, atol=1e-12)
    assert [p.label for p in predictions] == [["no", "yes", "maybe"][i] for i in expected.argmax(1)]
    assert [p.probability for p in predictions] == pytest.approx(expected.max(1))


def test_the_probability_of_a_class_that_one_classifier_excludes_is_finite():
    ensemble = Ensemble([make_classifier(0), make_classifier(1)])
    logits = ensemble.average([torch.tensor([[0.0, -5000.0, -5000.0]]), torch.tensor([[0.0, -5000.0, -5000.0]])])
    assert logits.isfinite().all()


def test_scores_are_means():
    members = [make_classifier(seed, **REGRESSION, label_mean=seed, label_std=2.0) for seed in range(3)]
    expected = np.mean([[p.label for p in member(TEXTS)] for member in members], axis=0)
    assert [p.label for p in Ensemble(members)(TEXTS)] == pytest.approx(expected)


def test_a_multi_label_ensemble_averages_probabilities_and_thresholds():
    members = [make_classifier(seed, **MULTI_LABEL, decision_threshold=t) for seed, t in ((0, 0.2), (1, 0.7), (2, None))]
    predictions = Ensemble(members)(TEXTS)
    expected = np.mean([probabilities(member) for member in members], axis=0)
    np.testing.assert_allclose([list(p.probabilities.values()) for p in predictions], expected, atol=1e-12)
    threshold = (0.2 + 0.7 + 0.5) / 3
    names = np.array(["no", "yes", "maybe"])
    assert [p.label for p in predictions] == [names[row > threshold].tolist() for row in expected]
    assert [m.problem.decision_threshold for m in members] == [0.2, 0.7, 0.5]


def test_one_classifier_is_an_ensemble():
    member = make_classifier(0)
    np.testing.assert_allclose(probabilities(Ensemble([member])), probabilities(member), atol=1e-12)


@pytest.mark.parametrize("changes", [{}, REGRESSION, MULTI_LABEL], ids=["classes", "scores", "several labels"])
def test_an_evaluation_has_the_loss_of_the_mean_prediction(changes, tmp_path):
    members = [make_classifier(seed, **changes) for seed in range(3)]
    labels = [0.5, 1.5, 0.0, 1.0] if changes == REGRESSION else ["no", "yes", "maybe", "yes"]
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, labels * 3, strict=True)]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ensemble = Ensemble(members)
    source = ensemble.open_file(tmp_path / "dev.jsonl", ColumnChoice())
    scores, errors = ensemble.evaluate_file(source, ["loss"])
    if changes == REGRESSION:
        mean = np.mean([[p.label for p in member(TEXTS)] for member in members], axis=0)
        expected = np.mean((mean - np.array(labels * 3)) ** 2)
    else:
        mean = np.mean([probabilities(member) for member in members], axis=0)
        targets = np.array([[name == label for name in ("no", "yes", "maybe")] for label in labels * 3])
        expected = -np.log(mean[targets]).mean() if not changes else -np.log(np.where(targets, mean, 1 - mean)).mean()
    assert scores["loss"] == pytest.approx(expected, rel=1e-5)
    assert errors["examples"] == len(rows)


def test_an_encoded_dataset_is_an_error():
    member = make_classifier(0)
    dataset = encode_texts(TEXTS, None, member.tokenizer, 8)
    with pytest.raises(FunnelError, match="an ensemble cannot run on an encoded dataset"):
        Ensemble([member]).evaluate(dataset, ["accuracy"], "x")


def test_each_classifier_truncates_as_in_its_training():
    members = [make_classifier(seed) for seed in range(2)]  # 8 and 9 tokens
    ensemble = Ensemble(members)
    ensemble(["good " * 7, "good " * 40])
    assert ensemble.truncation_note == "2 texts were truncated to 8 tokens"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"id2label": {0: "no", 1: "yes"}},
            "expected the same labels as the first one, no, yes, maybe; found no, yes",
        ),
        ({"id2label": {0: "yes", 1: "no", 2: "maybe"}}, "found yes, no, maybe"),
        (REGRESSION, "classifier 2: expected the same kind as the first one, text classifier; found regression"),
        (MULTI_LABEL, "expected the same kind as the first one, text classifier; found multi-label classifier"),
        ({"columns": ("a", "b")}, "classifier 2: expected the same columns as the first one, a; found a, b"),
    ],
)
def test_classifiers_that_do_not_agree_are_an_error(changes, message):
    with pytest.raises(FunnelError, match=message):
        Ensemble([make_classifier(0, ("a",)), make_classifier(1, **{"columns": ("a",), **changes})])


def test_unknown_columns_agree_with_any():
    assert Ensemble([make_classifier(0, ("a",)), make_classifier(1)]).inputs.columns == ("a",)


def test_an_empty_ensemble_is_an_error():
    with pytest.raises(FunnelError, match="at least one"):
        Ensemble([])


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Checkpoint folders of three classifiers."""
    for seed in range(3):
        member = make_classifier(seed)
        member.model.save_pretrained(tmp_path / f"c{seed}")
        member.tokenizer.save(tmp_path / f"c{seed}")
    return [tmp_path / f"c{seed}" for seed in range(3)]


def test_the_commands_average(folders, tmp_path, capsys):
    first, *others = map(str, folders)
    expected = Ensemble.load(folders, "cpu", "fp32")(["a good film"])[0]
    options = ["--device", "cpu", "--dtype", "fp32"]
    for arguments in (["a good film", "--ensemble", *others], ["--ensemble", others[0], "--ensemble", others[1], first]):
        texts = [] if arguments[0] == "a good film" else ["a good film"]
        assert main(["predict", first, *texts, *arguments, *options]) == 0
        assert capsys.readouterr().out == f"{expected.label}\t{expected.probability:.1%}\ta good film\n"
    (tmp_path / "dev.csv").write_text("text,label\na good film,yes\na film,no\n")
    assert main(["evaluate", first, str(tmp_path / "dev.csv"), "--ensemble", *others, *options]) == 0
    source = (ensemble := Ensemble.load(folders, "cpu", "fp32")).open_file(tmp_path / "dev.csv", ColumnChoice())
    assert f"loss {ensemble.evaluate_file(source, ['loss'])[0]['loss']:.4f}" in capsys.readouterr().out


def test_a_folder_of_runs_stands_for_all_of_them_once(folders, tmp_path):
    for number, folder in enumerate(folders):
        (tmp_path / f"sweep/run{number}").mkdir(parents=True)
        (tmp_path / f"sweep/run{number}/run.json").write_text("{}")
        folder.rename(tmp_path / f"sweep/run{number}/best")
    ensemble = Ensemble.load([tmp_path / "sweep/run1", tmp_path / "sweep"], "cpu")
    assert len(ensemble.classifiers) == 3
    assert len(Ensemble.load(str(tmp_path / "sweep"), "cpu").classifiers) == 3


def test_predictions_of_an_ensemble_replace_no_file_of_a_member(folders, tmp_path, capsys):
    (tmp_path / "new.csv").write_text("text\na film\n")
    arguments = ["predict", str(folders[0]), "--file", str(tmp_path / "new.csv"), "--ensemble", str(folders[1])]
    (folders[1] / "metrics.jsonl").write_text("")
    assert main([*arguments, "--out", str(folders[1] / "metrics.jsonl"), "--overwrite"]) == 2
    assert "this command reads the file" in capsys.readouterr().err


def test_texts_after_the_flag_are_explained(folders, capsys):
    assert main(["predict", str(folders[0]), "--ensemble", str(folders[1]), "a good film"]) == 2
    assert "--ensemble a good film: no such folder; put texts before --ensemble" in capsys.readouterr().err

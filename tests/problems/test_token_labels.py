"""Token labels: loss, what evaluation keeps, metrics, error analysis, and tasks made of the user's own files."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config

from funnel.data.dataset import IGNORED
from funnel.data.encoding import encode_in_memory
from funnel.data.tagged import TaggedFile
from funnel.data.token_encoder import TokenEncoder
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model.heads import FunnelForTokenClassification
from funnel.problems.error_analysis import single_class_warning
from funnel.problems.task_args import TaskArgs, load_task
from funnel.problems.token_labels import TokenLabels
from funnel.training.evaluate import predict

seqeval = pytest.importorskip("seqeval.metrics", reason="needs the extra test: pip install -e '.[test]'")

LABELS = ["O", "B-x", "I-x", "B-y", "I-y"]
CONFIG = tiny_config(id2label=dict(enumerate(LABELS)), num_decoder_layers=1)
PLAIN = SimpleNamespace(label_smoothing=0.0, class_weights=None)
SENTENCES = [
    (["good", "film", "a"], ["B-x", "I-x", "O"]),
    (["bad"] * 9 + ["film"], ["O"] * 4 + ["B-y", "I-y", "I-y", "O", "B-x", "B-x"]),
    (["film"], ["O"]),
]


@pytest.fixture(scope="module")
def tokenizer() -> FunnelTokenizer:
    return FunnelTokenizer.train(["good bad film a"] * 5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tags") / "x.jsonl"
    path.write_text("".join(json.dumps({"tokens": words, "tags": tags}) + "\n" for words, tags in SENTENCES))
    return path


@pytest.fixture(scope="module", params=[6, 50])
def dataset(request, path, tokenizer):
    return encode_in_memory(
        TaggedFile(path), TokenEncoder({name: i for i, name in enumerate(LABELS)}), tokenizer, request.param
    )


def results_of(dataset, ids: list[int]) -> torch.Tensor:
    """What `collect` gives if the words' tags are predicted with these ids, all with a loss of 0.5."""
    results, remaining = torch.zeros(len(dataset), dataset.longest, 3), iter(ids)
    for row in range(len(dataset)):
        batch = dataset.batch(np.array([row]))
        for column in np.flatnonzero(batch.labels[0] != IGNORED):
            results[row, column] = torch.tensor([0.5, next(remaining), 0.9])
    assert next(remaining, None) is None
    return results


TARGETS = [LABELS.index(tag) for _, tags in SENTENCES for tag in tags]
PREDICTED = [1, 2, 0, 0, 0, 0, 0, 3, 4, 0, 0, 1, 2, 0]


def test_metrics_equal_those_of_seqeval_with_and_without_windows(dataset):
    problem, results = TokenLabels(CONFIG), results_of(dataset, PREDICTED)
    ends = np.cumsum([len(words) for words, _ in SENTENCES])[:-1]
    predicted = [[LABELS[i] for i in row] for row in np.split(np.array(PREDICTED), ends)]
    targets = [tags for _, tags in SENTENCES]
    scores = problem.score(results, dataset, ("f1", "precision", "recall", "accuracy", "f1 (strict)"))
    assert scores == pytest.approx(
        {
            "loss": 0.5,
            "f1": seqeval.f1_score(targets, predicted),
            "precision": seqeval.precision_score(targets, predicted),
            "recall": seqeval.recall_score(targets, predicted),
            "accuracy": seqeval.accuracy_score(targets, predicted),
            "f1 (strict)": seqeval.f1_score(targets, predicted, mode="strict"),
        }
    )
    assert 0 < scores["f1"] < scores["accuracy"] < 1


def test_error_analysis_has_scores_by_type_and_the_wrong_words(dataset, tokenizer):
    analysis = TokenLabels(CONFIG).analyze(results_of(dataset, PREDICTED), dataset, tokenizer)
    assert analysis["examples"] == len(SENTENCES)
    expected = seqeval.classification_report(
        [tags for _, tags in SENTENCES],
        [["B-x", "I-x", "O"], ["O", "O", "O", "O", "B-y", "I-y", "O", "O", "B-x", "I-x"], ["O"]],
        output_dict=True,
    )
    for row in analysis["classes"]:
        report = expected[row["label"]]
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx(
            [report[k] for k in ("precision", "recall", "f1-score")]
        )
        assert row["examples"] == report["support"]
    for row, name in zip(analysis["averages"], ("micro avg", "macro avg", "weighted avg"), strict=True):
        report = expected[name]
        assert [row["precision"], row["recall"], row["f1"], row["examples"]] == pytest.approx(list(report.values()))
    assert np.array(analysis["confusion"]).sum() == len(TARGETS)
    assert analysis["calibration"]["count"] == len(TARGETS)
    n_right = sum(p == t for p, t in zip(PREDICTED, TARGETS, strict=True))
    assert analysis["calibration"]["ece"] == pytest.approx(abs(0.9 - n_right / len(TARGETS)))
    columns = [[m[key].split(", ") for m in analysis["mistakes"]] for key in ("label", "predicted")]
    wrong = zip(*(itertools.chain.from_iterable(column) for column in columns), strict=True)
    assert sorted(wrong) == [("bad I-y", "bad O"), ("film B-x", "film I-x")]


def test_the_warning_about_a_single_tag_counts_words(dataset, tokenizer):
    analysis = TokenLabels(CONFIG).analyze(results_of(dataset, [0] * len(TARGETS)), dataset, tokenizer)
    assert f"for all {len(TARGETS)} words of dev" in single_class_warning(analysis)


def test_plain_tags_have_accuracy_and_macro_f1():
    functions = TokenLabels.metric_functions(["DT", "NN"])
    assert list(functions) == ["accuracy", "f1 (macro)"]


def test_collected_values_are_loss_prediction_and_probability():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[IGNORED, 2, 4], [0, -1, IGNORED]])
    kept = TokenLabels(CONFIG).collect(logits, labels)
    assert kept.shape == (2, 3, 3)
    for row, column in ((0, 1), (0, 2), (1, 0)):
        expected = F.cross_entropy(logits[row, column], labels[row, column])
        assert kept[row, column, 0] == pytest.approx(float(expected))
    torch.testing.assert_close(kept[..., 1], logits.argmax(-1).float())
    torch.testing.assert_close(kept[..., 2], logits.softmax(-1).amax(-1))


@pytest.mark.parametrize("options", [PLAIN, SimpleNamespace(label_smoothing=0.1, class_weights="balanced")])
def test_the_loss_is_additive_over_rows_and_the_mean_over_all_words(options, dataset):
    problem = TokenLabels(CONFIG)
    problem.prepare(dataset, options)
    batch = dataset.batch(np.arange(len(dataset)))
    torch.manual_seed(0)
    logits = torch.randn(*batch.labels.shape, len(LABELS))
    weight = None
    if options.class_weights:
        counts = np.bincount(TARGETS, minlength=len(LABELS))
        weight = torch.tensor([len(TARGETS) / (len(LABELS) * count) for count in counts]).float()
        torch.testing.assert_close(problem.class_weights, weight)
    chosen = batch.labels != IGNORED
    parts = F.cross_entropy(logits[chosen], batch.labels[chosen], label_smoothing=options.label_smoothing, reduction="none")
    expected = (parts if weight is None else weight[batch.labels[chosen]] * parts).mean()
    torch.testing.assert_close(problem.loss(logits, batch.labels), expected)
    rows = [problem.loss(logits[i : i + 1], batch.labels[i : i + 1]) for i in range(len(dataset))]
    torch.testing.assert_close(sum(rows) / len(rows), expected)


def test_predictions_do_not_depend_on_the_batch(dataset):
    torch.manual_seed(0)
    model, problem = FunnelForTokenClassification(CONFIG).eval(), TokenLabels(CONFIG)
    results = predict(model, problem, dataset)
    for row in range(len(dataset)):
        alone = predict(model, problem, dataset.subset(np.array([row])))
        length = int(dataset.lengths[row])
        torch.testing.assert_close(alone[0, :length], results[row, :length], atol=1e-5, rtol=1e-5)


# --- the user's own files ---------------------------------------------------------------------------------------------

IOB2 = "a\tDT\tO\nb\tNN\tB-x\n\n" * 5


def test_files_are_recognized_by_name_fields_or_problem(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("x.conll", "x.iob", "x.bio", "x.txt", "x.tsv", "folder/train.conll", "folder/valid.conll"):
        (tmp_path / name).write_text(IOB2)
    (tmp_path / "x.jsonl").write_text('{"tokens": ["a", "b"], "tags": ["O", "B-x"]}\n' * 5)
    for name in ("x.conll", "x.iob", "x.bio", "x.jsonl"):
        task = load_task(TaskArgs(data=tmp_path / name))
        assert (task.problem, task.metrics[0], task.label_names) == ("token-labels", "f1", ["O", "B-x", "I-x"])
    (tmp_path / "y.jsonl").write_text('{"words": ["a", "b"], "pos": ["DT", "NN"]}\n')
    assert load_task(TaskArgs(data=tmp_path / "y.jsonl", text_column="words", label_column="pos")).label_names == ["DT", "NN"]
    for name in ("x.txt", "x.tsv"):
        assert load_task(TaskArgs(data=tmp_path / name, problem="token-labels")).metrics[0] == "f1"
    assert list(load_task(TaskArgs(data=tmp_path / "folder")).files) == ["train", "dev"]
    speech = load_task(TaskArgs(data=tmp_path / "x.conll", label_column="1"))
    assert (speech.label_names, speech.metrics) == (["DT", "NN"], ("accuracy", "f1 (macro)"))
    assert speech.description.splitlines()[0] == "x.conll: words in column 0, tags in column 1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive_label": "x"}, "positive_label has no effect for a token classifier"),
        ({"text_pair_column": "x"}, "text_pair_column has no effect for a token classifier"),
        ({"label_column": "7"}, "line 1: no column 7; choose label_column from 0 to 2"),
        ({"dev": "no.conll"}, "dev no.conll: no such file"),
        ({"metric": "matthews"}, "metric 'matthews' does not apply to x.conll; choose from f1, precision, recall, accuracy"),
    ],
)
def test_options_without_effect_and_missing_files_are_errors(options, message, tmp_path):
    (tmp_path / "x.conll").write_text(IOB2)
    with pytest.raises(FunnelError, match=message):
        load_task(TaskArgs(data=tmp_path / "x.conll", **options))


def test_strict_scores_do_not_apply_to_iob1(tmp_path):
    (tmp_path / "x.conll").write_text("a\tI-x\nb\tI-x\nc\tB-x\n\n")
    with pytest.raises(FunnelError, match="does not apply to IOB1"):
        load_task(TaskArgs(data=tmp_path / "x.conll", metric="f1 (strict)"))


def test_a_table_of_texts_is_an_error_if_tokens_are_wanted(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\na,b\n")
    with pytest.raises(FunnelError, match=r"x.csv: a table of texts; a token classifier reads columns"):
        load_task(TaskArgs(data=tmp_path / "x.csv", problem="token-labels"))

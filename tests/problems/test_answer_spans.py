"""Loss, decoding and the threshold of "no answer"; tasks made of files in SQuAD's format."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from conftest import tiny_config
from squad_files import squad, write

from funnel.data import download
from funnel.data.dataset import IGNORED, Dataset
from funnel.data.encoding import encode_in_memory
from funnel.data.spans import MOST_CONTEXT, SpanEncoder
from funnel.data.squad import GoldAnswer, InMemoryQuestions, Question
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.problems import answer_spans
from funnel.problems.answer_spans import AnswerSpans, best_threshold
from funnel.problems.task_args import TaskArgs, load_task
from funnel.training.loss import LossArgs

CONTEXT = "one two three four five six seven eight nine ten eleven twelve"
WORDS = CONTEXT.split()


@pytest.fixture(scope="module")
def tokenizer() -> FunnelTokenizer:
    return FunnelTokenizer.train([CONTEXT + " where ?"] * 5)


def gold(text: str) -> GoldAnswer:
    return GoldAnswer(text, CONTEXT.index(text))


QUESTIONS = [
    Question("a", "where ?", CONTEXT, (gold("three four"),)),
    Question("b", "where ?", CONTEXT, (gold("nine"), gold("nine ten"))),
    Question("c", "where ?", CONTEXT, ()),
]


def dataset_of(tokenizer, questions, size: int = 5, stride: int = 3) -> Dataset:
    """Windows of `size` words."""
    encoder = SpanEncoder(max_query_length=2, doc_stride=stride)
    return encode_in_memory(InMemoryQuestions(questions), encoder, tokenizer, size + 5)


def problem(threshold: float | None = None) -> AnswerSpans:
    return AnswerSpans(tiny_config(id2label={0: "start", 1: "end"}, decision_threshold=threshold))


def random_results(dataset: Dataset, seed: int = 0) -> torch.Tensor:
    logits = torch.randn(len(dataset), dataset.longest, 2, generator=torch.Generator().manual_seed(seed))
    return problem().collect(logits, dataset.batch(np.arange(len(dataset))).labels)


def brute_force(dataset: Dataset, results: torch.Tensor, row_numbers) -> dict[str, float]:
    """The best score of every span of a question by its text: four nested loops."""
    scores: dict[str, float] = {}
    for row in row_numbers:
        start, length = int(dataset.rows.starts[row]), int(dataset.rows.lengths[row])
        labels, offsets = dataset.token_labels[start : start + length], dataset.offsets[start : start + length]
        for first in range(1, length):
            for last in range(first, min(length, first + answer_spans.MAX_ANSWER_LENGTH)):
                if IGNORED in labels[first : last + 1] or not labels[first] & MOST_CONTEXT:
                    continue
                text = CONTEXT[offsets[first][0] : offsets[last][1]]
                score = float(results[row, first, 0]) + float(results[row, last, 1])
                scores[text] = max(score, scores.get(text, -math.inf))
    return scores


# --- loss -------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_cross_entropy_over_context_and_cls(tokenizer):
    dataset = dataset_of(tokenizer, QUESTIONS)
    batch = dataset.batch(np.arange(len(dataset)))
    outputs = torch.randn(*batch.input_ids.shape, 2)
    losses = []
    for row, (first, last) in enumerate(dataset.labels):
        allowed = [i for i, label in enumerate(batch.labels[row].tolist()) if label != IGNORED]
        assert 0 in allowed
        for position, column in ((first, 0), (last, 1)):
            logits = outputs[row, :, column].double()
            losses.append(math.log(sum(math.exp(logits[i]) for i in allowed)) - float(logits[position]))
    assert float(problem().loss(outputs, batch.labels)) == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_loss_does_not_depend_on_logits_of_the_question_and_padding(tokenizer):
    dataset = dataset_of(tokenizer, QUESTIONS)
    batch = dataset.batch(np.arange(len(dataset)), width=20)
    outputs = torch.randn(*batch.input_ids.shape, 2, requires_grad=True)
    problem().loss(outputs, batch.labels).backward()
    is_ignored = batch.labels == IGNORED
    assert (outputs.grad[is_ignored] == 0).all()
    assert (outputs.grad[~is_ignored] != 0).all()


def test_the_loss_of_a_batch_is_the_mean_over_micro_batches(tokenizer):
    dataset = dataset_of(tokenizer, QUESTIONS)
    batch = dataset.batch(np.arange(len(dataset)))
    outputs = torch.randn(*batch.input_ids.shape, 2)
    parts = sum(
        micro.weight * problem().loss(part, micro.labels)
        for part, micro in zip(outputs.tensor_split(3), batch.split(3), strict=True)
    )
    torch.testing.assert_close(parts, problem().loss(outputs, batch.labels))


def test_the_loss_of_a_dataset_is_that_of_its_rows(tokenizer, monkeypatch):
    dataset = dataset_of(tokenizer, QUESTIONS)
    results = random_results(dataset)
    expected = float(problem().loss(results, dataset.batch(np.arange(len(dataset))).labels))
    monkeypatch.setattr(answer_spans, "CHUNK_SIZE", 4)
    assert problem().mean_loss(results, dataset) == pytest.approx(expected, rel=1e-6)


def test_options_for_classes_are_rejected(tokenizer):
    with pytest.raises(FunnelError, match="label_smoothing has no effect for a question answerer"):
        problem().prepare(dataset_of(tokenizer, QUESTIONS), LossArgs(label_smoothing=0.1))


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_candidates_are_the_best_spans_of_all_windows(tokenizer, seed, monkeypatch):
    monkeypatch.setattr(answer_spans, "MAX_ANSWER_LENGTH", 4)
    dataset = dataset_of(tokenizer, QUESTIONS)
    results = random_results(dataset, seed)
    for number, found in enumerate(problem().decode(results, dataset)):
        rows = np.flatnonzero(dataset.rows.examples == number)
        expected = sorted(brute_force(dataset, results, rows).items(), key=lambda item: -item[1])[: answer_spans.N_BEST]
        assert len(expected) == answer_spans.N_BEST
        assert [span.text for span in found.spans] == [text for text, _ in expected]
        assert [span.score for span in found.spans] == pytest.approx([score for _, score in expected])
        assert all(CONTEXT[span.start : span.end] == span.text for span in found.spans)
        assert found.null_score == pytest.approx(float(results[rows, 0].sum(1).min()))


def test_a_subset_has_the_questions_of_its_rows(tokenizer):
    dataset = dataset_of(tokenizer, QUESTIONS)
    results = random_results(dataset)
    last_two = np.flatnonzero(dataset.rows.examples > 0)
    whole, part = problem().predict(results, dataset), problem().predict(results[last_two], dataset.subset(last_two))
    assert part == whole[1:]
    assert problem().targets(dataset.subset(last_two)) == [("nine", "nine ten"), ()]


def test_an_answer_has_no_whitespace_around_it():
    assert answer_spans._cut_out("a  b c ", 1, 5, 1.0) == ("b", 3, 4, 1.0)


def test_contexts_without_tokens_have_no_answer(tokenizer):
    questions = [Question("a", "where ?", context, ()) for context in ("", " ")]
    dataset = dataset_of(tokenizer, questions)
    results = random_results(dataset)
    assert problem().predict(results, dataset) == ["", ""]
    assert problem(0.0).predict(results, dataset) == ["", ""]
    tuned = problem()
    tuned.tune(results, dataset)
    assert tuned.threshold == 0


def test_logits_that_are_not_finite_do_not_fail(tokenizer):
    dataset = dataset_of(tokenizer, QUESTIONS)
    for value in (math.nan, math.inf, -math.inf):
        results = torch.full((len(dataset), dataset.longest, 2), value)
        tuned = problem()
        tuned.tune(results, dataset)
        assert tuned.threshold is not None
        assert math.isfinite(tuned.threshold)
        assert len(tuned.predict(results, dataset)) == 3
        assert tuned.analyze(results, dataset, tokenizer)["examples"] == 3


# --- no answer --------------------------------------------------------------------------------------------------------


def test_the_best_threshold_has_the_highest_f1_of_all_thresholds():
    rng = random.Random(0)
    for _ in range(100):
        margins = np.array([rng.choice([-2.0, -1.0, 0.5, 3.0, rng.random()]) for _ in range(rng.randint(1, 8))])
        gains = np.array([rng.choice([-1.0, 0.0, 0.4, 1.0]) for _ in margins])
        totals = [gains[margins <= threshold].sum() for threshold in [-9.0, *margins]]
        found = best_threshold(margins, gains)
        assert gains[margins <= found].sum() == pytest.approx(max(totals))
        assert found not in margins


def test_the_threshold_is_tuned_for_f1_and_used_for_predictions(tokenizer):
    dataset = dataset_of(tokenizer, QUESTIONS)
    results = random_results(dataset, seed=3)
    tuned = problem()
    tuned.tune(results, dataset)
    best = tuned.score(results, dataset, ["f1"])["f1"]
    others = [problem(threshold).score(results, dataset, ["f1"])["f1"] for threshold in np.linspace(-9, 9, 50)]
    assert best == max(others)
    assert problem(-1e9).predict(results, dataset) == ["", "", ""]
    assert "" not in problem(1e9).predict(results, dataset)
    assert problem(None).predict(results, dataset) == problem(1e9).predict(results, dataset)


def test_there_is_no_threshold_if_all_questions_have_an_answer(tokenizer):
    dataset = dataset_of(tokenizer, QUESTIONS[:2])
    tuned = problem(0.3)
    tuned.tune(random_results(dataset), dataset)
    assert tuned.threshold is None


# --- error analysis ---------------------------------------------------------------------------------------------------


def test_mistakes_are_the_wrong_answers_with_the_lowest_f1_first(tokenizer):
    dataset = dataset_of(tokenizer, QUESTIONS, size=12, stride=12)
    results = torch.zeros(3, dataset.longest, 2)  # [CLS] where ? [SEP] one two ...
    for row, (first, last) in enumerate(((5, 7), (12, 12), (7, 7))):
        results[row, first, 0] = results[row, last, 1] = 5
    analysis = problem().analyze(results, dataset, tokenizer)
    assert analysis == {
        "examples": 3,
        "threshold": None,
        "mistakes": [
            {"text": "where ?", "label": "(no answer)", "predicted": "four"},
            {"text": "where ?", "label": "three four", "predicted": "two three four"},
        ],
    }
    analysis = problem(-99.0).analyze(results, dataset, tokenizer)
    assert [(mistake["label"], mistake["predicted"]) for mistake in analysis["mistakes"]] == [
        ("three four", "(no answer)"),
        ("nine / nine ten", "(no answer)"),
    ]


# --- tasks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def squad_file(tmp_path):
    return lambda name="x.json", n=12, **options: write(tmp_path / name, squad(n, **options))


def test_a_file_in_squads_format_is_recognized(squad_file, tmp_path):
    task = load_task(TaskArgs(data=squad_file()))
    assert (task.problem, task.metrics, task.label_names) == ("answer-spans", ("f1", "exact"), None)
    assert (task.learning_rate, task.layer_lr_decay, task.batch_size, task.max_length) == (3e-5, 0.75, 48, 512)
    assert task.text_columns == ("question", "context")
    assert task.description.splitlines() == [
        "x.json: 48 questions, 24 paragraphs, 12 articles",
        "dev is split off by article, so that no article is in both sets",
    ]
    task = load_task(TaskArgs(data=squad_file(unanswerable=True), problem="answer-spans", metric="exact"))
    assert task.metrics == ("exact", "f1", "has-answer f1", "no-answer f1")


def test_a_folder_and_a_dev_file_are_recognized(squad_file, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("mine/train.json", "mine/dev.json", "other.json"):
        squad_file(name)
    assert set(load_task(TaskArgs(data=folder)).files) == {"train", "dev"}
    task = load_task(TaskArgs(data=folder / "train.json", dev=tmp_path / "other.json"))
    assert task.files["dev"].path == tmp_path / "other.json"
    with pytest.raises(FunnelError, match=r"dev_share cannot be combined with the dev file .*dev\.json"):
        load_task(TaskArgs(data=folder, dev_share=0.2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text_column": "context"}, "text_column has no effect on answer spans"),
        ({"positive_label": "x"}, "positive_label has no effect on answer spans"),
        ({"metric": "accuracy"}, "metric 'accuracy' does not apply to x.json; choose from"),
        ({"doc_stride": 0}, "invalid doc_stride 0"),
    ],
)
def test_options_that_do_not_apply_are_errors(squad_file, options, words):
    with pytest.raises(FunnelError, match=words):
        load_task(TaskArgs(data=squad_file(), **options))


def test_settings_of_the_encoder_are_passed_on_and_rejected_for_other_tasks(squad_file, tmp_path):
    task = load_task(TaskArgs(data=squad_file(), doc_stride=64, max_query_length=10))
    assert AnswerSpans.encoder(task) == SpanEncoder(10, 64)
    with pytest.raises(FunnelError, match="doc_stride only applies to answer spans"):
        load_task(TaskArgs(doc_stride=64))


def test_other_files_are_errors_if_the_problem_is_given(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\na,b\n")
    for name, words in (("x.csv", "unknown format"), ("y.json", "no such file")):
        with pytest.raises(FunnelError, match=rf"data .*{name}: {words}; expected a \.json or \.json\.gz or \.json\.xz file"):
            load_task(TaskArgs(data=tmp_path / name, problem="answer-spans"))


def test_a_json_list_is_still_a_file_of_texts(tmp_path):
    (tmp_path / "x.json").write_text('[{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]')
    assert load_task(TaskArgs(data=tmp_path / "x.json")).problem == "classification"


def test_squad_is_downloaded(squad_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FUNNEL_CACHE", str(tmp_path / "cache"))
    urls = []

    def fake_download(archive, folder):
        urls.append(archive.url)
        return squad_file().rename(folder / archive.name)

    monkeypatch.setattr(download, "download", fake_download)
    for _ in range(2):
        task = load_task(TaskArgs(task="squad"))
        assert {split: len(list(file.rows())) for split, file in task.files.items()} == {"train": 48, "dev": 48}
    site = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
    assert urls == [f"{site}/train-v1.1.json", f"{site}/dev-v1.1.json"]


def test_squad_is_read_from_a_folder_with_the_official_names(squad_file, tmp_path):
    for split, version in itertools.product(("train", "dev"), ("v1.1", "v2.0")):
        squad_file(f"{split}-{version}.json", unanswerable=version == "v2.0")
    for name, n_questions in (("squad", 48), ("SQuAD-2", 72)):
        task = load_task(TaskArgs(task=name, data=tmp_path))
        assert {split: len(list(file.rows())) for split, file in task.files.items()} == {
            "train": n_questions,
            "dev": n_questions,
        }
        assert (task.steps, task.warmup, task.batch_size) == (8000, 0.125, 48)

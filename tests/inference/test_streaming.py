"""Predictors on streams, `top_k`, and predictors in other processes."""

import itertools
import multiprocessing
import pickle
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from trained_runs import write_trained_run

from funnel.errors import FunnelError
from funnel.inference.answers import QuestionAnswerer
from funnel.inference.choices import MultipleChoice
from funnel.inference.classifier import Classifier
from funnel.inference.tokens import TokenClassifier

TEXTS = ["a text", "another", "ada lovelace wrote it", "", "who wrote it ?"]
# By kind of problem: the predictor, the arguments of a call for several examples.
CALLS: dict[str, tuple[type, list[list[Any]]]] = {
    "classification": (Classifier, [TEXTS]),
    "regression": (Classifier, [TEXTS, TEXTS[::-1]]),
    "multi-label": (Classifier, [TEXTS]),
    "token-labels": (TokenClassifier, [TEXTS]),
    "answer-spans": (QuestionAnswerer, [TEXTS, ["ada lovelace wrote it"] * 5]),
    "multiple-choice": (MultipleChoice, [TEXTS, [["ada", "bob"], ["it", "a", "by"]] * 2 + [["a", "b"]]]),
}


def load(kind: str, folder: Path) -> Any:
    run = write_trained_run(folder, kind)
    return CALLS[kind][0].load(run, device="cpu", dtype="fp32")  # type: ignore[attr-defined]


@pytest.fixture
def classify(tmp_path) -> Classifier:
    return load("classification", tmp_path)


@pytest.mark.parametrize("kind", CALLS)
def test_a_stream_gives_the_results_of_a_call_in_order(kind, tmp_path):
    predictor, arguments = load(kind, tmp_path), CALLS[kind][1]
    inputs = arguments[0] if len(arguments) == 1 else zip(*arguments, strict=True)
    found, expected = list(predictor.stream(inputs, batch_size=2)), predictor(*arguments)
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        if kind in ("classification", "multi-label"):
            assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-6)
        elif kind == "regression":
            assert ours.label == pytest.approx(theirs.label, abs=1e-5)
        elif kind == "token-labels":
            assert [entity.text for entity in ours] == [entity.text for entity in theirs]
        elif kind == "answer-spans":
            assert (ours.text, ours.start) == (theirs.text, theirs.start)
        else:
            assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-6)


def test_a_stream_is_lazy_and_may_be_endless(classify):
    taken = 0

    def endless():
        nonlocal taken
        for text in itertools.cycle(TEXTS):
            taken += 1
            yield text

    results = classify.stream(endless(), batch_size=3)
    assert taken == 0
    next(results)
    assert taken == 3
    assert len(list(itertools.islice(results, 8))) == 8
    assert taken == 9
    assert list(classify.stream(iter(()))) == []


def test_a_stream_keeps_no_inputs(classify):
    """Only the current batch is alive."""

    class Text(str):
        __slots__ = ("__weakref__",)

    alive: weakref.WeakSet[Text] = weakref.WeakSet()

    def texts():
        for number in range(40):
            text = Text(f"a text {number}")
            alive.add(text)
            yield text

    largest = 0
    for _ in classify.stream(texts(), batch_size=4):
        largest = max(largest, len(alive))
    assert largest <= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a text",), "inputs is a string"),
        ((TEXTS, 0), "invalid batch_size 0"),
        (([("a", "b"), "c"],), "inputs mixes texts and tuples"),
        ((["a", 3],), r"texts\[1\] has type int"),
    ],
)
def test_invalid_streams_are_errors(arguments, message, classify):
    with pytest.raises(FunnelError, match=message):
        list(classify.stream(*arguments))


def test_top_k_gives_the_most_probable_labels(classify):
    one, several = classify("a text", top_k=2), classify(TEXTS, top_k=2)
    for found, prediction in zip(several, classify(TEXTS), strict=True):
        expected = sorted(prediction.probabilities.items(), key=lambda item: item[1], reverse=True)[:2]
        assert found == expected
        assert found[0] == (prediction.label, prediction.probability)
    assert [label for label, _ in one] == [label for label, _ in several[0]]
    assert len(classify("a text", top_k=99)) == 3
    assert classify([], top_k=1) == []


def test_top_k_must_be_positive_and_needs_classes(classify, tmp_path):
    with pytest.raises(FunnelError, match="invalid top_k 0"):
        classify("a text", top_k=0)
    with pytest.raises(FunnelError, match="top_k: the model predicts a score"):
        load("regression", tmp_path / "regression")("a", "b", top_k=1)


@pytest.mark.parametrize("kind", CALLS)
def test_predictors_can_be_pickled(kind, tmp_path):
    predictor, arguments = load(kind, tmp_path), CALLS[kind][1]
    expected = predictor(*arguments)
    assert repr(pickle.loads(pickle.dumps(predictor))(*arguments)) == repr(expected)


@pytest.mark.slow
def test_predictors_run_in_spawned_processes(tmp_path):
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        for kind in ("classification", "token-labels", "answer-spans", "multiple-choice"):
            predictor, arguments = load(kind, tmp_path / kind), CALLS[kind][1]
            assert repr(pool.submit(predictor, *arguments).result(timeout=300)) == repr(predictor(*arguments))

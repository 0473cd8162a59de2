"""Exact match and F1 of answers: hand-computed cases of the official scripts, and an independent implementation."""

import math
import random

import pytest

from funnel.problems.squad_metrics import SPANS, exact, f1, f1_with_answer, f1_without_answer, normalize, word_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat.", "cat"),
        ("a b an c the d", "b c d"),
        ("theory another", "theory another"),
        ("U.S.", "us"),
        ("an-the", "anthe"),  # punctuation goes first
        ("it's $1,000", "its 1000"),
        ("“the”", "“ ”"),  # only ASCII punctuation is removed
        ("\u00a0A\tb\n", "b"),
        ("the", ""),
        ("...", ""),
        ("", ""),
    ],
)
def test_answers_are_normalized(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("in 1900", "1900", 2 / 3),
        ("1900 1900", "1900", 2 / 3),  # a word counts as often as in both
        ("the old city of Rome", "Rome", 2 * (1 / 4) / (1 / 4 + 1)),
        ("x", "y", 0.0),
        ("", "y", 0.0),
        ("", "", 0.0),
    ],
)
def test_f1_is_that_of_the_shared_words(prediction, gold, expected):
    assert word_f1(prediction, gold) == pytest.approx(expected)


def test_the_best_gold_answer_counts():
    assert (exact(["Rome", "x"], [("the city", "Rome!"), ("y", "x y")]), f1(["Rome", "x"], [("Rome",), ("y", "x y")])) == (
        0.5,
        pytest.approx((1 + 2 / 3) / 2),
    )


def test_an_empty_prediction_is_right_if_there_is_no_answer():
    predictions, gold = ["", "x", "", "x y"], [(), (), ("x",), ("x",)]
    assert exact(predictions, gold) == 1 / 4
    assert f1(predictions, gold) == pytest.approx((1 + 0 + 0 + 2 / 3) / 4)
    assert f1_without_answer(predictions, gold) == 1 / 2
    assert f1_with_answer(predictions, gold) == pytest.approx(1 / 3)


def test_an_answer_without_words_has_the_rules_of_the_version():
    assert (exact(["the"], [("The",)]), f1(["the"], [("The",)])) == (1, 0)  # 1.1
    assert (exact(["the", ""], [("The",), ()]), f1(["the", ""], [("The",), ()])) == (1, 1)  # 2.0
    assert exact(["", ""], [("the", "x"), ()]) == 0.5  # 2.0 ignores gold answers without words ...
    assert exact(["", ""], [("the", "..."), ()]) == 1  # ... and if there are no others, expects an empty prediction


def test_scores_of_questions_that_do_not_exist_are_not_a_number():
    assert math.isnan(f1_without_answer(["x"], [("x",)]))
    assert math.isnan(f1_with_answer([""], [()]))
    assert (exact([""], [()]), f1([""], [()])) == (1, 1)


def test_all_scores_are_fractions_on_degenerate_inputs():
    for predictions, gold in ((["", "the"], [(), ("a",)]), (["...", "…"], [("",), ("…",)])):
        scores = [function(predictions, gold) for function in SPANS.values()]
        assert all(math.isnan(score) or 0 <= score <= 1 for score in scores)


def test_scores_are_those_of_torchmetrics():
    reference = pytest.importorskip("torchmetrics.functional.text", reason="needs the extra test").squad
    words = ["the", "a", "The", "cat", "cats", "dog.", "...", "-", "U.S.", "é", "東京", "\u00a0", "\t", "ten", "an-the", "it's"]
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(0, 4)))

    for _ in range(30):
        predictions = [text() for _ in range(5)]
        # torchmetrics has the F1 of version 2.0 for answers without words
        gold = [tuple(filter(normalize, (text() for _ in range(3)))) or ("cat",) for _ in range(5)]
        expected = reference(
            [{"id": str(i), "prediction_text": prediction} for i, prediction in enumerate(predictions)],
            [{"id": str(i), "answers": {"text": list(a), "answer_start": [0] * len(a)}} for i, a in enumerate(gold)],
        )
        assert exact(predictions, gold) == pytest.approx(float(expected["exact_match"]) / 100, abs=1e-6)
        assert f1(predictions, gold) == pytest.approx(float(expected["f1"]) / 100, abs=1e-6)

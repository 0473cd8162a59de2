"""Exact match and F1 of predicted answers, as the evaluation scripts of SQuAD 1.1 and 2.0 define them, from 0 to 1.

Answers are compared in lower case, without punctuation, articles and extra whitespace. F1 is that of the words that a
prediction and a gold answer have in common; of several gold answers, the one with the highest score counts. An empty prediction
is right for a question without gold answers.

The versions differ for answers that are empty after normalization, such as "the": in 1.1 they have no words to share, so that
F1 is 0; in 2.0 they equal the empty prediction, and such gold answers are ignored. The rules of 2.0 apply if a question has no
gold answer.

Predictions are a list of texts, "" for no answer; gold answers a list of tuples of texts, empty for no answer.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from funnel.problems.metrics import Metric

GoldAnswers = Sequence[Sequence[str]]
ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """The form in which answers are compared."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def equal(prediction: str, gold: str) -> float:
    """1 if two answers are equal after normalization, else 0."""
    return float(normalize(prediction) == normalize(gold))


def word_f1(prediction: str, gold: str) -> float:
    """F1 of the words of two answers; 0 if they share none."""
    words, gold_words = normalize(prediction).split(), normalize(gold).split()
    n_shared = (Counter(words) & Counter(gold_words)).total()
    return 2 * n_shared / (len(words) + len(gold_words)) if n_shared else 0.0


def word_f1_or_empty(prediction: str, gold: str) -> float:
    """As `word_f1`; 1 if both answers have no words."""
    return word_f1(prediction, gold) if normalize(prediction) or normalize(gold) else 1.0


def question_scores(metric: str, predictions: Sequence[str], gold: GoldAnswers) -> np.ndarray:
    """The score of each question, [n_questions].

    Args:
        metric: "exact" or "f1".
    """
    has_unanswerable = not all(gold)
    score: Callable[[str, str], float] = equal
    if metric == "f1":
        score = word_f1_or_empty if has_unanswerable else word_f1
    scores = []
    for prediction, answers in zip(predictions, gold, strict=True):
        if has_unanswerable:
            answers = [answer for answer in answers if normalize(answer)] or [""]
        scores.append(max(score(prediction, answer) for answer in answers))
    return np.array(scores)


def exact(predictions: Sequence[str], gold: GoldAnswers) -> float:
    """The fraction of predictions that equal a gold answer after normalization."""
    return float(question_scores("exact", predictions, gold).mean())


def f1(predictions: Sequence[str], gold: GoldAnswers) -> float:
    """Mean F1 of the words of predictions and gold answers."""
    return float(question_scores("f1", predictions, gold).mean())


def f1_with_answer(predictions: Sequence[str], gold: GoldAnswers) -> float:
    """Mean F1 of the questions that have an answer; NaN without such questions."""
    return _mean_where([bool(answers) for answers in gold], question_scores("f1", predictions, gold))


def f1_without_answer(predictions: Sequence[str], gold: GoldAnswers) -> float:
    """The fraction of empty predictions for questions without an answer; NaN without such questions."""
    return _mean_where([not answers for answers in gold], question_scores("f1", predictions, gold))


def _mean_where(chosen: Sequence[bool], scores: np.ndarray) -> float:
    return float(scores[np.array(chosen)].mean()) if any(chosen) else math.nan


SPANS: dict[str, Metric] = {"f1": f1, "exact": exact, "has-answer f1": f1_with_answer, "no-answer f1": f1_without_answer}

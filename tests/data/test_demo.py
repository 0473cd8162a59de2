"""The demo task is balanced, its dev set is held out, and a bag of words does not solve it."""

import hashlib
import json

import pytest

from funnel.data import demo


@pytest.fixture(scope="module")
def sets():
    return demo.examples()


def test_examples_are_reproducible_and_balanced(sets):
    assert demo.examples() == sets
    for examples in sets:
        assert examples.labels.count("1") * 2 == len(examples.labels)
        assert len(set(examples.texts)) == len(examples.texts)


def test_examples_match_published_results(sets):
    digest = hashlib.sha256(json.dumps(sets).encode()).hexdigest()
    assert digest == "7e7991cd2c18bc5830669cd22ced4f00ae9866cad553bda56bcba911add573c4"


def test_dev_has_its_own_templates_subjects_and_openings(sets):
    assert not set(demo.TEMPLATES[0]) & set(demo.TEMPLATES[1])
    assert not set(demo.SUBJECTS[0]) & set(demo.SUBJECTS[1])
    train_words, dev_words = (set(" ".join(examples.texts).split()) for examples in sets)
    train_subjects, dev_subjects = ({word for s in subjects for word in s.split()} for subjects in demo.SUBJECTS)
    held_out = dev_subjects - train_subjects
    assert held_out <= dev_words
    assert not held_out & train_words


def test_bag_of_words_does_not_solve_it(sets):
    text = pytest.importorskip("sklearn.feature_extraction.text", reason="scikit-learn provides the bag of words")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, dev = sets
    bag = make_pipeline(text.CountVectorizer(), LogisticRegression(max_iter=1000)).fit(train.texts, train.labels)
    assert bag.score(dev.texts, dev.labels) < 0.65

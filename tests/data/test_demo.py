"""The demo task is what it says: balanced, held out, and nothing for a bag of words."""

import pytest

from funnel.data import demo


@pytest.fixture(scope="module")
def sets():
    return demo.examples()


def test_it_is_the_same_every_time_and_balanced(sets):
    assert demo.examples() == sets
    for examples in sets:
        assert examples.labels.count("1") * 2 == len(examples.labels)
        assert len(set(examples.texts)) == len(examples.texts)


def test_dev_has_its_own_templates_subjects_and_openings(sets):
    assert not set(demo.TEMPLATES[0]) & set(demo.TEMPLATES[1])
    assert not set(demo.SUBJECTS[0]) & set(demo.SUBJECTS[1])
    train_words, dev_words = (set(" ".join(e.texts).split()) for e in sets)
    held_out = {w for s in demo.SUBJECTS[1] for w in s.split()} - {w for s in demo.SUBJECTS[0] for w in s.split()}
    assert held_out <= dev_words
    assert not held_out & train_words


def test_a_bag_of_words_does_not_solve_it(sets):
    text = pytest.importorskip("sklearn.feature_extraction.text", reason="scikit-learn is the bag of words here")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, dev = sets
    bag = make_pipeline(text.CountVectorizer(), LogisticRegression(max_iter=1000)).fit(train.texts, train.labels)
    assert bag.score(dev.texts, dev.labels) < 0.65

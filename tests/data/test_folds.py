"""Folds for cross-validation: disjoint, complete, stratified, and no text in two of them."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from funnel.data.choices import ChoiceEncoder, ChoiceExample
from funnel.data.dataset import Dataset, Rows, Truncation
from funnel.data.encoding import TextEncoder, encode_examples, encode_in_memory
from funnel.data.files import InMemoryExamples
from funnel.data.folds import assign_folds, join_groups, parse_fold
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.problems.task_args import TaskArgs, load_task, split_off_dev


def make_dataset(labels, hashes=None, **rows) -> Dataset:
    """Rows of one token, with the given labels."""
    n = len(labels)
    ones = np.ones(n, np.int32)
    hashes = np.arange(n) if hashes is None else np.array(hashes)
    return Dataset(
        np.zeros(n, np.int32), Rows(np.arange(n), ones, ones, labels, hashes.astype(np.uint64), **rows), 0, Truncation()
    )


def rows_of(dataset: Dataset) -> list[int]:
    return dataset.rows.starts.tolist()


def dev_rows(dataset: Dataset, count: int, seed: int = 0) -> list[list[int]]:
    """The rows of each fold; checks that train has the others."""
    folds = []
    for number in range(1, count + 1):
        train, dev = dataset.split_fold(number, count, seed)
        assert sorted(rows_of(train) + rows_of(dev)) == list(range(len(dataset)))
        folds.append(rows_of(dev))
    assert sorted(itertools.chain(*folds)) == list(range(len(dataset)))
    return folds


@pytest.mark.parametrize("n_folds", [2, 3, 5, 10])
def test_classes_are_spread_as_evenly_as_by_scikit_learn(n_folds):
    model_selection = pytest.importorskip("sklearn.model_selection")
    labels = np.random.default_rng(0).choice(4, size=203, p=[0.5, 0.3, 0.15, 0.05]).astype(np.int32)
    folds = dev_rows(make_dataset(labels), n_folds)
    reference = [dev for _, dev in model_selection.StratifiedKFold(n_folds).split(labels, labels)]
    for label in range(4):
        counts, expected = ([int((labels[rows] == label).sum()) for rows in some] for some in (folds, reference))
        assert sorted(counts) == sorted(expected)
    assert sorted(map(len, folds)) == sorted(map(len, reference))


def test_folds_depend_on_the_seed_only():
    dataset = make_dataset(np.arange(60, dtype=np.int32) % 3)
    assert dev_rows(dataset, 5, seed=1) == dev_rows(dataset, 5, seed=1) != dev_rows(dataset, 5, seed=2)


def test_scores_are_divided_at_random_into_equal_parts():
    folds = dev_rows(make_dataset(np.linspace(0, 1, 52).astype(np.float32)), 5)
    assert sorted(map(len, folds)) == [10, 10, 10, 11, 11]
    assert sum(b - a == 1 for rows in folds for a, b in itertools.pairwise(rows)) < 20


def test_several_labels_are_stratified_by_combination():
    labels = np.array([[1, 0], [1, 1], [0, 0]] * 20, np.float32)
    for rows in dev_rows(make_dataset(labels), 4):
        assert labels[rows].sum(0).tolist() == [10, 5]


def test_equal_texts_are_in_the_same_fold_even_with_different_labels():
    random = np.random.default_rng(0)
    hashes, labels = random.integers(70, size=200), random.integers(3, size=200).astype(np.int32)
    folds = dev_rows(make_dataset(labels, hashes), 5)
    texts = [set(hashes[rows]) for rows in folds]
    assert sum(map(len, texts)) == len(set(hashes))
    assert max(map(len, folds)) - min(map(len, folds)) <= 4


def test_windows_of_an_example_and_groups_are_in_the_same_fold():
    examples, labels = np.repeat(np.arange(20), 3), np.full(60, -1, np.int32)
    for rows in dev_rows(make_dataset(labels, examples, examples=examples), 4):
        assert len(rows) == 3 * len(set(examples[rows]))
    groups = examples // 4  # five texts with questions
    for rows in dev_rows(make_dataset(labels, examples=examples, groups=groups), 5):
        assert len(set(groups[rows])) == 1


def test_groups_that_share_a_text_are_joined():
    groups, hashes = np.array([0, 0, 1, 1, 2, 3, 4, 4]), np.array([5, 6, 6, 7, 7, 8, 9, 9], np.uint64)
    assert join_groups(groups, hashes).tolist() == [0, 0, 0, 0, 0, 1, 2, 2]


def test_large_groups_do_not_leave_a_fold_empty():
    units = np.repeat(np.arange(5), [40, 1, 1, 1, 1])
    assert set(assign_folds(units, np.zeros(44, int), 5, 0)) == set(range(5))


def test_questions_about_a_text_stay_together(tmp_path, monkeypatch):
    tokenizer = FunnelTokenizer.train(["a good film", "what is it"])
    contexts = [f"film {i // 2}" for i in range(12)]
    examples = [ChoiceExample(context, f"question {i}", ("a", "b"), 0) for i, context in enumerate(contexts)]

    class Source:
        path = Path("x")

        def rows(self):
            return iter(examples)

    dataset = encode_in_memory(Source(), ChoiceEncoder(), tokenizer, 32)
    _, dev = dataset.split_fold(1, 3, 0)
    chosen = [contexts[i] for i in range(12) if dataset.rows.starts[i, 0] in dev.rows.starts[:, 0]]
    assert len(chosen) == 4
    assert len(set(chosen)) == 2


def test_texts_from_a_file_are_divided(tmp_path):
    tokenizer = FunnelTokenizer.train(["a good bad film"])
    texts = [f"film {i % 15}" for i in range(30)]  # every text twice
    dataset = encode_examples(InMemoryExamples(texts, None, ["1"] * 30), TextEncoder({"1": 0}), tokenizer, 16)
    train, dev = dataset.split_fold(3, 5, 7)
    assert len(dev) == 6
    assert not set(train.hashes) & set(dev.hashes)


# --- options ----------------------------------------------------------------------------------------------------------


def test_a_fold_is_a_number_and_a_count():
    assert parse_fold("2/5") == (2, 5)


@pytest.mark.parametrize("text", ["0/5", "6/5", "1/1", "2", "2/", "a/b", "-1/5", "1/5 ", "2/9999999"])
def test_other_folds_are_errors(text):
    with pytest.raises(FunnelError, match=r"invalid fold .* such as 2/5"):
        TaskArgs(data=Path("x.csv"), fold=text)


def test_a_fold_replaces_the_dev_set(tmp_path):
    with pytest.raises(FunnelError, match="fold cannot be combined"):
        TaskArgs(data=Path("x.csv"), dev=Path("y.csv"), fold="1/5")
    with pytest.raises(FunnelError, match="fold cannot be combined"):
        TaskArgs(data=Path("x.csv"), dev_share=0.2, fold="1/5")
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").write_text("text,label\na,1\nb,0\n")
    with pytest.raises(FunnelError, match=r"fold cannot be combined with the dev set in .*; pass the training file as data"):
        load_task(TaskArgs(data=tmp_path, fold="1/2"))


def test_published_tasks_have_their_own_dev_set():
    with pytest.raises(FunnelError, match="fold only applies to your own data; task sst2 defines its own"):
        TaskArgs(task="sst2", fold="1/5")


def test_more_folds_than_texts_are_an_error():
    dataset = make_dataset(np.zeros(6, np.int32), [1, 1, 2, 2, 3, 3])
    with pytest.raises(FunnelError, match="fold 1/4: the data has only 3 different texts"):
        split_off_dev(dataset, TaskArgs(data=Path("x.csv"), fold="1/4"), 0)

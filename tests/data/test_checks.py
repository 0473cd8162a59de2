"""Warnings about duplicates and overlapping sets."""

import numpy as np
import pytest

from funnel.data.checks import compare_sets
from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.config import FunnelConfig
from funnel.problems.classification import Classification
from funnel.problems.registry import encode_split
from funnel.problems.task_args import TaskArgs, load_task
from funnel.training.progress import print_data

TRAIN = "text,label\na,x\nb,y\nc,x\n"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads own files, given as their content; returns the task and its datasets."""
    monkeypatch.setenv("FUNNEL_CACHE", str(tmp_path / "cache"))
    tokenizer = FunnelTokenizer.train(["a b c d"] * 5)

    def load(train, dev=None):
        for name, content in (("train.csv", train), ("dev.csv", dev)):
            if content is not None:
                (tmp_path / name).write_text(content)
        task = load_task(TaskArgs(data=tmp_path / "train.csv", dev=dev and tmp_path / "dev.csv"))
        sets = {split: encode_split(task, split, tokenizer, 20) for split in task.files}
        return task, sets.pop("train"), sets

    return load


def test_dev_file_equal_to_the_training_file_is_reported(load):
    (warning,) = compare_sets(*load(TRAIN, TRAIN))
    assert warning.startswith("dev is the training file")


def test_texts_shared_by_train_and_dev_are_counted(load):
    expected = ["dev: 2 of 3 texts also occur in the training set, such as 'c'"]
    assert list(compare_sets(*load(TRAIN, "text,label\nc,y\nnew,x\na,x\n"))) == expected
    assert list(compare_sets(*load(TRAIN, "text,label\nd,y\n"))) == []


def test_texts_with_different_labels_are_counted(load):
    task, train_set, sets = load(TRAIN + "a,y\nb,y\n", "text,label\nd,y\n")
    assert list(compare_sets(task, train_set, sets)) == ["train: 1 text with different labels, such as 'a'"]
    scores = load("text,label\na,1.5\na,2.5\n", "text,label\nd,1\n")
    assert list(compare_sets(*scores)) == []


def test_split_sets_are_compared_too(load):
    task, dataset, _ = load(TRAIN + "a,y\n")
    train_set, dev_set = dataset.subset(np.array([0, 1])), dataset.subset(np.array([2, 3]))
    assert list(compare_sets(task, train_set, {"dev": dev_set})) == [
        "train: 1 text with different labels, such as 'a'",
        "dev: 1 of 2 texts also occur in the training set, such as 'a'",
    ]


def test_all_warnings_are_printed_once(load, capsys):
    task, dataset, _ = load("text,label\na,x\na,X\n漢,x\nb,X\n")
    train_set, dev_set = dataset.subset(np.array([0, 2, 3])), dataset.subset(np.array([1]))
    problem = Classification(FunnelConfig(id2label={0: "X", 1: "x"}))
    print_data(task, problem, {"train": train_set, "dev": dev_set})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train.csv: text column 'text', label column 'label'"
    starts = (
        "labels 'X' (2), 'x' (2) differ",
        "train and dev: 1 text of unknown words",
        "train: 1 text with different labels",
        "dev: 1 of 1 text also",
    )
    for start in starts:
        assert sum(line.startswith(f"warning: {start}") for line in lines) == 1, (start, lines)

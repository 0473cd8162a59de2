"""Reading, encoding and batching."""

import numpy as np
import pytest
import torch
from conftest import shared

from funnel import demo
from funnel.data import Dataset, Examples, read_tsv
from funnel.errors import FunnelError
from funnel.tasks import TASKS, get_task
from funnel.tokenizer import FunnelTokenizer

LABELS = {"0": 0, "1": 1}


def write(tmp_path, content: bytes):
    path = tmp_path / "train.tsv"
    path.write_bytes(content)
    return path


def read(path):
    return read_tsv(path, ("sentence",), "label", LABELS)


def test_rows_come_as_they_stand(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbfsentence\tlabel\r\na "lone quote\t1\r\n\t0\r\n caf\xc3\xa9 \t1')
    assert read(path) == Examples(['a "lone quote', "", " café "], None, [1, 0, 1])


def test_pairs_and_columns_in_any_order(tmp_path):
    path = write(tmp_path, b"label\tb\ta\n1\tsecond\tfirst\n")
    assert read_tsv(path, ("a", "b"), "label", LABELS) == Examples(["first"], ["second"], [1])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"sentence\tlabel\n", "empty"),
        (b"text\tlabel\na\t1\n", "line 1: no column 'sentence'"),
        (b"sentence\tlabel\na\t1\nb\n", "line 3: 1 fields"),
        (b"sentence\tlabel\na\t1\nb\t1\t2\n", "line 3: 3 fields"),
        (b"sentence\tlabel\na\t1\nb\t2\n", "line 3: label '2'"),
        (b"sentence\tlabel\na\t1\n\n", "line 3"),
        (b"sentence\tlabel\ncaf\xe9\t1\n", "line 2: not UTF-8"),
    ],
)
def test_mistakes_are_errors_with_file_and_line(tmp_path, content, words):
    path = write(tmp_path, content)
    with pytest.raises(FunnelError, match=words) as error:
        read(path)
    assert str(path) in str(error.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FunnelError, match=r"train\.tsv"):
        get_task("sst2").load(tmp_path)
    with pytest.raises(FunnelError, match="no such folder"):
        get_task("sst2").load(tmp_path / "none")
    with pytest.raises(FunnelError, match="--data"):
        get_task("sst2").load(None)
    with pytest.raises(FunnelError, match="demo"):
        get_task("demo").load(tmp_path)
    with pytest.raises(FunnelError, match=", ".join(TASKS)):
        get_task("sst3")


def test_sst2_has_its_official_counts():
    train, dev = get_task("sst2").load(shared("data/glue/SST-2"))
    assert (len(train.texts), len(dev.texts)) == (67349, 872)
    assert (sum(train.labels), sum(dev.labels)) == (37569, 444)


@pytest.fixture(scope="module")
def dataset():
    examples = demo.examples(train=700, dev=10)[0]
    return Dataset(examples, FunnelTokenizer.train(examples.texts), 20), examples


def test_an_epoch_has_every_row_once_and_depends_on_seed_and_epoch(dataset):
    data, _ = dataset
    batches = data.training_batches(32, seed=3, epoch=1)
    assert sorted(np.concatenate(batches)) == list(range(700))
    assert all((a == b).all() for a, b in zip(batches, data.training_batches(32, seed=3, epoch=1), strict=True))
    for seed, epoch in ((4, 1), (3, 2)):
        other = data.training_batches(32, seed=seed, epoch=epoch)
        assert not all(len(a) == len(b) and (a == b).all() for a, b in zip(batches, other, strict=True))


def test_batches_by_length_hold_little_padding(dataset):
    data, _ = dataset
    masks = [data.batch(rows).attention_mask for rows in data.training_batches(32, 0, 0)]
    real = sum(m.sum().item() for m in masks) / sum(m.numel() for m in masks)
    shuffled = [data.batch(rows).attention_mask for rows in np.array_split(np.random.default_rng(0).permutation(700), 22)]
    assert real > 0.93 > sum(m.sum().item() for m in shuffled) / sum(m.numel() for m in shuffled)


def test_a_batch_holds_what_the_tokenizer_gave(dataset):
    data, examples = dataset
    tokenizer = FunnelTokenizer.train(examples.texts)
    rows = np.array([5, 0, 699, 33])
    batch = data.batch(rows)
    for i, row in enumerate(rows):
        encoding = tokenizer.encode([examples.texts[row]], max_length=20)[0]
        n = len(encoding.input_ids)
        assert batch.input_ids[i, :n].tolist() == encoding.input_ids
        assert batch.token_type_ids[i, :n].tolist() == encoding.token_type_ids
        assert batch.attention_mask[i].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
        assert (batch.input_ids[i, n:] == tokenizer.pad_id).all()
        assert batch.labels[i] == examples.labels[row]
    assert batch.input_ids.dtype == torch.int64
    assert data.cut == sum(tokenizer.encode([t], max_length=20)[0].cut for t in examples.texts)


def test_evaluation_has_every_row_once(dataset):
    data, _ = dataset
    batches = list(data.evaluation_batches(64))
    assert sorted(np.concatenate(batches)) == list(range(700))
    assert data.lengths[batches[0]].min() >= data.lengths[batches[-1]].max()

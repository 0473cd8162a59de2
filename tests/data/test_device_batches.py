"""Batches gathered on a device, the background thread, padded lengths."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from funnel.data import device_batches
from funnel.data.batches import Shard
from funnel.data.dataset import Dataset, Rows, Truncation
from funnel.data.device_batches import DeviceDataset, TrainingBatches, padded_length, prefetch
from funnel.data.encoding import encode_texts
from funnel.data.tokenizer import FunnelTokenizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TEXTS = ["a good film", "bad", "", "the very very very good film was not bad at all", "good good", "a", "film film film a"]


def make_dataset(pairs=False, labels=None, dtype=np.int32):
    tokenizer = FunnelTokenizer.train(TEXTS)
    dataset = encode_texts(TEXTS, TEXTS[::-1] if pairs else None, tokenizer, 12)
    labels = np.arange(len(TEXTS), dtype=np.int32) % 3 if labels is None else labels
    return Dataset(dataset.token_ids.astype(dtype), dataset.rows._replace(labels=labels), tokenizer.pad_id, dataset.truncation)


DATASETS = {
    "single texts": make_dataset(),
    "pairs": make_dataset(pairs=True),
    "two bytes per token": make_dataset(pairs=True, dtype=np.uint16),
    "scores": make_dataset(labels=np.linspace(-1, 1, len(TEXTS), dtype=np.float32)),
    "no labels": make_dataset(labels=np.full(len(TEXTS), np.nan, np.float32)),
    "a subset": make_dataset(pairs=True).subset(np.array([5, 0, 3])),
}


def random_dataset(seed):
    """Random ids, lengths and pairs; the padding token's id occurs within texts, too."""
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 40))
    lengths = random.integers(1, 30, n).astype(np.int32)
    starts = np.concatenate([[0], lengths[:-1].cumsum(dtype=np.int64)])
    pair_starts = np.where(random.random(n) < 0.5, lengths, random.integers(1, lengths + 1)).astype(np.int32)
    labels = random.integers(0, 4, n).astype(np.int32)
    ids = random.integers(0, 60000, int(lengths.sum())).astype(np.uint16)
    ids[random.random(len(ids)) < 0.1] = 7
    return Dataset(ids, Rows(starts, lengths, pair_starts, labels, np.zeros(n, np.uint64)), 7, Truncation())


def assert_same(actual, expected):
    assert (actual.weight, actual.n_examples, actual.world_size) == (
        expected.weight,
        expected.n_examples,
        expected.world_size,
    )
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(actual.tensors[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("name", DATASETS)
def test_batches_gathered_on_a_device_equal_those_of_the_dataset(name):
    dataset = DATASETS[name]
    source = DeviceDataset(dataset, CPU)
    for size in range(1, len(dataset) + 1):
        for rows in itertools.islice(itertools.permutations(range(len(dataset)), size), 50):
            length = int(dataset.lengths[list(rows)].max())
            for width in (length, length + 5):
                assert_same(source.batch(np.array(rows), width), dataset.batch(np.array(rows), width))


@pytest.mark.parametrize("seed", range(20))
def test_batches_of_random_datasets_equal_those_of_the_dataset(seed):
    dataset = random_dataset(seed)
    source, random = DeviceDataset(dataset, CPU), np.random.default_rng(seed)
    for _ in range(20):
        rows = random.integers(0, len(dataset), int(random.integers(1, 9)))
        width = int(dataset.lengths[rows].max()) + int(random.integers(0, 40))
        assert_same(source.batch(rows, width), dataset.batch(rows, width))


@pytest.mark.parametrize("shard", [Shard(0, 1), Shard(1, 2), Shard(2, 3)])
@pytest.mark.parametrize("start", [0, 3])
def test_training_batches_on_a_cpu_are_those_of_the_dataset(shard, start):
    dataset = DATASETS["pairs"]
    actual = TrainingBatches(dataset, CPU)(2, 5, start=start, shard=shard)
    expected = dataset.batches(2, 5, start=start, shard=shard)
    for batch, reference in itertools.islice(zip(actual, expected, strict=True), 10):
        assert_same(batch, reference)


def test_gathered_training_batches_are_those_of_the_dataset():
    dataset = random_dataset(3)
    training = TrainingBatches(dataset, CPU)
    training._on_device = DeviceDataset(dataset, CPU)
    actual = training(4, 1, start=2, shard=Shard(1, 2))
    expected = dataset.batches(4, 1, start=2, shard=Shard(1, 2))
    for batch, reference in itertools.islice(zip(actual, expected, strict=True), 30):
        assert_same(batch, reference)


def test_the_size_on_the_device_is_counted():
    dataset = DATASETS["pairs"]
    source = DeviceDataset(dataset, CPU)
    tensors = (source.token_ids, source.starts, source.lengths, source.pair_starts, source.labels)
    assert DeviceDataset.size(dataset) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- padded lengths ---------------------------------------------------------------------------------------------------


def test_lengths_on_a_cpu_are_not_rounded():
    assert [padded_length(512, length, CPU) for length in (1, 13, 100, 512)] == [1, 13, 100, 512]


def test_lengths_on_a_gpu_are_rounded_up_to_few_values():
    padded = [padded_length(512, length, CUDA) for length in range(1, 513)]
    assert all(length <= width for length, width in enumerate(padded, 1))
    assert all(width - length < max(8, length / 4) for length, width in enumerate(padded, 1))
    assert padded == sorted(padded)
    assert sorted(set(padded[:128])) == [8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128]
    assert len(set(padded)) == 20


@pytest.mark.parametrize("longest", [1, 7, 66, 500])
def test_no_batch_is_padded_beyond_the_longest_text(longest):
    assert max(padded_length(longest, length, CUDA) for length in range(1, longest + 1)) == longest


# --- background thread ------------------------------------------------------------------------------------------------


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_prefetched_batches_are_the_iterators_in_order():
    assert list(prefetch(iter(range(50)))) == list(range(50))
    assert not threads()


def test_the_thread_runs_only_a_few_batches_ahead():
    produced = []
    batches = prefetch((produced.append(i) or i for i in itertools.count()), size=3)
    assert next(batches) == 0
    deadline = time.monotonic() + 10
    while len(produced) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(produced) == 5  # one taken, three in the queue, one waiting for a slot
    batches.close()
    assert not threads()


@pytest.mark.parametrize("taken", [1, 2, 10])
def test_the_thread_ends_when_the_iterator_is_no_longer_referenced(taken):
    batches = prefetch(itertools.count())
    for _ in range(taken):
        next(batches)
    assert threads()
    del batches
    assert not threads()


def test_an_exception_in_the_thread_is_raised_after_the_batches_before_it():
    def failing():
        yield 1
        yield 2
        raise OSError("disk gone")

    batches = prefetch(failing())
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    assert not threads()


def test_a_large_dataset_is_not_copied_to_the_device(monkeypatch):
    dataset = DATASETS["pairs"]
    free = [8 * DeviceDataset.size(dataset)]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free[0], 0))
    monkeypatch.setattr(device_batches, "DeviceDataset", FakeDeviceDataset)
    assert TrainingBatches(dataset, CUDA)._on_device is not None
    free[0] -= 1
    assert TrainingBatches(dataset, CUDA)._on_device is None


class FakeDeviceDataset(DeviceDataset):
    def __init__(self, dataset, device):
        super().__init__(dataset, CPU)

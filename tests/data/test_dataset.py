"""Encoding, the cache, and batches."""

import json
import multiprocessing
import os

import numpy as np
import pytest
import torch

from funnel.data import dataset as dataset_module
from funnel.data import demo
from funnel.data.dataset import Dataset, InMemoryExamples, encode
from funnel.data.files import ExampleFile
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.io import cache_dir

LABELS = {"0": 0, "1": 1}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNNEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def examples():
    return demo.examples(train=700, dev=10)[0]


@pytest.fixture(scope="module")
def tokenizer(examples):
    return FunnelTokenizer.train(examples.texts)


@pytest.fixture
def dataset(examples, tokenizer):
    return encode(examples, LABELS, tokenizer, 20)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ExampleFile(path, ("text",), "label")


def rows_of(dataset):
    return [tuple(map(torch.Tensor.tolist, dataset.batch(np.array([i])))) for i in range(len(dataset))]


def test_an_epoch_has_every_row_once_and_depends_on_seed_and_epoch(dataset):
    batches = dataset.training_batches(32, seed=3, epoch=1)
    assert sorted(np.concatenate(batches)) == list(range(700))
    assert all((a == b).all() for a, b in zip(batches, dataset.training_batches(32, seed=3, epoch=1), strict=True))
    for seed, epoch in ((4, 1), (3, 2)):
        other = dataset.training_batches(32, seed=seed, epoch=epoch)
        assert not all(len(a) == len(b) and (a == b).all() for a, b in zip(batches, other, strict=True))


def test_batches_by_length_hold_little_padding(dataset):
    masks = [dataset.batch(rows).attention_mask for rows in dataset.training_batches(32, 0, 0)]
    real = sum(m.sum().item() for m in masks) / sum(m.numel() for m in masks)
    shuffled = [dataset.batch(rows).attention_mask for rows in np.array_split(np.random.default_rng(0).permutation(700), 22)]
    assert real > 0.93 > sum(m.sum().item() for m in shuffled) / sum(m.numel() for m in shuffled)


@pytest.mark.parametrize("chunk", [1024, 100])
def test_a_batch_holds_what_the_tokenizer_gave(examples, tokenizer, chunk, monkeypatch):
    monkeypatch.setattr(dataset_module, "CHUNK", chunk)
    pairs = examples._replace(pairs=[*examples.texts[1:], ""])
    for source in (examples, pairs):
        dataset = encode(source, LABELS, tokenizer, 20)
        rows = np.array([5, 0, 699, 33])
        batch = dataset.batch(rows)
        for i, row in enumerate(rows):
            second = None if source.pairs is None else [source.pairs[row]]
            encoding = tokenizer.encode([source.texts[row]], second, max_length=20)[0]
            n = len(encoding.input_ids)
            assert batch.input_ids[i, :n].tolist() == encoding.input_ids
            assert batch.token_type_ids[i, :n].tolist() == encoding.token_type_ids
            assert batch.attention_mask[i].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
            assert (batch.input_ids[i, n:] == tokenizer.pad_id).all()
            assert (batch.token_type_ids[i, n:] == 0).all()
            assert batch.labels[i] == int(source.labels[row])
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


def test_what_was_cut_is_counted(tokenizer):
    texts = ["a " * 30, "a", "a " * 50]
    cut = encode(InMemoryExamples(texts, None, ["0"] * 3), LABELS, tokenizer, 12).cut
    assert cut == (2, (32 - 12) + (52 - 12), 32 + 3 + 52, 52)
    pairs = encode(InMemoryExamples(texts, ["a " * 5, "a", "a"], ["0"] * 3), LABELS, tokenizer, 12).cut
    assert pairs == (2, (38 - 12) + (54 - 12), 38 + 5 + 54, 54)
    assert str(cut) == "2 texts are longer and were cut, which lost 69.0% of all tokens (longest: 52)"


def test_evaluation_has_every_row_once(dataset):
    batches = list(dataset.evaluation_batches(64))
    assert sorted(np.concatenate(batches)) == list(range(700))
    assert dataset.lengths[batches[0]].min() >= dataset.lengths[batches[-1]].max()


def test_scores_are_floats(tokenizer):
    dataset = encode(InMemoryExamples(["a", "b"], None, ["2.5", "-1e3"]), None, tokenizer, 12)
    labels = dataset.batch(np.array([1, 0])).labels
    assert labels.dtype == torch.float32
    assert labels.tolist() == [-1000, 2.5]


@pytest.mark.parametrize(
    ("label", "labels", "words"),
    [("2", LABELS, "line 2: label '2' is none of 0, 1"), ("x", None, "label 'x' is no number"), ("nan", None, "no number")],
)
def test_an_unknown_label_is_an_error_with_its_line_and_leaves_nothing(label, labels, words, tokenizer, tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": "a", "label": "1"}, {"text": "b", "label": label}])
    with pytest.raises(FunnelError, match=words):
        encode(source, labels, tokenizer, 12)
    assert list((cache_dir() / "encoded").iterdir()) == []


def test_the_cache_is_used_and_depends_on_content_tokenizer_length_and_labels(tokenizer, tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", [{"text": "good film", "label": "1"}, {"text": "bad", "label": "0"}])
    first = rows_of(encode(source, LABELS, tokenizer, 12))
    made = []
    original = dataset_module._write
    monkeypatch.setattr(dataset_module, "_write", lambda *arguments: (made.append(1), original(*arguments)))
    assert rows_of(encode(source, LABELS, tokenizer, 12)) == first
    os.utime(source.path, (0, 0))
    assert rows_of(encode(source, LABELS, tokenizer, 12)) == first
    assert made == []
    encode(source, LABELS, tokenizer, 13)
    assert [row[3] for row in rows_of(encode(source, {"0": 1, "1": 0}, tokenizer, 12))] == [[0], [1]]
    encode(source, LABELS, FunnelTokenizer.train(["good film bad"] * 9), 12)
    assert len(made) == 3
    write(source.path, [{"text": "good film", "label": "0"}, {"text": "bad", "label": "0"}])
    assert [row[3] for row in rows_of(encode(source, LABELS, tokenizer, 12))] == [[0], [0]]
    assert len(made) == 4


@pytest.mark.parametrize("name", ["ids.bin", "rows.npz", "about.json"])
def test_a_damaged_cache_is_made_again(name, examples, tokenizer):
    whole = rows_of(encode(examples, LABELS, tokenizer, 20))
    (folder,) = (cache_dir() / "encoded").iterdir()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert rows_of(encode(examples, LABELS, tokenizer, 20)) == whole


def test_a_cache_that_cannot_be_written_is_done_without(examples, tokenizer, tmp_path, monkeypatch):
    whole = rows_of(encode(examples, LABELS, tokenizer, 20))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUNNEL_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written"):
        assert rows_of(encode(examples, LABELS, tokenizer, 20)) == whole


def test_a_file_that_changes_while_it_is_read_is_an_error(tokenizer, tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", [{"text": "a", "label": "1"}])
    original = dataset_module._write

    def change(*arguments):
        original(*arguments)
        write(source.path, [{"text": "b", "label": "1"}])

    monkeypatch.setattr(dataset_module, "_write", change)
    with pytest.raises(FunnelError, match=r"a.jsonl: changed while it was read"):
        encode(source, LABELS, tokenizer, 12)
    assert list((cache_dir() / "encoded").iterdir()) == []


def test_ids_take_two_bytes_each(examples, tokenizer):
    dataset = encode(examples, LABELS, tokenizer, 20)
    (path,) = (cache_dir() / "encoded").glob("*/ids.bin")
    assert path.stat().st_size == 2 * dataset.lengths.sum()


def peak_of_encoding(path, queue):
    import resource

    from funnel.data.tokenizer import FunnelTokenizer

    tokenizer = FunnelTokenizer.train(["a good film that is long"] * 5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dataset = encode(ExampleFile(path, ("text",), "label"), LABELS, tokenizer, 64)
    queue.put((len(dataset), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def test_memory_does_not_grow_with_the_texts(tmp_path):
    """A file of 47 MB whose texts are mostly cut: what is read stays below a chunk's texts and ids, all of it on disk."""
    with (tmp_path / "a.tsv").open("w") as file:
        file.write("text\tlabel\n")
        file.writelines(f"a good film {i} {'that is long ' * 18}\t{i % 2}\n" for i in range(190_000))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak_of_encoding, args=(tmp_path / "a.tsv", queue))
    process.start()
    count, kib = queue.get(timeout=240)
    process.join()
    assert count == 190_000
    assert kib < 150_000


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_split_has_every_row_once_and_a_share_of_every_class(tokenizer, share):
    labels = ["0"] * 300 + ["1"] * 40
    dataset = encode(InMemoryExamples(["a " * i for i in range(340)], None, labels), LABELS, tokenizer, 400)
    train, dev = dataset.split(share, seed=3)
    assert sorted(rows_of(train) + rows_of(dev)) == sorted(rows_of(dataset))
    assert [(dev.labels == c).sum() for c in (0, 1)] == [300 * share, 40 * share]
    assert rows_of(dataset.split(share, seed=3)[1]) == rows_of(dev)
    assert rows_of(dataset.split(share, seed=4)[1]) != rows_of(dev)
    assert isinstance(train, Dataset)


def test_a_split_of_many_small_classes_takes_its_share_all_the_same(tokenizer):
    texts = [f"word {i}" for i in range(90)]
    labels = {str(c): c for c in range(40)}  # 30 classes of 2 and 10 of 3
    source = InMemoryExamples(texts, None, [str(i % 30 if i < 60 else 30 + i % 10) for i in range(90)])
    dataset = encode(source, labels, tokenizer, 16)
    train, dev = dataset.split(0.2, seed=0)
    assert len(dev) == 18
    assert set(train.labels) == set(range(40))
    assert np.bincount(dev.labels).max() == 1


def test_a_split_that_leaves_nothing_is_an_error(tokenizer):
    dataset = encode(InMemoryExamples(["a", "b"], None, ["0", "1"]), LABELS, tokenizer, 12)
    with pytest.raises(FunnelError, match="leaves train or dev empty"):
        dataset.split(0.1, 0)


@pytest.mark.parametrize("share", [-0.3, 0, 1, float("nan")])
def test_a_share_that_is_none_is_refused(share, tokenizer):
    dataset = encode(InMemoryExamples(["a"] * 10, None, ["0", "1"] * 5), LABELS, tokenizer, 12)
    with pytest.raises(FunnelError, match="--dev-share"):
        dataset.split(share, 0)

"""Encoding, the cache, and batches."""

import hashlib
import itertools
import json
import multiprocessing
import os

import numpy as np
import pytest
import torch
from conftest import review_sentences

from funnel.data import encoding as encoding_module
from funnel.data.batches import Batch, Shard
from funnel.data.dataset import Dataset, Rows, Truncation
from funnel.data.encoding import TextEncoder, encode_examples
from funnel.data.files import ExampleFile, InMemoryExamples
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.io import cache_dir

LABELS = {"0": 0, "1": 1}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNNEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def examples():
    return review_sentences(700)


@pytest.fixture(scope="module")
def tokenizer(examples):
    return FunnelTokenizer.train(examples.texts)


@pytest.fixture
def dataset(examples, tokenizer):
    return encode_examples(examples, TextEncoder(LABELS), tokenizer, 40)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ExampleFile(path, ("text",), "label")


def rows_of(dataset):
    """Every example of a data set as lists: ids, mask, types, label."""
    batches = [dataset.batch(np.array([i])) for i in range(len(dataset))]
    return [tuple(tensor.tolist() for tensor in batch.tensors.values()) for batch in batches]


def test_an_epoch_visits_every_row_once_in_an_order_set_by_seed_and_epoch(dataset):
    batches = dataset.training_batches(32, seed=3, epoch=1)
    assert sorted(np.concatenate(batches)) == list(range(700))
    assert all((a == b).all() for a, b in zip(batches, dataset.training_batches(32, seed=3, epoch=1), strict=True))
    for seed, epoch in ((4, 1), (3, 2)):
        other = dataset.training_batches(32, seed=seed, epoch=epoch)
        assert not all(len(a) == len(b) and (a == b).all() for a, b in zip(batches, other, strict=True))


def test_sorting_by_length_reduces_padding(dataset):
    masks = [dataset.batch(rows).attention_mask for rows in dataset.training_batches(32, 0, 0)]
    sorted_share = sum(m.sum().item() for m in masks) / sum(m.numel() for m in masks)
    shuffled = [dataset.batch(rows).attention_mask for rows in np.array_split(np.random.default_rng(0).permutation(700), 22)]
    assert sorted_share > 0.93 > sum(m.sum().item() for m in shuffled) / sum(m.numel() for m in shuffled)


@pytest.mark.parametrize("chunk", [1024, 100])
def test_batch_contains_the_tokenizers_encodings(examples, tokenizer, chunk, monkeypatch):
    monkeypatch.setattr(encoding_module, "CHUNK_SIZE", chunk)
    pairs = examples._replace(pairs=[*examples.texts[1:], ""])
    for source in (examples, pairs):
        dataset = encode_examples(source, TextEncoder(LABELS), tokenizer, 20)
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


def test_truncation_is_measured(tokenizer):
    texts = ["a " * 30, "a", "a " * 50]
    truncation = encode_examples(InMemoryExamples(texts, None, ["0"] * 3), TextEncoder(LABELS), tokenizer, 12).truncation
    assert truncation == (2, (32 - 12) + (52 - 12), 32 + 3 + 52, 52)
    pairs = InMemoryExamples(texts, ["a " * 5, "a", "a"], ["0"] * 3)
    assert encode_examples(pairs, TextEncoder(LABELS), tokenizer, 12).truncation == (2, (38 - 12) + (54 - 12), 38 + 5 + 54, 54)
    assert str(truncation) == "2 texts truncated, losing 69.0% of all tokens (longest text: 52)"


def test_evaluation_visits_every_row_once_longest_first(dataset):
    batches = list(dataset.evaluation_batches(64))
    assert sorted(np.concatenate(batches)) == list(range(700))
    assert dataset.lengths[batches[0]].min() >= dataset.lengths[batches[-1]].max()


def test_scores_are_float32(tokenizer):
    dataset = encode_examples(InMemoryExamples(["a", "b"], None, ["2.5", "-1e3"]), TextEncoder(None), tokenizer, 12)
    labels = dataset.batch(np.array([1, 0])).labels
    assert labels.dtype == torch.float32
    assert labels.tolist() == [-1000, 2.5]


@pytest.mark.parametrize(
    ("label", "label_ids", "message"),
    [
        ("2", LABELS, "line 2: unknown label '2'; the labels are 0, 1"),
        ("x", None, "line 2: label 'x' is not a finite float32"),
        ("nan", None, "not a finite"),
    ],
)
def test_invalid_label_raises_an_error_with_line_and_leaves_no_files(label, label_ids, message, tokenizer, tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": "a", "label": "1"}, {"text": "b", "label": label}])
    with pytest.raises(FunnelError, match=message):
        encode_examples(source, TextEncoder(label_ids), tokenizer, 12)
    assert list((cache_dir() / "encoded").iterdir()) == []


def test_unknown_label_that_differs_in_spelling_only_is_pointed_out(tokenizer):
    source = InMemoryExamples(["a"], None, ["1.0"])
    with pytest.raises(FunnelError, match=r"unknown label '1.0'; .*; only case, spaces or number format differ from '1'"):
        encode_examples(source, TextEncoder(LABELS), tokenizer, 12)


def test_texts_of_unknown_or_special_tokens_are_counted_with_a_cold_and_a_warm_cache(tokenizer):
    special = {role: tokenizer.names[role] for role in ("cls", "sep", "pad", "mask")}
    texts = ["a film", "漢字 漢", "q" * 300_000, f"a {special['sep']} b", "", special["mask"], "a 漢"]
    names = ", ".join(special.values())
    expected = (
        f"2 texts of unknown words only: all tokens are {tokenizer.names['unk']}, such as '漢字 漢'",
        f"2 texts with a special token inside ({names}), which is encoded as that token, such as 'a {special['sep']} b'",
    )
    for source in (InMemoryExamples(texts, None, ["0"] * 7), InMemoryExamples(texts, texts, ["0"] * 7)):
        for _ in range(2):
            assert encode_examples(source, TextEncoder(LABELS), tokenizer, 20).warnings == expected


def test_equal_texts_have_equal_hashes(tokenizer):
    dataset = encode_examples(InMemoryExamples(["a", "b", "a"], None, ["0", "1", "1"]), TextEncoder(LABELS), tokenizer, 12)
    assert dataset.hashes[0] == dataset.hashes[2] != dataset.hashes[1]
    pairs = encode_examples(InMemoryExamples(["a", "a"], ["b", "c"], ["0", "1"]), TextEncoder(LABELS), tokenizer, 12)
    assert len({*pairs.hashes, *dataset.hashes}) == 4
    assert dataset.split(0.34, seed=0)[1].hashes.dtype == np.uint64


def test_cache_depends_on_content_tokenizer_length_and_labels(tokenizer, tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", [{"text": "good film", "label": "1"}, {"text": "bad", "label": "0"}])
    first = rows_of(encode_examples(source, TextEncoder(LABELS), tokenizer, 12))
    writes = []
    original = encoding_module._write
    monkeypatch.setattr(encoding_module, "_write", lambda *args: (writes.append(1), original(*args)))
    assert rows_of(encode_examples(source, TextEncoder(LABELS), tokenizer, 12)) == first
    os.utime(source.path, (0, 0))
    assert rows_of(encode_examples(source, TextEncoder(LABELS), tokenizer, 12)) == first
    assert writes == []
    encode_examples(source, TextEncoder(LABELS), tokenizer, 13)
    assert [row[3] for row in rows_of(encode_examples(source, TextEncoder({"0": 1, "1": 0}), tokenizer, 12))] == [[0], [1]]
    encode_examples(source, TextEncoder(LABELS), FunnelTokenizer.train(["good film bad"] * 9), 12)
    assert len(writes) == 3
    write(source.path, [{"text": "good film", "label": "0"}, {"text": "bad", "label": "0"}])
    assert [row[3] for row in rows_of(encode_examples(source, TextEncoder(LABELS), tokenizer, 12))] == [[0], [0]]
    assert len(writes) == 4


@pytest.mark.parametrize("name", ["token_ids.bin", "rows.npz", "about.json"])
@pytest.mark.parametrize("is_empty", [False, True])
def test_damaged_cache_entry_is_replaced(name, is_empty, examples, tokenizer):
    expected = rows_of(encode_examples(examples, TextEncoder(LABELS), tokenizer, 20))
    (folder,) = (cache_dir() / "encoded").iterdir()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(b"" if is_empty else content[: len(content) // 2])
    assert rows_of(encode_examples(examples, TextEncoder(LABELS), tokenizer, 20)) == expected


def test_unwritable_cache_gives_a_warning_and_the_same_examples(examples, tokenizer, tmp_path, monkeypatch):
    expected = rows_of(encode_examples(examples, TextEncoder(LABELS), tokenizer, 20))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUNNEL_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot write"):
        assert rows_of(encode_examples(examples, TextEncoder(LABELS), tokenizer, 20)) == expected


def test_file_that_changes_while_being_read_raises_an_error(tokenizer, tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", [{"text": "a", "label": "1"}])
    original = encoding_module._write

    def write_and_change(*args):
        original(*args)
        write(source.path, [{"text": "b", "label": "1"}])

    monkeypatch.setattr(encoding_module, "_write", write_and_change)
    with pytest.raises(FunnelError, match=r"a.jsonl: changed while being read"):
        encode_examples(source, TextEncoder(LABELS), tokenizer, 12)
    assert list((cache_dir() / "encoded").iterdir()) == []


def test_cached_ids_take_two_bytes_each(examples, tokenizer):
    dataset = encode_examples(examples, TextEncoder(LABELS), tokenizer, 20)
    (path,) = (cache_dir() / "encoded").glob("*/token_ids.bin")
    assert path.stat().st_size == 2 * dataset.lengths.sum()


def report_peak_memory(path, queue):
    import resource

    from funnel.data.tokenizer import FunnelTokenizer

    tokenizer = FunnelTokenizer.train(["a good film that is long"] * 5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dataset = encode_examples(ExampleFile(path, ("text",), "label"), TextEncoder(LABELS), tokenizer, 64)
    queue.put((len(dataset), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """With a 47 MB file whose texts are mostly truncated; only one chunk is in memory at a time."""
    with (tmp_path / "a.tsv").open("w") as file:
        file.write("text\tlabel\n")
        file.writelines(f"a good film {i} {'that is long ' * 18}\t{i % 2}\n" for i in range(190_000))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=report_peak_memory, args=(tmp_path / "a.tsv", queue))
    process.start()
    count, kib = queue.get(timeout=240)
    process.join()
    assert count == 190_000
    assert kib < 150_000


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_split_is_a_stratified_partition(tokenizer, share):
    labels = ["0"] * 300 + ["1"] * 40
    examples = InMemoryExamples(["a " * i for i in range(340)], None, labels)
    dataset = encode_examples(examples, TextEncoder(LABELS), tokenizer, 400)
    train, dev = dataset.split(share, seed=3)
    assert sorted(rows_of(train) + rows_of(dev)) == sorted(rows_of(dataset))
    assert [(dev.labels == c).sum() for c in (0, 1)] == [300 * share, 40 * share]
    assert rows_of(dataset.split(share, seed=3)[1]) == rows_of(dev)
    assert rows_of(dataset.split(share, seed=4)[1]) != rows_of(dev)
    assert isinstance(train, Dataset)


def test_split_of_many_small_classes_has_the_requested_size(tokenizer):
    texts = [f"word {i}" for i in range(90)]
    labels = {str(c): c for c in range(40)}  # 30 classes of 2 and 10 of 3
    source = InMemoryExamples(texts, None, [str(i % 30 if i < 60 else 30 + i % 10) for i in range(90)])
    dataset = encode_examples(source, TextEncoder(labels), tokenizer, 16)
    train, dev = dataset.split(0.2, seed=0)
    assert len(dev) == 18
    assert set(train.labels) == set(range(40))
    assert np.bincount(dev.labels).max() == 1


def test_split_with_an_empty_part_raises_an_error(tokenizer):
    dataset = encode_examples(InMemoryExamples(["a", "b"], None, ["0", "1"]), TextEncoder(LABELS), tokenizer, 12)
    with pytest.raises(FunnelError, match="leaves train or dev empty"):
        dataset.split(0.1, 0)


# --- training batches -------------------------------------------------------------------------------------------------


def equal(first: Batch, second: Batch) -> bool:
    tensors = zip(first.tensors.values(), second.tensors.values(), strict=True)
    return all(torch.equal(a, b) for a, b in tensors) and first.weight == second.weight


def take(dataset, count, **options):
    return list(itertools.islice(dataset.batches(32, 3, **options), count))


def test_batches_iterate_over_consecutive_epochs(dataset):
    indices = [*dataset.training_batches(32, 3, 0), *dataset.training_batches(32, 3, 1)]  # 22 batches each
    for batch, index in zip(take(dataset, 44), indices, strict=True):
        assert equal(batch, dataset.batch(index))
        assert (batch.weight, batch.n_examples) == (1, len(index))


def test_batch_order_matches_published_results():
    lengths = np.random.default_rng(5).integers(3, 90, 1000).astype(np.int32)
    rows = Rows(lengths, lengths, lengths, lengths, lengths)
    batches = Dataset(lengths, rows, 0, Truncation()).training_batches(8, seed=7, epoch=2)
    digest = hashlib.sha256(json.dumps([batch.tolist() for batch in batches]).encode()).hexdigest()
    assert digest == "09237a00e74b222d9d8eaaf52f1af891080ff45b3438e41fac552431285a3a41"


@pytest.mark.parametrize("start", [1, 21, 22, 30])
def test_batches_can_start_at_any_step(dataset, start):
    batches = take(dataset, 40)
    resumed = take(dataset, 40 - start, start=start)
    assert all(equal(a, b) for a, b in zip(batches[start:], resumed, strict=True))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_split_the_rows_of_the_global_batch(dataset, world_size):
    ranks = [take(dataset, 22, shard=Shard(rank, world_size)) for rank in range(world_size)]
    for batch, *parts in zip(take(dataset, 22), *ranks, strict=True):
        for name, tensor in batch.tensors.items():
            assert torch.equal(torch.cat([part.tensors[name] for part in parts]), tensor)
        assert [part.weight for part in parts] == [len(p.labels) * world_size / len(batch.labels) for p in parts]
        assert {part.n_examples for part in parts} == {len(batch.labels)}


def test_rank_without_a_row_gets_the_first_row_with_weight_0(dataset):
    small = dataset.subset(np.arange(3))
    index = small.training_batches(8, 0, 0)[0]
    batches = [next(small.batches(8, 0, shard=Shard(rank, 5))) for rank in range(5)]
    assert [batch.weight for batch in batches] == [5 / 3, 5 / 3, 5 / 3, 0, 0]
    for batch in batches[3:]:
        assert torch.equal(batch.input_ids, small.batch(index).input_ids[:1])
        assert [len(micro.labels) for micro in batch.split(4)] == [1]


@pytest.mark.parametrize("n_rows", [1, 2, 5, 7, 32])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 3, 100])
def test_weighted_micro_batch_losses_give_the_mean_loss_of_the_global_batch(dataset, n_rows, world_size, n):
    subset = dataset.subset(np.arange(n_rows))
    losses = torch.rand(700, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss_of_text = {tuple(dataset.input_ids(i)): losses[i] for i in range(n_rows)}

    def mean_loss(batch):
        ids = [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
        return torch.stack([loss_of_text[tuple(row)] for row in ids]).mean()

    ranks = [next(subset.batches(32, 0, shard=Shard(rank, world_size))).split(n) for rank in range(world_size)]
    assert {len(micro_batches) for micro_batches in ranks} == {min(n, max(1, n_rows // world_size))}
    sizes = [len(micro.labels) for micro_batches in ranks for micro in micro_batches]
    assert max(sizes) - min(sizes) <= 2  # one from sharing rows among ranks, one from splitting
    total = sum(micro.weight * mean_loss(micro) for micro_batches in ranks for micro in micro_batches) / world_size
    assert float(total) == pytest.approx(float(losses[:n_rows].mean()), rel=1e-12)


def test_micro_batches_contain_the_rows_in_order(dataset):
    batch = dataset.batch(np.arange(10))
    micro_batches = batch.split(3)
    assert [len(micro.labels) for micro in micro_batches] == [4, 3, 3]
    for name, tensor in batch.tensors.items():
        assert torch.equal(torch.cat([micro.tensors[name] for micro in micro_batches]), tensor)


def test_batch_inputs_are_the_models_arguments_and_move_to_a_device(dataset):
    batch = dataset.batch(np.arange(4)).to("meta")
    assert list(batch.inputs) == ["input_ids", "attention_mask", "token_type_ids"]
    assert all(tensor.is_meta for tensor in batch.tensors.values())


def encode_in_process(path, cache, barrier):
    os.environ["FUNNEL_CACHE"] = cache
    tokenizer = FunnelTokenizer.train(["a good film"] * 5)
    barrier.wait(60)
    dataset = encode_examples(ExampleFile(path, ("text",), "label"), TextEncoder(LABELS), tokenizer, 64)
    assert len(dataset) == 5000


@pytest.mark.slow
def test_several_processes_can_encode_the_same_file_at_once(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": f"a good film {i}", "label": "1"} for i in range(5000)])
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    cache = str(tmp_path / "cache")
    processes = [context.Process(target=encode_in_process, args=(source.path, cache, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list((tmp_path / "cache" / "encoded").iterdir())) == 1

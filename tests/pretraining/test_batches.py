"""Sequences and pretraining batches, compared with the tokenizer and with computations by hand."""

import itertools
import json

import numpy as np
import pytest
import torch

from funnel.data.batches import Shard
from funnel.data.device_batches import padded_length
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.pretraining import batches as batches_module
from funnel.pretraining.batches import PretrainBatches, PretrainData, SequenceFormat, Sequences, cut
from funnel.pretraining.corpus import Corpus, prepare_corpus
from funnel.pretraining.masking import Masking

CPU = torch.device("cpu")
WORDS = [f"w{i}" for i in range(60)]


def make_tokenizer(folder, second_type):
    """With one separator in pairs and token type 1, as BERT, or two separators and token type 0, as RoBERTa."""
    bert = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names = bert if second_type == 1 else ["<pad>", "[UNK]", "<s>", "</s>", "<mask>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*names, *WORDS]) + "\n")
    tokenizer = FunnelTokenizer.load(folder)
    assert (tokenizer.separators, tokenizer.second_type) == ((1, 1) if second_type == 1 else (2, 0))
    return tokenizer


@pytest.fixture(scope="module", params=[1, 0], ids=["one separator", "two separators"])
def tokenizer(request, tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("vocabulary"), request.param)


@pytest.fixture(scope="module")
def texts():
    """Documents of 0 to 70 words; one contains the name of a special token."""
    random = np.random.default_rng(0)
    lengths = [0, 1, 70, *random.integers(1, 70, 200)]
    return [" ".join(random.choice(WORDS, length)) for length in lengths] + ["w1 [MASK] <mask> w2"]


@pytest.fixture(scope="module")
def corpus(tokenizer, texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare_corpus([path], tokenizer)


def make_batches(corpus, tokenizer, max_length=24, **options):
    format = SequenceFormat(tokenizer, max_length, **options)
    return PretrainBatches(Sequences.split(corpus, format.room)[0], format, CPU)


def take(batches, count, **options):
    return list(itertools.islice(batches(16, 3, **options), count))


def rows_of(batch):
    """The real ids and types of each row."""
    rows = zip(batch.input_ids, batch.token_type_ids, batch.attention_mask.sum(1), strict=True)
    return [(ids[:n].tolist(), types[:n].tolist()) for ids, types, n in rows]


# --- sequences --------------------------------------------------------------------------------------------------------


def test_documents_are_cut_into_few_pieces_of_nearly_equal_length():
    starts, lengths = cut(np.array([100, 101, 200, 300]), np.array([1, 10, 11, 25], np.int32), 10)
    assert lengths.tolist() == [1, 10, 5, 6, 8, 8, 9]
    assert starts.tolist() == [100, 101, 200, 205, 300, 308, 316]


def test_pieces_cover_the_documents():
    random = np.random.default_rng(1)
    documents, room = random.integers(1, 200, 500), 17
    starts, lengths = cut(documents.cumsum() - documents, documents, room)
    assert lengths.max() <= room
    assert len(lengths) == sum(-(-n // room) for n in documents.tolist())
    assert (starts[1:] == starts[:-1] + lengths[:-1]).all()
    assert lengths.sum() == documents.sum()


def synthetic_corpus(lengths):
    return Corpus((np.zeros(sum(lengths), np.uint16),), np.array(lengths, np.int32), "")


@pytest.mark.parametrize(("n_documents", "held_out"), [(2, 1), (150, 2), (1000, 10), (150_000, 1000)])
def test_one_percent_of_the_documents_is_held_out(n_documents, held_out):
    training, evaluation = Sequences.split(synthetic_corpus([0, *[7] * n_documents, 0]), 10)
    assert (len(training), len(evaluation)) == (n_documents - held_out, held_out)
    assert sorted([*training.starts, *evaluation.starts]) == list(range(0, 7 * n_documents, 7))


def test_held_out_documents_do_not_depend_on_the_length_of_sequences():
    corpus = synthetic_corpus([70] * 1000)
    documents = [{int(start) // 70 for start in Sequences.split(corpus, room)[1].starts} for room in (5, 30, 100)]
    assert documents[0] == documents[1] == documents[2]
    assert len(documents[0]) == 10


def test_held_out_sequences_are_limited(monkeypatch):
    monkeypatch.setattr(batches_module, "MAX_HELD_OUT", 3)
    training, evaluation = Sequences.split(synthetic_corpus([70] * 1000), 10)
    assert (len(training), len(evaluation)) == (997 * 7, 3)


@pytest.mark.parametrize("lengths", [[5], [0, 5, 0]])
def test_corpus_of_one_document_is_an_error(lengths):
    with pytest.raises(FunnelError, match="corpus: fewer than two documents"):
        Sequences.split(synthetic_corpus(lengths), 10)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_are_the_tokenizers_encodings(corpus, tokenizer, texts):
    batches = make_batches(corpus, tokenizer, max_length=128)
    expected = {tuple(encoding.input_ids): encoding.token_type_ids for encoding in tokenizer.encode(texts, max_length=128)}
    for batch in take(batches, 12):
        width = batch.input_ids.shape[1]
        for (ids, types), padding, padding_types in zip(
            rows_of(batch), batch.input_ids.tolist(), batch.token_type_ids.tolist(), strict=True
        ):
            assert types == expected[tuple(ids)]
            assert padding[len(ids) :] == [tokenizer.pad_id] * (width - len(ids))
            assert padding_types[len(ids) :] == [0] * (width - len(ids))


def test_pairs_are_encoded_as_the_tokenizer_does_and_fit(corpus, tokenizer):
    words = {5 + i: word for i, word in enumerate(WORDS)} | dict.fromkeys([4], tokenizer.names["mask"])
    words[tokenizer.ids.get("unk", 1)] = "unknown"
    sep, n_pairs, n_rows, cuts = tokenizer.ids["sep"], 0, 0, []
    for batch in take(make_batches(corpus, tokenizer, pairs=True), 60):
        for ids, types in rows_of(batch):
            n_rows += 1
            assert len(ids) <= 24
            inner = ids[1:-1]
            if sep in inner:
                at = inner.index(sep)
                first, second = inner[:at], inner[at + tokenizer.separators :]
                assert first
                assert second
                (expected,) = tokenizer.encode([" ".join(words[i] for i in first)], [" ".join(words[i] for i in second)])
                cuts.append(len(first) / (len(first) + len(second)))
                n_pairs += 1
            else:
                (expected,) = tokenizer.encode([" ".join(words[i] for i in inner)])
            assert (ids, types) == (expected.input_ids, expected.token_type_ids)
    assert 0.4 < n_pairs / n_rows < 0.6
    assert 0.4 < np.mean(cuts) < 0.6
    assert max(cuts) > 0.9 > 0.1 > min(cuts)


def test_tokens_of_an_epoch_are_those_of_the_corpus(corpus, tokenizer):
    batches = make_batches(corpus, tokenizer, pairs=True)
    steps = -(-len(batches.sequences) // 16)
    sequences = [
        batches.sequences.corpus.tokens(s, n) for s, n in zip(batches.sequences.starts, batches.sequences.lengths, strict=True)
    ]
    expected = sorted(tuple(tokens.tolist()) for tokens in sequences)
    special = {tokenizer.cls_id, tokenizer.ids["sep"]}
    rows = [row for batch in take(batches, steps) for row, _ in rows_of(batch)]
    assert sorted(tuple(token for token in row if token not in special) for row in rows) == expected


# --- masks and weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [False, True])
def test_masks_labels_and_weights_describe_the_same_batch(corpus, tokenizer, pairs):
    special = {tokenizer.ids[role] for role in ("pad", "cls", "sep", "mask")}
    for batch in take(make_batches(corpus, tokenizer, pairs=pairs, masking=Masking(0.3, mask_token=1.0)), 20):
        inputs, width = {name: tensor.numpy() for name, tensor in batch.inputs.items()}, batch.input_ids.shape[1]
        is_word = ~np.isin(inputs["input_ids"], list(special))
        is_token = inputs["input_ids"] != tokenizer.pad_id
        np.testing.assert_allclose(inputs["token_weights"], is_token / is_token.sum(), rtol=1e-6)
        assert inputs["positions"].shape == (batch.n_examples, int(0.3 * (width - 2) + 0.5))
        n_masked = 0
        for i in range(batch.n_examples):
            used = inputs["position_weights"][i] > 0
            positions, n_words = inputs["positions"][i][used], int(is_word[i].sum())
            assert len(positions) == min(n_words, max(1, int(0.3 * n_words + 0.5)))
            assert is_word[i, positions].all()
            assert batch.labels[i].tolist() == inputs["input_ids"][i][inputs["positions"][i]].tolist()
            expected = inputs["input_ids"][i].copy()
            expected[positions] = tokenizer.ids["mask"]
            assert inputs["masked_ids"][i].tolist() == expected.tolist()
            n_masked += len(positions)
        weights = inputs["position_weights"]
        np.testing.assert_allclose(weights[weights > 0], 1 / n_masked, rtol=1e-6)
        assert ((inputs["uniforms"] >= 0) & (inputs["uniforms"] < 1)).all()
        assert (batch.weight, batch.n_examples, batch.world_size) == (1.0, len(is_word), 1)


@pytest.mark.parametrize("masking", [None, Masking()])
def test_types_and_shapes_are_those_of_the_objectives(corpus, tokenizer, masking):
    batch = take(make_batches(corpus, tokenizer, masking=masking), 1)[0]
    b, l = batch.input_ids.shape  # noqa: E741
    m = batch.labels.shape[1]
    texts = ["input_ids", "attention_mask", "token_type_ids"]
    assert (m > 0) == (masking is not None)
    expected = dict.fromkeys(texts, ((b, l), torch.int64)) | {"token_weights": ((b, l), torch.float32)}
    if masking:
        expected |= {"masked_ids": ((b, l), torch.int64), "positions": ((b, m), torch.int64)}
        expected |= dict.fromkeys(["position_weights", "uniforms"], ((b, m), torch.float32))
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.inputs.items()} == expected
    assert batch.labels.dtype == torch.int64


def test_masks_differ_between_steps_and_epochs(corpus, tokenizer):
    batches = make_batches(corpus, tokenizer, masking=Masking())
    steps = -(-len(batches.sequences) // 16)
    masked = [{tuple(row) for batch in part for row in batch.inputs["masked_ids"].tolist()} for part in
              (take(batches, steps), take(batches, steps, start=steps))]  # fmt: skip
    assert len(masked[0] & masked[1]) < 0.1 * len(masked[0])


# --- order, ranks -----------------------------------------------------------------------------------------------------


def assert_equal(first, second):
    assert (first.n_examples, list(first.tensors)) == (second.n_examples, list(second.tensors))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors.values(), second.tensors.values(), strict=True))


@pytest.mark.parametrize("start", [1, 29, 100])
def test_batches_can_start_at_any_step(corpus, tokenizer, start):
    batches = make_batches(corpus, tokenizer, pairs=True, masking=Masking())
    assert len(batches.sequences) // 16 < 50  # so that a new epoch begins
    for batch, resumed in zip(take(batches, start + 3)[start:], take(batches, 3, start=start), strict=True):
        assert_equal(batch, resumed)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_split_the_global_batch(corpus, tokenizer, world_size):
    batches = make_batches(corpus, tokenizer, pairs=True, masking=Masking())
    ranks = [take(batches, 30, shard=Shard(rank, world_size)) for rank in range(world_size)]
    for batch, *parts in zip(take(batches, 30), *ranks, strict=True):
        for name, tensor in batch.tensors.items():
            factor = world_size if name.endswith("weights") else 1
            assert torch.equal(torch.cat([part.tensors[name] for part in parts]), factor * tensor)
        assert {(part.weight, part.n_examples, part.world_size) for part in parts} == {(1.0, len(batch.labels), world_size)}


def test_rank_without_a_row_has_weights_0(corpus, tokenizer):
    batches = make_batches(corpus, tokenizer, masking=Masking())
    parts = [next(batches(2, 0, shard=Shard(rank, 3))) for rank in range(3)]
    assert [len(part.labels) for part in parts] == [1, 1, 1]
    for name in ("token_weights", "position_weights"):
        assert sum(part.inputs[name].sum().item() for part in parts) / 3 == pytest.approx(1)
        assert parts[2].inputs[name].sum() == 0


def test_micro_batches_sum_to_the_batch(corpus, tokenizer):
    batch = take(make_batches(corpus, tokenizer, masking=Masking()), 1)[0]
    micro_batches = batch.split(3)
    assert sum(float(micro.inputs["token_weights"].sum()) for micro in micro_batches) == pytest.approx(1)


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_visits_every_sequence_once_with_weights_of_the_whole_set(corpus, tokenizer, world_size):
    batches = make_batches(corpus, tokenizer, pairs=True, masking=Masking())
    ranks = [batches.evaluation(16, shard=Shard(rank, world_size)) for rank in range(world_size)]
    for again, batch in zip(batches.evaluation(16, shard=Shard(0, world_size)), ranks[0], strict=True):
        assert_equal(again, batch)
    special = {tokenizer.cls_id, tokenizer.ids["sep"]}
    rows = [row for rank in ranks for batch in rank for row, _ in rows_of(batch)]
    tokens = sorted(tuple(token for token in row if token not in special) for row in rows)
    sequences = zip(batches.sequences.starts, batches.sequences.lengths, strict=True)
    assert tokens == sorted(tuple(corpus.tokens(start, n).tolist()) for start, n in sequences)
    for name in ("token_weights", "position_weights"):
        weights = torch.cat([batch.inputs[name].flatten() for rank in ranks for batch in rank])
        assert float(weights.sum()) / world_size == pytest.approx(1)
        assert len(weights[weights > 0].unique()) == 1


# --- CUDA -------------------------------------------------------------------------------------------------------------


def test_shapes_on_cuda_depend_on_the_padded_length_only(corpus, tokenizer):
    batches = make_batches(corpus, tokenizer, max_length=64, pairs=True, masking=Masking())
    batches.device = torch.device("cuda")  # `assemble` makes arrays only
    shapes = set()
    for rows in np.array_split(np.argsort(batches.sequences.lengths), 40):
        arrays = batches.assemble(rows, np.random.default_rng(0))
        width = arrays["input_ids"].shape[1]
        assert width <= 64
        longest = int(batches.sequences.lengths[rows].max()) + batches.format.n_special
        assert width == padded_length(batches.sequences.longest + batches.format.n_special, longest, batches.device)
        shapes.add((width, arrays["labels"].shape[1]))
    assert len(shapes) == len({width for width, _ in shapes}) <= 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_contain_the_same_rows(corpus, tokenizer):
    on_cpu = make_batches(corpus, tokenizer, pairs=True)
    on_gpu = PretrainBatches(on_cpu.sequences, on_cpu.format, torch.device("cuda"))
    for first, second in zip(take(on_cpu, 40), take(on_gpu, 40), strict=True):
        assert second.input_ids.is_cuda
        assert rows_of(first) == rows_of(second.to("cpu"))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_corpus_shorter_than_one_batch_is_an_error(corpus, tokenizer):
    format = SequenceFormat(tokenizer, 128)
    n = len(PretrainData.from_corpus(corpus, format, 1).train_set)
    assert len(PretrainData.from_corpus(corpus, format, n).train_set) == n
    with pytest.raises(FunnelError, match=f"batch_size {n + 1}: the corpus has only {n} sequences to train on"):
        PretrainData.from_corpus(corpus, format, n + 1)


@pytest.mark.parametrize(("pairs", "special"), [(False, 2), (True, 3)])
def test_max_length_without_room_is_an_error(pairs, special, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer", 1)
    SequenceFormat(tokenizer, special + 1, pairs)
    with pytest.raises(FunnelError, match=f"invalid max_length {special}: expected more than the {special} special tokens"):
        SequenceFormat(tokenizer, special, pairs)

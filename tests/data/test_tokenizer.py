"""The tokenizer agrees with transformers' FunnelTokenizer on the same vocabularies."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, shared  # noqa: F401 (the minilm fixture uses shared)
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from funnel.data.tokenizer import Encoding, FunnelTokenizer
from funnel.errors import FunnelError

WORDS = "the film was not good but un ##aff ##able na ##ive cafe ##s 東 京 ! , . ' - a b c d ##a ##b ##c ##d 1 ##2 😀".split()
TEXTS = [
    "The film was not good, but unaffable.",
    "",
    " ",
    "naïve cafés",
    "NAÏVE CAFÉS",
    "東京 film東京",
    "😀 good😀",
    "tab\there\nnew\u00a0line\u200bzero\x00nul\x07bell\ufeff",
    "a" * 99 + " " + "b" * 100 + " " + "c" * 101,
    "don't-stop...!!!",
    "[SEP] <sep> [CLS] <cls> [MASK] <mask> <pad>",
    "e\u0301 \u1e9b\u0323 ﬁ",
    "\u202eright to left\u202c שלום مرحبا",
    "1 12 122 1222",
    "unknownword zzz",
]


@pytest.fixture(params=["<>", "[]"])
def vocabulary(request, tmp_path):
    """A vocabulary whose special tokens have the names of the Funnels on the hub, and one with those of BERT."""
    names = ["pad", "unk", "cls", "sep", "mask"]
    special = [f"<{n}>" if request.param == "<>" else f"[{n.upper()}]" for n in names]
    (tmp_path / "vocab.txt").write_text("\n".join(special + WORDS) + "\n", encoding="utf-8")
    return tmp_path


def load_with_transformers(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(folder))


def assert_agrees(tokenizer, peer, first, second=None, max_length=64):
    """Compares all texts in one call: called text by text, transformers treats an empty second text as missing."""
    encodings = tokenizer.encode(first, second, max_length)
    expected = peer(first, second, truncation="longest_first", max_length=max_length, return_token_type_ids=True)
    for i, text in enumerate(first):
        assert encodings[i].input_ids == expected["input_ids"][i], text
        assert encodings[i].token_type_ids == expected["token_type_ids"][i], text


def test_encodings_match_transformers_for_single_texts_and_pairs(vocabulary, tmp_path):
    tokenizer = FunnelTokenizer.load(vocabulary)
    out = tmp_path / "out"
    out.mkdir()
    tokenizer.save_for_transformers(out)
    peer = load_with_transformers(out)
    for max_length in (4, 7, 10, 200):
        assert_agrees(tokenizer, peer, TEXTS, max_length=max_length)
        assert_agrees(tokenizer, peer, TEXTS, TEXTS[::-1], max_length)
        assert_agrees(tokenizer, peer, TEXTS, TEXTS[3:] + TEXTS[:3], max_length)


def test_encodings_match_transformers_funnel_tokenizer(vocabulary):
    transformers = pytest.importorskip("transformers")
    tokenizer = FunnelTokenizer.load(vocabulary)
    tokens = (vocabulary / "vocab.txt").read_text(encoding="utf-8").splitlines()
    names = {f"{role}_token": name for role, name in tokenizer.names.items()}
    peer = transformers.FunnelTokenizer(vocab={token: i for i, token in enumerate(tokens)}, **names)
    assert_agrees(tokenizer, peer, TEXTS)
    assert_agrees(tokenizer, peer, TEXTS, TEXTS[::-1], 12)


def test_encodings_match_transformers_with_a_real_vocabulary(minilm, tmp_path):
    tokenizer = FunnelTokenizer.load(minilm)
    tokenizer.save_for_transformers(tmp_path)
    peer = load_with_transformers(tmp_path)
    assert_agrees(tokenizer, peer, TEXTS, max_length=128)
    assert_agrees(tokenizer, peer, TEXTS, TEXTS[::-1], 24)


def test_tokenizer_json_and_vocabulary_give_the_same_encodings(vocabulary, tmp_path):
    from_vocabulary = FunnelTokenizer.load(vocabulary)
    folder = tmp_path / "json"
    folder.mkdir()
    from_vocabulary.save(folder)
    assert FunnelTokenizer.load(folder).encode(TEXTS, TEXTS[::-1]) == from_vocabulary.encode(TEXTS, TEXTS[::-1])


def test_cls_has_token_type_2_and_second_text_type_1(vocabulary):
    tokenizer = FunnelTokenizer.load(vocabulary)
    (encoding,) = tokenizer.encode(["good film"], ["not good"])
    assert encoding.token_type_ids == [2, 0, 0, 0, 1, 1, 1]
    assert encoding.input_ids[0] == tokenizer.cls_id


def test_longer_text_of_a_pair_is_truncated_first(vocabulary):
    tokenizer = FunnelTokenizer.load(vocabulary)
    (encoding,) = tokenizer.encode(["a b c d a b c d"], ["a b"], 9)
    assert encoding.token_type_ids == [2, 0, 0, 0, 0, 0, 1, 1, 1]
    assert encoding.full_length == 13
    assert tokenizer.encode(["a b"], ["a b"], 9)[0].full_length == 7


@pytest.mark.parametrize("n_first", [0, 1, 2, 3, 4, 5, 9])
def test_pairs_are_truncated_as_by_the_library(vocabulary, n_first):
    tokenizer = FunnelTokenizer.load(vocabulary)
    library = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    for n_second, max_length in itertools.product((0, 1, 2, 3, 4, 5, 9), range(4, 12)):
        library.enable_truncation(max_length, strategy="longest_first")
        pair = " ".join("a" * n_first), " ".join("b" * n_second)
        expected = library.encode(*pair)
        (encoding,) = tokenizer.encode([pair[0]], [pair[1]], max_length)
        assert encoding == Encoding(expected.ids, expected.type_ids, n_first + n_second + 3)


def test_long_pairs_are_encoded_in_linear_time(vocabulary):
    """The library's own truncation combines all parts that it cuts off: hundreds of millions here."""
    (encoding,) = FunnelTokenizer.load(vocabulary).encode(["a " * 100_000], ["b " * 100_000], 16)
    assert (len(encoding.input_ids), encoding.full_length) == (16, 200_003)


def test_empty_text_is_encoded_as_cls_and_sep(vocabulary):
    tokenizer = FunnelTokenizer.load(vocabulary)
    assert tokenizer.encode([""])[0].input_ids == [tokenizer.cls_id, tokenizer.ids["sep"]]


def test_max_length_without_room_for_text_raises_an_error(vocabulary):
    with pytest.raises(FunnelError, match="invalid max_length 2: expected more than the 2 special tokens"):
        FunnelTokenizer.load(vocabulary).encode(["a"], max_length=2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "no tokenizer"),
        ("tokenizer.json", b"{}", "damaged"),
        ("tokenizer.json", b"\xff\xfe", "damaged"),
        ("vocab.txt", b"a\nb\n", "<pad>"),
        ("vocab.txt", b"\xff\n", "UTF-8"),
        ("vocab.txt", b"", "<pad>"),
        ("vocab.txt", b"a\nb\na\n", "duplicate token 'a'"),
    ],
)
def test_damaged_files_raise_errors_that_name_them(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FunnelError, match=message) as error:
        FunnelTokenizer.load(tmp_path)
    assert str(tmp_path / (name or "")) in str(error.value)


def test_trained_vocabulary_is_reproducible_and_spells_rare_words():
    texts = ["the film was good", "the soup was bad"] * 5 + ["rare"]
    first, second = FunnelTokenizer.train(texts), FunnelTokenizer.train(texts)
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    ids = first.encode(["the rare soup"])[0].input_ids
    assert first.ids["unk"] not in ids
    assert len(ids) == 2 + 2 + len("rare")


# --- WordPiece vocabularies -------------------------------------------------------------------------------------------


def pseudo_words(n, seed=0):
    """Texts of words made of syllables, some more frequent than others."""
    random = np.random.default_rng(seed)
    syllables = np.array([a + b for a in "bdfgklmnprst" for b in "aeiou"])
    words = ["".join(random.choice(syllables, random.integers(1, 5))) for _ in range(500)]
    return [" ".join(random.choice(words, 50, p=1 / np.arange(1, 501) / (1 / np.arange(1, 501)).sum())) for _ in range(n)]


def tokens_of(tokenizer):
    vocabulary = tokenizer.tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def test_word_pieces_are_merged_by_frequency():
    tokenizer = FunnelTokenizer.train_wordpiece(["Ab abc"] * 5 + ["cb\n\ncb ab"] * 3, 100)
    special = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>"]
    # a ##b: 13 times, cb: 6, ab ##c: 5
    assert tokens_of(tokenizer) == [*special, "##b", "##c", "a", "c", "ab", "cb", "abc"]


def test_word_pieces_are_nearly_those_of_the_librarys_trainer():
    """It breaks ties in another order."""
    texts = pseudo_words(200)
    library = Tokenizer(WordPiece(unk_token="<unk>"))
    library.normalizer, library.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    special = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>"]
    library.train_from_iterator(texts, WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    common = set(tokens_of(FunnelTokenizer.train_wordpiece(texts, 400))) & set(library.get_vocab())
    assert len(common) > 380


@pytest.mark.parametrize("vocab_size", [100, 250])
def test_trained_word_pieces_fill_the_vocabulary_and_encode_the_texts(vocab_size, tmp_path):
    texts = pseudo_words(50)
    tokenizer = FunnelTokenizer.train_wordpiece(texts, vocab_size)
    assert tokenizer.vocab_size == len(tokens_of(tokenizer)) == vocab_size
    assert [tokenizer.decode(encoding.input_ids) for encoding in tokenizer.encode(texts)] == texts
    assert tokenizer.ids == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    tokenizer.save(tmp_path)
    assert FunnelTokenizer.load(tmp_path).encode(texts) == tokenizer.encode(texts)


def test_trained_word_pieces_are_the_same_in_every_run():
    texts = pseudo_words(50)
    first, second = (FunnelTokenizer.train_wordpiece(texts, 250).tokenizer.to_str() for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_trained_word_pieces_are_the_same_in_every_process(tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(pseudo_words(50)))
    program = """if True:
        import json, sys
        from funnel.data.tokenizer import FunnelTokenizer
        FunnelTokenizer.train_wordpiece(json.load(open("texts.json")), 250).save(sys.argv[1])
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    commands = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        command = [sys.executable, "-c", program, seed]
        commands.append(subprocess.Popen(command, cwd=tmp_path, env={**environment, "PYTHONHASHSEED": seed}))
    assert [command.wait(120) for command in commands] == [0, 0]
    first, second = ((tmp_path / seed / "tokenizer.json").read_bytes() for seed in ("1", "2"))
    assert first == second


def test_rare_characters_are_unknown():
    texts = ["東 filmé " + "film " * 2600] * 2
    tokenizer = FunnelTokenizer.train_wordpiece(texts, 100)
    assert "e" in tokens_of(FunnelTokenizer.train_wordpiece(["a e film"], 100))
    assert tokenizer.encode(["東 film"])[0].input_ids[1] == tokenizer.ids["unk"]
    assert tokenizer.ids["unk"] not in tokenizer.encode(["film"])[0].input_ids


def test_vocabulary_of_nothing_is_an_error():
    with pytest.raises(FunnelError, match="invalid vocab_size 99: expected at least 100"):
        FunnelTokenizer.train_wordpiece(["a"], 99)
    with pytest.raises(FunnelError, match="the texts contain no words"):
        FunnelTokenizer.train_wordpiece(["", " \n"], 100)


def test_vocabulary_larger_than_the_model_is_rejected(vocabulary):
    tokenizer = FunnelTokenizer.load(vocabulary)
    size = tokenizer.vocab_size
    tokenizer.check_vocab_size(size, "checkpoint")
    with pytest.raises(FunnelError, match=f"checkpoint: .* ids up to {size - 1}, but the model has {size - 1} embeddings"):
        tokenizer.check_vocab_size(size - 1, "checkpoint")


def test_call_pads_to_the_longest_text():
    tokenizer = FunnelTokenizer.train(["a good film"] * 5)
    batch = tokenizer(["a good film", "film"], ["good", "a"])
    long, short = tokenizer.encode(["a good film", "film"], ["good", "a"])
    n = len(short.input_ids)
    assert batch["input_ids"].tolist() == [long.input_ids, short.input_ids + [tokenizer.pad_id] * 2]
    assert batch["attention_mask"].tolist() == [[1] * (n + 2), [1] * n + [0, 0]]
    assert batch["token_type_ids"].tolist() == [long.token_type_ids, [*short.token_type_ids, 0, 0]]


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> FunnelTokenizer:
    return FunnelTokenizer.train(["a good film"] * 5)


class Series:
    """Like a pandas Series: its truth value is ambiguous, and an index need not be a position."""

    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(self.values)

    def __bool__(self):
        raise ValueError("ambiguous")

    def __getitem__(self, _):
        raise KeyError


@pytest.mark.parametrize("convert", [tuple, iter, np.array, Series])
def test_any_iterable_of_strings_is_encoded(convert, trained):
    texts, pairs = ["a good film", "film"], ["good", "a"]
    assert trained.encode(convert(texts), convert(pairs)) == trained.encode(texts, pairs)
    assert trained(convert(texts))["input_ids"].shape == (2, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("film",), "texts has type str: expected a list of strings"),
        ((b"film",), "texts has type bytes"),
        ((None,), "texts has type NoneType"),
        ((3,), "texts has type int"),
        (({"a": 1},), "texts has type dict"),
        ((np.array([["a", "b"]]),), "texts has type ndarray: expected a list of strings or a 1-d array"),
        (([1],), r"texts\[0\] has type int \(1\): expected a string"),
        ((["a", None],), r"texts\[1\] has type NoneType"),
        (([["a", "b"]],), r"texts\[0\] has type list"),
        ((["a"], "b"), "pairs has type str"),
        ((["a"], [2.5]), r"pairs\[0\] has type float"),
        ((["a"], ["b", "c"]), "1 text but 2 second texts: pairs needs one for each text"),
        ((["a"], []), "1 text but 0 second texts"),
    ],
)
def test_other_arguments_are_errors(arguments, message, trained):
    for encode in (trained, trained.encode):
        with pytest.raises(FunnelError, match=message):
            encode(*arguments)


def test_no_texts_have_no_encodings_and_no_batch(trained):
    assert trained.encode([]) == trained.encode([], []) == []
    with pytest.raises(FunnelError, match="texts is empty"):
        trained([])


# --- special tokens ---------------------------------------------------------------------------------------------------


def test_special_tokens_in_texts_can_be_escaped(vocabulary, tmp_path):
    tokenizer = FunnelTokenizer.load(vocabulary)
    sep = tokenizer.names["sep"]
    assert tokenizer.encode([f"film {sep}"])[0].input_ids.count(tokenizer.ids["sep"]) == 2

    out = tmp_path / "out"
    out.mkdir()
    tokenizer.escape_special_tokens().save(out)
    escaped = FunnelTokenizer.load(out)
    assert (escaped.names, escaped.ids) == (tokenizer.names, tokenizer.ids)
    assert escaped.encode([f"film {sep}"])[0].input_ids.count(escaped.ids["sep"]) == 1
    assert escaped.encode(["film not good"], ["film"]) == tokenizer.encode(["film not good"], ["film"])
    assert escaped.decode(escaped.encode(["the film"])[0].input_ids) == "the film"


def test_transformers_escapes_special_tokens_too(vocabulary, tmp_path):
    escaped = FunnelTokenizer.load(vocabulary).escape_special_tokens()
    for name in ("out", "again"):
        (tmp_path / name).mkdir()
    escaped.save_for_transformers(tmp_path / "out")
    peer = load_with_transformers(tmp_path / "out")
    assert_agrees(escaped, peer, TEXTS, TEXTS[::-1])
    peer.save_pretrained(tmp_path / "again")
    assert FunnelTokenizer.load(tmp_path / "again").encode(TEXTS) == escaped.encode(TEXTS)


def test_transformers_adds_no_tokens_and_truncates_identically(vocabulary, tmp_path):
    tokenizer = FunnelTokenizer.load(vocabulary)
    out = tmp_path / "out"
    out.mkdir()
    tokenizer.save_for_transformers(out, max_length=6)
    peer = load_with_transformers(out)
    assert len(peer) == tokenizer.vocab_size
    texts = ["<s> the film </s>", "the film was not good"]
    expected = peer(texts, truncation=True)
    encodings = tokenizer.encode(texts, max_length=6)
    assert [encoding.input_ids for encoding in encodings] == expected["input_ids"]
    assert [encoding.token_type_ids for encoding in encodings] == expected["token_type_ids"]
    tokenizer.save_for_transformers(out)
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 512


def test_transformers_keeps_special_tokens_that_the_vocabulary_has(tmp_path):
    names = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>", "<s>", "</s>", "the", "film"]
    transformers = pytest.importorskip("transformers")
    transformers.FunnelTokenizer(vocab={name: i for i, name in enumerate(names)}).save_pretrained(tmp_path / "saved")
    tokenizer = FunnelTokenizer.load(tmp_path / "saved")
    tokenizer.save_for_transformers(tmp_path)
    assert_agrees(tokenizer, load_with_transformers(tmp_path), ["<s>the film</s>"])
    assert tokenizer.encode(["<s>the film</s>"])[0].input_ids == [2, 5, 7, 8, 6, 3]

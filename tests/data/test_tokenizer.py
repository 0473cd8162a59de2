"""The tokenizer against transformers' FunnelTokenizer on the same vocabularies."""

import pytest
from conftest import shared  # noqa: F401 (the minilm fixture uses it)

from funnel.data.tokenizer import FunnelTokenizer
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
    """A vocabulary with the special names of the hub's Funnels, and one with BERT's."""
    names = ["pad", "unk", "cls", "sep", "mask"]
    special = [f"<{n}>" if request.param == "<>" else f"[{n.upper()}]" for n in names]
    (tmp_path / "vocab.txt").write_text("\n".join(special + WORDS) + "\n", encoding="utf-8")
    return tmp_path


def transformers_twin(folder, **more):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(folder), **more)


def agree(ours, peer, first, second=None, max_length=64):
    """In one call for all texts: called text by text, transformers takes an empty second text for none."""
    found = ours.encode(first, second, max_length)
    expected = peer(first, second, truncation="longest_first", max_length=max_length, return_token_type_ids=True)
    for i, text in enumerate(first):
        assert found[i].input_ids == expected["input_ids"][i], text
        assert found[i].token_type_ids == expected["token_type_ids"][i], text


def test_ids_and_types_are_transformers_for_single_texts_and_pairs(vocabulary, tmp_path):
    ours = FunnelTokenizer.load(vocabulary)
    out = tmp_path / "out"
    out.mkdir()
    ours.save_for_transformers(out)
    peer = transformers_twin(out)
    for max_length in (4, 7, 10, 200):
        agree(ours, peer, TEXTS, max_length=max_length)
        agree(ours, peer, TEXTS, TEXTS[::-1], max_length)
        agree(ours, peer, TEXTS, TEXTS[3:] + TEXTS[:3], max_length)


def test_ids_are_those_of_transformers_own_funnel_tokenizer(vocabulary):
    transformers = pytest.importorskip("transformers")
    ours = FunnelTokenizer.load(vocabulary)
    tokens = (vocabulary / "vocab.txt").read_text(encoding="utf-8").splitlines()
    names = {f"{role}_token": name for role, name in ours.names.items()}
    peer = transformers.FunnelTokenizer(vocab={token: i for i, token in enumerate(tokens)}, **names)
    agree(ours, peer, TEXTS)
    agree(ours, peer, TEXTS, TEXTS[::-1], 12)


def test_real_vocabulary(minilm, tmp_path):
    ours = FunnelTokenizer.load(minilm)
    ours.save_for_transformers(tmp_path)
    peer = transformers_twin(tmp_path)
    agree(ours, peer, TEXTS, max_length=128)
    agree(ours, peer, TEXTS, TEXTS[::-1], 24)


def test_from_tokenizer_json_as_from_the_vocabulary(vocabulary, tmp_path):
    from_vocabulary = FunnelTokenizer.load(vocabulary)
    folder = tmp_path / "json"
    folder.mkdir()
    from_vocabulary.save(folder)
    assert FunnelTokenizer.load(folder).encode(TEXTS, TEXTS[::-1]) == from_vocabulary.encode(TEXTS, TEXTS[::-1])


def test_cls_has_type_2_and_the_second_text_type_1(vocabulary):
    ours = FunnelTokenizer.load(vocabulary)
    (encoding,) = ours.encode(["good film"], ["not good"])
    assert encoding.token_type_ids == [2, 0, 0, 0, 1, 1, 1]
    assert encoding.input_ids[0] == ours.cls_id


def test_the_longer_text_of_a_pair_is_cut_first(vocabulary):
    ours = FunnelTokenizer.load(vocabulary)
    (encoding,) = ours.encode(["a b c d a b c d"], ["a b"], 9)
    assert encoding.token_type_ids == [2, 0, 0, 0, 0, 0, 1, 1, 1]
    assert encoding.cut
    assert not ours.encode(["a b"], ["a b"], 9)[0].cut


def test_an_empty_text_is_cls_and_sep(vocabulary):
    ours = FunnelTokenizer.load(vocabulary)
    assert ours.encode([""])[0].input_ids == [ours.cls_id, ours.ids["sep"]]


def test_too_short_a_limit_is_an_error(vocabulary):
    with pytest.raises(FunnelError, match="--max-length 2"):
        FunnelTokenizer.load(vocabulary).encode(["a"], max_length=2)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, b"", "has no tokenizer"),
        ("tokenizer.json", b"{}", "damaged"),
        ("tokenizer.json", b"\xff\xfe", "damaged"),
        ("vocab.txt", b"a\nb\n", "<pad>"),
        ("vocab.txt", b"\xff\n", "UTF-8"),
        ("vocab.txt", b"", "<pad>"),
    ],
)
def test_damaged_files_are_errors_that_name_them(tmp_path, name, content, words):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FunnelError, match=words) as error:
        FunnelTokenizer.load(tmp_path)
    assert str(tmp_path / (name or "")) in str(error.value)


def test_a_trained_vocabulary_is_the_same_every_time():
    texts = ["the film was good", "the soup was bad"] * 5 + ["rare"]
    first, second = FunnelTokenizer.train(texts), FunnelTokenizer.train(texts)
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    ids = first.encode(["the rare soup"])[0].input_ids
    assert first.ids["unk"] not in ids
    assert len(ids) == 2 + 2 + len("rare")

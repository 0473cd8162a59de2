"""Tokenizers of other families agree with transformers: WordPiece, byte-level BPE and Unigram, trained here or real ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from funnel.data.checks import TextChecks
from funnel.data.files import Example
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError

transformers = pytest.importorskip("transformers", reason="needs the extra test: pip install -e '.[test]'")
transformers.logging.set_verbosity_error()

CORPUS = [
    "the film was good and not bad, but the unaffable cast don't care!",
    "naïve cafés in 東京 😀 cost 12 or 122 € -- that's too much",
    "a gorgeous , witty , seductive movie . it's not bad at all",
] * 20
TEXTS = [
    "The film was good, but unaffable.",
    "",
    " ",
    "  two  spaces \t tab\nnew line\u00a0",
    "naïve NAÏVE cafés CAFE\u0301S",
    "東京 film東京",
    "😀 good😀 🤷🏽\u200d♀️",
    "zero\u200bwidth\x00nul\x07bell\ufeff",
    "a" * 99 + " " + "b" * 100 + " " + "c" * 101,
    "don't-stop...!!! it's n't",
    "[SEP] <s> [CLS] </s> [MASK] <mask> <pad> <unk> [UNK] [PAD]",
    "x <mask> y<mask>z  [MASK] .",
    "＜s＞ ﬁ ½ \u1e9b\u0323 ``quoted''",
    "\u202eright to left\u202c שלום مرحبا",
    "▁ Ġ ## ##good ▁good Ġgood",
    "zqx unknown",
]
# class in transformers: (cls, sep, separators, token types of the models)
KINDS = {
    "BertTokenizer": ("[CLS]", "[SEP]", 1, 2),  # also of ELECTRA
    "DistilBertTokenizer": ("[CLS]", "[SEP]", 1, 0),
    "MPNetTokenizer": ("<s>", "</s>", 2, 0),
    "RobertaTokenizer": ("<s>", "</s>", 2, 1),
    "AlbertTokenizer": ("[CLS]", "[SEP]", 1, 2),
    "XLMRobertaTokenizer": ("<s>", "</s>", 2, 1),
    "CamembertTokenizer": ("<s>", "</s>", 2, 1),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory) -> Path:
    """A small tokenizer of each kind, as transformers saves it."""
    folder = tmp_path_factory.mktemp(kind)
    getattr(transformers, kind)().train_new_from_iterator(CORPUS, vocab_size=400).save_pretrained(folder)
    return folder


def assert_same_ids(tokenizer: FunnelTokenizer, peer, texts, pairs=None, max_length=512):
    """All texts in one call: called text by text, transformers treats an empty second text as missing."""
    expected = peer(texts, pairs, truncation="longest_first", max_length=max_length)["input_ids"]
    ids = [encoding.input_ids for encoding in tokenizer.encode(texts, pairs, max_length)]
    for text, found, wanted in zip(texts, ids, expected, strict=True):
        assert found == wanted, text


def assert_agrees(tokenizer: FunnelTokenizer, peer, texts):
    for max_length in (6, 13, 512):
        assert_same_ids(tokenizer, peer, texts, None, max_length)
        assert_same_ids(tokenizer, peer, texts, texts[::-1], max_length)
        assert_same_ids(tokenizer, peer, texts, texts[5:] + texts[:5], max_length)


def real_texts(task: str, columns: list[int]) -> list[list[str]]:
    lines = shared(f"data/glue/{task}").read_text(encoding="utf-8").splitlines()[1:1001]
    return [[line.split("\t")[column] for line in lines] for column in columns]


# --- ids and token types ----------------------------------------------------------------------------------------------


def test_ids_equal_those_of_transformers(folder):
    assert_agrees(FunnelTokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder), TEXTS)


def test_ids_of_real_texts_equal_those_of_transformers(folder):
    tokenizer, peer = FunnelTokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    (texts,) = real_texts("SST-2/train.tsv", [0])
    first, second = real_texts("RTE/dev.tsv", [1, 2])
    for max_length in (32, 512):
        assert_same_ids(tokenizer, peer, texts, None, max_length)
        assert_same_ids(tokenizer, peer, first, second, max_length)


@pytest.mark.parametrize("name", ["minilm", pytest.param("mpnet", marks=pytest.mark.slow)])
def test_ids_of_real_tokenizers_equal_those_of_transformers(name, request, tmp_path):
    folder = request.getfixturevalue(name)
    tokenizer, peer = FunnelTokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert_agrees(tokenizer, peer, TEXTS)
    assert_same_ids(tokenizer, peer, *real_texts("SST-2/train.tsv", [0]))
    assert_same_ids(tokenizer, peer, *real_texts("RTE/dev.tsv", [1, 2]), 64)
    for file in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    assert_agrees(FunnelTokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path), TEXTS)


def test_token_types_equal_those_of_berts_tokenizer_except_for_cls(tmp_path):
    transformers.BertTokenizer().train_new_from_iterator(CORPUS, vocab_size=400).save_pretrained(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for pairs in (None, TEXTS[::-1]):
        for max_length in (8, 512):
            expected = peer(TEXTS, pairs, truncation="longest_first", max_length=max_length)["token_type_ids"]
            types = [encoding.token_type_ids for encoding in FunnelTokenizer.load(tmp_path).encode(TEXTS, pairs, max_length)]
            assert [row[0] for row in types] == [2] * len(TEXTS)
            assert [[0, *row[1:]] for row in types] == expected


def test_token_types_of_pairs_are_those_of_the_post_processor(folder, kind):
    """As transformers' RoBERTa, XLM-R and MPNet models see them; BERT-like ones have type 1 in the second text."""
    cls, sep, separators, _ = KINDS[kind]
    second_type = 2 - separators
    tokenizer = FunnelTokenizer.load(folder)
    (encoding,) = tokenizer.encode(["film"], ["good"])
    names = [tokenizer.tokenizer.id_to_token(token_id) for token_id in encoding.input_ids]
    n = names.index(sep)
    assert names[0] == cls
    assert names[n : n + separators] == [sep] * separators
    assert names[-1] == sep
    assert encoding.token_type_ids == [2] + [0] * (n - 1 + separators) + [second_type] * (len(names) - n - separators)


def test_vocabulary_like_mpnets_gives_the_ids_of_its_tokenizer(tmp_path):
    """It contains BERT's special tokens as ordinary words."""
    tokens = "<s> <pad> </s> <unk> [PAD] [UNK] [CLS] [SEP] [MASK] the film good [ ] < > s pad cls sep <mask>".split()
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    peer = transformers.MPNetTokenizer(vocab={token: i for i, token in enumerate(tokens)})
    assert_agrees(
        FunnelTokenizer.load(tmp_path), peer, ["the film", "", "[SEP] <s> the [CLS] film </s>", "bad", "<pad>", "[PAD]"]
    )


def test_cls_of_a_vocabulary_like_funnels_is_not_its_bos_token(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join("<pad> <unk> <cls> <sep> <mask> <s> </s> the film".split()))
    tokenizer = FunnelTokenizer.load(tmp_path)
    assert (tokenizer.names["cls"], tokenizer.names["sep"], tokenizer.separators) == ("<cls>", "<sep>", 1)


# --- special tokens ---------------------------------------------------------------------------------------------------


def test_saved_tokenizers_have_the_same_roles_and_ids(folder, kind, tmp_path):
    tokenizer = FunnelTokenizer.load(folder)
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.names == {role: getattr(peer, f"{role}_token") for role in tokenizer.names}
    assert len(tokenizer.names) == 5
    assert (tokenizer.names["cls"], tokenizer.names["sep"], tokenizer.separators) == KINDS[kind][:3]
    tokenizer.save(tmp_path)
    saved = FunnelTokenizer.load(tmp_path)
    assert (saved.names, saved.ids, saved.separators) == (tokenizer.names, tokenizer.ids, tokenizer.separators)
    assert saved.encode(TEXTS, TEXTS[::-1], 20) == tokenizer.encode(TEXTS, TEXTS[::-1], 20)


def make_tokenizer(*special: str, post_processor=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(special_tokens=["?", *special], show_progress=False))
    tokenizer.post_processor = post_processor
    return tokenizer


def test_names_of_tokenizer_config_are_kept_when_saving(tmp_path):
    make_tokenizer("PADDING", "BEGIN", "END", "HIDDEN", "<pad>", "[CLS]", "[SEP]").save(str(tmp_path / "tokenizer.json"))
    names = {"pad_token": "PADDING", "cls_token": {"content": "BEGIN"}, "mask_token": "HIDDEN"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"sep_token": "END", "pad_token": "<pad>"}))
    tokenizer = FunnelTokenizer.load(tmp_path)
    assert tokenizer.names == {"pad": "PADDING", "unk": "?", "cls": "BEGIN", "sep": "END", "mask": "HIDDEN"}
    (tmp_path / "out").mkdir()
    tokenizer.escape_special_tokens().save(tmp_path / "out")
    assert FunnelTokenizer.load(tmp_path / "out").names == tokenizer.names


def test_post_processor_decides_over_tokenizer_config():
    post_processor = processors.BertProcessing(("END", 3), ("BEGIN", 2))
    tokenizer = make_tokenizer("<pad>", "BEGIN", "END", "[CLS]", "[SEP]", post_processor=post_processor)
    assert FunnelTokenizer(tokenizer, declared={"cls": "[CLS]", "sep": "[SEP]"}).names["cls"] == "BEGIN"


def test_tokenizers_without_mask_and_unknown_token_are_accepted():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(special_tokens=["<s>", "</s>", "<pad>"], show_progress=False))
    ours = FunnelTokenizer(tokenizer)
    assert ours.ids == {"pad": 2, "cls": 0, "sep": 1}
    checks = TextChecks(ours)
    ids = [ours.encode([text])[0].input_ids for text in ("zqx", "<s> film")]
    checks.update(
        [Example("zqx", None, 0, 1), Example("<s> film", None, 0, 2)], np.concatenate(ids), np.array([0, len(ids[0])])
    )
    assert checks.counts == {"unknown": 0, "special": 1}
    assert checks.warnings()[0].startswith("1 text with a special token inside (<s>, </s>, <pad>)")


def test_second_separator_is_not_reported_as_a_special_token_in_the_text(folder):
    checks = TextChecks(FunnelTokenizer.load(folder))
    ids = checks.tokenizer.encode(["film"], ["good"])[0].input_ids
    checks.update([Example("film", "good", 0, 1)], np.array(ids), np.array([0]))
    assert checks.counts["special"] == 0


@pytest.mark.parametrize("inner", ["bert", "roberta", "template"])
def test_post_processor_inside_a_sequence_is_found(inner):
    cls, sep = ("<s>", 2), ("</s>", 3)
    post_processor = {
        "bert": processors.BertProcessing(sep, cls),
        "roberta": processors.RobertaProcessing(sep, cls),
        "template": processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B:1 </s>:1", [cls, sep]),
    }[inner]
    sequence = processors.Sequence([processors.ByteLevel(), post_processor])
    library = make_tokenizer("<pad>", "<s>", "</s>", post_processor=sequence)
    tokenizer = FunnelTokenizer(Tokenizer.from_str(library.to_str()))
    for text, pair in zip(TEXTS, TEXTS[::-1], strict=True):
        assert tokenizer.encode([text])[0].input_ids == library.encode(text).ids
        assert tokenizer.encode([text], [pair])[0].input_ids == library.encode(text, pair).ids


@pytest.mark.parametrize(
    ("single", "pair"),
    [
        ("$A </s>", "$A </s> $B </s>"),
        ("<s> $A", "<s> $A $B"),
        ("<s> $A </s>", "$A $B"),
        ("<s> $A </s>", "<s> $A </s> <s> $B </s>"),
        ("<s> $A </s>", "<s> $A </s> </s> </s> $B </s>"),
        ("<s> $A </s>", "<s> $B </s> $A </s>"),
        ("<s> <s> $A </s>", "<s> <s> $A </s> $B </s>"),
    ],
)
def test_other_templates_are_refused(single, pair):
    template = processors.TemplateProcessing(single, pair, [("<s>", 2), ("</s>", 3)])
    with pytest.raises(FunnelError, match=r"x: unsupported special tokens \(.*\); expected \[CLS\] A \[SEP\] for a text"):
        FunnelTokenizer(make_tokenizer("<pad>", "<s>", "</s>", post_processor=template), "x")


def test_post_processor_with_ids_outside_the_vocabulary_is_refused():
    post_processor = processors.BertProcessing(("</s>", 3), ("<s>", 99_999))
    with pytest.raises(FunnelError, match="x: the post-processor adds id 99999, which is not in the vocabulary"):
        FunnelTokenizer(make_tokenizer("<pad>", "<s>", "</s>", post_processor=post_processor), "x")


@pytest.mark.parametrize("name", ["a b", "a:b", "$A"])
def test_names_that_a_template_cannot_contain_are_refused(name):
    post_processor = processors.BertProcessing(("</s>", 3), (name, 2))
    with pytest.raises(FunnelError, match=r"x: unsupported cls_token .*: it contains a space, ':' or '\$'"):
        FunnelTokenizer(make_tokenizer("<pad>", name, "</s>", post_processor=post_processor), "x")


def test_unknown_token_of_the_model_must_be_in_the_vocabulary():
    tokenizer = Tokenizer(models.WordPiece({"<pad>": 0, "<cls>": 1, "<sep>": 2, "<unk>": 3}, unk_token="[UNK]"))
    with pytest.raises(FunnelError, match=r"the vocabulary has no \[UNK\], which the tokenizer needs for unknown words"):
        FunnelTokenizer(tokenizer)


@pytest.mark.parametrize("name", ["vocab.json", "spiece.model", "sentencepiece.bpe.model"])
def test_other_vocabulary_files_alone_raise_an_error_with_advice(name, tmp_path):
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(FunnelError, match=rf"{name} cannot be read; .*AutoTokenizer\.from_pretrained\(.*\)\.save_pretrained"):
        FunnelTokenizer.load(tmp_path)


def test_escaped_special_tokens_are_ordinary_text(folder, tmp_path):
    tokenizer = FunnelTokenizer.load(folder)
    special = [token.content for token in tokenizer.tokenizer.get_added_tokens_decoder().values()]
    texts = [f"film {name} good{name}" for name in special] + [" ".join(special), "".join(special), "＜s＞"]
    escaped = tokenizer.escape_special_tokens()
    assert escaped.escape_special_tokens() is escaped
    assert (escaped.names, escaped.ids, escaped.separators) == (tokenizer.names, tokenizer.ids, tokenizer.separators)
    special_ids = {tokenizer.tokenizer.token_to_id(name) for name in special} - {tokenizer.ids["unk"]}
    for encoding in escaped.encode(texts):
        assert not special_ids.intersection(encoding.input_ids[1:-1])
    plain = [text for text in TEXTS if not set("<[＜").intersection(text)]
    assert escaped.encode(plain) == tokenizer.encode(plain)

    for name in ("saved", "exported"):
        (tmp_path / name).mkdir()
    escaped.save(tmp_path / "saved")
    assert FunnelTokenizer.load(tmp_path / "saved").encode(texts + TEXTS) == escaped.encode(texts + TEXTS)
    escaped.save_for_transformers(tmp_path / "exported")
    assert_agrees(escaped, transformers.AutoTokenizer.from_pretrained(tmp_path / "exported"), texts + TEXTS)


# --- exports ----------------------------------------------------------------------------------------------------------


def test_exported_tokenizers_equal_the_original(folder, kind, tmp_path):
    n_types = KINDS[kind][3]
    tokenizer, original = FunnelTokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.save_for_transformers(tmp_path, 20, n_types)
    getattr(transformers, kind.replace("Tokenizer", "Config"))().save_pretrained(tmp_path)  # as next to a model
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(exported) is transformers.PreTrainedTokenizerFast
    assert exported.model_max_length == 20
    assert exported.get_vocab() == original.get_vocab()
    for role in tokenizer.names:
        assert getattr(exported, f"{role}_token_id") == getattr(original, f"{role}_token_id")
    for pairs in (None, TEXTS[::-1]):
        expected = original(TEXTS, pairs, truncation=True, max_length=20, return_token_type_ids=True)
        found = exported(TEXTS, pairs, truncation=True, return_token_type_ids=True)
        assert found["input_ids"] == expected["input_ids"]
        types = expected["token_type_ids"] if n_types > 1 else [[0] * len(row) for row in expected["input_ids"]]
        assert found["token_type_ids"] == types
    assert ("token_type_ids" in exported(TEXTS)) == (n_types > 1)
    reloaded = FunnelTokenizer.load(tmp_path)
    assert (reloaded.names, reloaded.separators) == (tokenizer.names, tokenizer.separators)
    rows = zip(reloaded.encode(TEXTS, TEXTS[::-1]), tokenizer.encode(TEXTS, TEXTS[::-1]), strict=True)
    assert all(found.input_ids == expected.input_ids for found, expected in rows)


def test_exported_funnel_tokenizers_have_funnels_token_types(folder, tmp_path):
    tokenizer = FunnelTokenizer.load(folder)
    tokenizer.save_for_transformers(tmp_path)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)(TEXTS, TEXTS[::-1])
    assert found["token_type_ids"] == [encoding.token_type_ids for encoding in tokenizer.encode(TEXTS, TEXTS[::-1])]


# --- text of tokens ---------------------------------------------------------------------------------------------------


def test_decode_returns_the_texts_without_special_tokens(folder):
    tokenizer = FunnelTokenizer.load(folder)
    text, pair = "the film was good", "and not bad"
    assert tokenizer.decode(tokenizer.encode([text])[0].input_ids) == text
    assert tokenizer.decode(tokenizer.encode([text], [pair])[0].input_ids) == f"{text} | {pair}"


def test_token_texts_have_no_markers_and_join_to_the_text(folder, kind):
    cls, sep, separators, _ = KINDS[kind]
    tokenizer = FunnelTokenizer.load(folder)
    ids = tokenizer.encode(["the zqxgood film"], ["good unaffable"])[0].input_ids
    ids = [token_id for token_id in ids if token_id != tokenizer.ids["unk"]]
    texts = tokenizer.token_texts(ids)
    assert len(texts) == len(ids)
    assert texts[0] == f" {cls}"
    assert not set("Ġ▁#").intersection("".join(texts))
    assert "".join(texts).endswith(f"{f' {sep}' * separators} good unaffable {sep}")
    assert "".join(texts).startswith(f" {cls} the ")
    if tokenizer.tokenizer.token_to_id("▁") is not None:  # a marker alone, at the beginning of a text
        assert tokenizer.token_texts([tokenizer.cls_id, tokenizer.tokenizer.token_to_id("▁")]) == [f" {cls}", " "]


def test_tokens_that_are_parts_of_characters_are_shown_as_replacement_characters(tmp_path):
    transformers.RobertaTokenizer().train_new_from_iterator(["a b c"], vocab_size=300).save_pretrained(tmp_path)
    tokenizer = FunnelTokenizer.load(tmp_path)
    assert tokenizer.token_texts(tokenizer.encode(["a é"])[0].input_ids) == [" <s>", " a", " ", "\ufffd", "é", " </s>"]

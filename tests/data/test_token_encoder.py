"""Words to tokens: labels on the first token of each word, with every kind of tokenizer, and windows of long sentences."""

import itertools

import numpy as np
import pytest

from funnel.data.dataset import IGNORED
from funnel.data.encoding import encode_examples, encode_in_memory
from funnel.data.tagged import InMemorySentences, TaggedFile
from funnel.data.token_encoder import TokenEncoder, assign_tokens, labeled_tokens, split_windows
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError

transformers = pytest.importorskip("transformers", reason="needs the extra test: pip install -e '.[test]'")
transformers.logging.set_verbosity_error()

CORPUS = ["the film was good and not bad, but the unaffable cast don't care!", "naïve cafés in 東京 😀 cost 12 €"] * 20
KINDS = ("BertTokenizer", "RobertaTokenizer", "AlbertTokenizer", "XLMRobertaTokenizer", "MPNetTokenizer")
SENTENCES = [
    ["The", "film", ",", "unaffable", "!"],
    ["\x07", "good", "\u200b", "\u00a0", "\ufeff"],
    ["naïve", "cafés", "東京", "😀", "🤷🏽\u200d♀️", "don't"],
    ["not bad", " ", "[SEP]", "<mask>", "▁", "Ġ", "##good"],
    [],
    ["x" * 150, "good"],
]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory) -> FunnelTokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    getattr(transformers, request.param)().train_new_from_iterator(CORPUS, vocab_size=400).save_pretrained(folder)
    return FunnelTokenizer.load(folder)


def first_tokens(tokenizer: FunnelTokenizer, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
    (encoding,) = tokenizer.encode_with_offsets([" ".join(words)])
    return assign_tokens(words, *encoding, tokenizer.ids["unk"])


@pytest.mark.parametrize("max_length", [3, 4, 5, 8, 13, 512])
def test_every_word_is_labeled_once_in_order_whatever_the_tokenizer(tokenizer, max_length):
    dataset = encode_in_memory(InMemorySentences(SENTENCES), TokenEncoder(None), tokenizer, max_length)
    words = labeled_tokens(dataset)
    assert words.sentences.tolist() == [i for i, sentence in enumerate(SENTENCES) for _ in sentence]
    assert dataset.longest <= max_length
    assert (np.diff(words.rows * 10_000 + words.columns) > 0).all()
    assert dataset.rows.examples.tolist() == sorted(dataset.rows.examples.tolist())
    for row in range(len(dataset)):
        assert dataset.input_ids(row)[0] == tokenizer.cls_id
        assert dataset.input_ids(row)[-1] == tokenizer.ids["sep"]


def test_a_sentence_has_the_tokens_of_its_words_joined_by_spaces(tokenizer):
    for words in (["the", "film", ",", "not", "bad", "!"], CORPUS[0].split()):
        tokens, firsts = first_tokens(tokenizer, words)
        assert tokens.tolist() == tokenizer.encode_plain([" ".join(words)])[0]
        ends = [*firsts[1:], len(tokens)]
        texts = [tokenizer.decode(tokens[start:end].tolist()) for start, end in zip(firsts, ends, strict=True)]
        assert ["".join(text.split()) for text in texts] == words


def test_word_pieces_are_assigned_as_in_transformers(tmp_path):
    transformers.BertTokenizer().train_new_from_iterator(CORPUS, vocab_size=400).save_pretrained(tmp_path)
    peer, tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path), FunnelTokenizer.load(tmp_path)
    for words in (SENTENCES[0], SENTENCES[2], CORPUS[0].split(), SENTENCES[5]):
        expected = peer(words, is_split_into_words=True, add_special_tokens=False)
        tokens, firsts = first_tokens(tokenizer, words)
        assert tokens.tolist() == expected["input_ids"]
        assert firsts.tolist() == [expected.word_ids().index(i) for i in range(len(words))]


def test_a_word_without_a_token_gets_the_unknown_token():
    tokens, firsts = assign_tokens(["a", "\x07", "b", "\x00"], [5, 6], [(0, 1), (4, 5)], unknown=1)
    assert tokens.tolist() == [5, 1, 6, 1]
    assert firsts.tolist() == [0, 1, 2, 3]


def test_a_token_of_only_a_space_belongs_to_the_next_word():
    tokens, firsts = assign_tokens(["a", "b"], [5, 6, 7], [(0, 1), (1, 2), (2, 3)], unknown=1)
    assert tokens.tolist() == [5, 6, 7]
    assert firsts.tolist() == [0, 1]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 9, 10, 11, 25, 40])
def test_windows_cover_all_tokens_and_label_each_word_where_it_is_farthest_from_a_cut(size, n_tokens):
    firsts = np.flatnonzero(np.random.default_rng(n_tokens).random(n_tokens) < 0.7)
    windows = split_windows(n_tokens, firsts, size)
    assert (windows[0][0], windows[-1][1]) == (0, n_tokens)
    assert all(end - start <= size for start, end, _ in windows)
    for (start, end, _), (following, _, _) in itertools.pairwise(windows):
        assert start < following <= end
        assert end - following >= size // 2
    assert np.concatenate([words for _, _, words in windows]).tolist() == list(range(len(firsts)))

    def distance(start: int, end: int, token: int) -> int:
        if not start <= token < end:
            return -1
        to_cuts = [token - start] * (start > 0) + [end - 1 - token] * (end < n_tokens)
        return min(to_cuts, default=n_tokens)

    for start, end, words in windows:
        for token in firsts[words]:
            assert distance(start, end, token) == max(distance(a, b, token) for a, b, _ in windows) >= 0


def test_labels_are_on_first_tokens_and_read_from_the_cache(tmp_path):
    (tmp_path / "x.conll").write_text("good\tB-x\nfilm\tO\n\nunaffable\tI-x\n")
    tokenizer = FunnelTokenizer.train(["good film a b f l n u e"] * 5)
    encoder = TokenEncoder({"O": 0, "B-x": 1, "I-x": 2})
    for _ in range(2):  # the second time from the cache
        dataset = encode_examples(TaggedFile(tmp_path / "x.conll"), encoder, tokenizer, 6)
        assert labeled_tokens(dataset).labels.tolist() == [1, 0, 2]
        assert dataset.unit == "window"
        batch = dataset.batch(np.array([0]))
        assert batch.labels.tolist() == [[IGNORED, 1, 0, IGNORED]]
        assert batch.inputs["token_type_ids"].tolist() == [[2, 0, 0, 0]]


def test_an_unknown_tag_is_an_error_with_file_and_line(tmp_path):
    (tmp_path / "x.conll").write_text("a\tO\n\nb\tb-x\n")
    encoder, tokenizer = TokenEncoder({"O": 0, "B-x": 1}), FunnelTokenizer.train(["a b"] * 5)
    with pytest.raises(FunnelError, match=r"x.conll, line 3: unknown label 'b-x'; the labels are O, B-x; only case"):
        encode_in_memory(TaggedFile(tmp_path / "x.conll"), encoder, tokenizer, 6)
    with pytest.raises(FunnelError, match="invalid max_length 2"):
        encode_in_memory(InMemorySentences([["a"]]), TokenEncoder(None), tokenizer, 2)


def test_the_windows_of_a_sentence_stay_together_in_a_split():
    tokenizer = FunnelTokenizer.train(["a b c d"] * 5)
    dataset = encode_in_memory(InMemorySentences([["a"] * n for n in range(1, 21)]), TokenEncoder(None), tokenizer, 8)
    train, dev = dataset.split(0.3, seed=0)
    assert not set(train.rows.examples) & set(dev.rows.examples)
    assert len(labeled_tokens(train).rows) + len(labeled_tokens(dev).rows) == 210

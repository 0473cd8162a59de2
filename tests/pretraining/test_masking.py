"""Masks: how many, where, what replaces the tokens, and whole words; against loops over rows and binomial bounds."""

import itertools

import numpy as np
import pytest
from scipy import stats
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.pretraining.masking import Masker, Masking, choose_words, continues_word, first_tokens

WORDS = "<pad> <unk> <cls> <sep> <mask> the film was un ##aff ##able good [unused0] , a b c d e f g h i j".split()
TEXTS = ["the unaffable film was good", "another filmgoer was unaffected by the goodness of unaffable films"] * 20
ALPHA = 1e-6  # of a false alarm, if numpy's random stream changed


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return FunnelTokenizer.load(folder)


def make_rows(lengths, width, seed=0):
    """[CLS] random words [SEP], padded; every tenth word is the [SEP] or [MASK] of a text that contains its name."""
    random = np.random.default_rng(seed)
    ids = np.zeros((len(lengths), width), np.int64)
    for row, length in zip(ids, lengths, strict=True):
        words = random.integers(5, len(WORDS), length)
        words[random.random(length) < 0.1] = random.choice([3, 4])
        row[: length + 2] = [2, *words, 3]
    return ids


@pytest.mark.parametrize("masking", [Masking(), Masking(0.4, 0.8, 0.1), Masking(0.3, whole_words=True)])
def test_masks_only_words_and_records_where(masking, tokenizer):
    ids = make_rows([1, 2, 5, 20, 30] * 20, 32)
    masked, positions, is_used = Masker(tokenizer, masking)(ids, 12, np.random.default_rng(0))
    for row, new, where, used in zip(ids, masked, positions, is_used, strict=True):
        chosen = where[used]
        assert list(chosen) == sorted(set(chosen))
        assert not set(row[chosen]) & {0, 2, 3, 4}
        assert (where[~used] == 0).all()
        assert list(used) == sorted(used, reverse=True)
        unchanged = np.setdiff1d(np.arange(32), chosen)
        assert (row[unchanged] == new[unchanged]).all()


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_number_of_masks_is_the_share_of_the_words_at_least_one_at_most_the_slots(share, tokenizer):
    ids = make_rows(list(range(1, 60)), 64)
    _, _, is_used = Masker(tokenizer, Masking(share))(ids, 20, np.random.default_rng(0))
    for row, used in zip(ids, is_used, strict=True):
        words = sum(token_id not in (0, 2, 3, 4) for token_id in row)
        assert used.sum() == min(words, 20, max(1, int(share * words + 0.5)))


def test_every_word_is_masked_equally_often(tokenizer):
    ids = np.tile(np.array([2, *range(5, 24), 3, 0, 0]), (20_000, 1))
    _, positions, is_used = Masker(tokenizer, Masking())(ids, 3, np.random.default_rng(0))
    counts = np.bincount(positions[is_used], minlength=23)
    assert counts[[0, 20, 21, 22]].sum() == 0
    assert is_used.all()
    assert stats.chisquare(counts[1:20]).pvalue > ALPHA


def test_shares_of_masks_random_and_unchanged_tokens(tokenizer):
    ids = np.tile(np.array([2, *[6] * 20, 3]), (20_000, 1))
    masked, positions, is_used = Masker(tokenizer, Masking(0.15, 0.8, 0.1))(ids, 3, np.random.default_rng(1))
    assert is_used.all()
    new = np.take_along_axis(masked, positions, 1).ravel()
    ordinary = [WORDS.index(word) for word in WORDS if not word.startswith("<")]
    others = [token_id for token_id in ordinary if token_id != 6]
    expected = {4: 0.8, 6: 0.1 + 0.1 / len(ordinary), **dict.fromkeys(others, 0.1 / len(ordinary))}
    assert set(new) == set(expected)
    counts = np.bincount(new, minlength=len(WORDS))
    observed = [counts[token_id] for token_id in expected]
    assert stats.chisquare(observed, np.array(list(expected.values())) * len(new)).pvalue > ALPHA


def test_by_default_15_percent_of_the_chosen_tokens_stay(tokenizer):
    ids = np.tile(np.array([2, *[6] * 20, 3]), (20_000, 1))
    masked, positions, _ = Masker(tokenizer, Masking())(ids, 3, np.random.default_rng(1))
    new = np.take_along_axis(masked, positions, 1).ravel()
    assert set(new) == {4, 6}
    assert stats.binomtest(int((new == 6).sum()), len(new), 0.15).pvalue > ALPHA


def test_masks_depend_on_the_generator_only(tokenizer):
    ids, masker = make_rows([20] * 30, 24), Masker(tokenizer, Masking())
    first, again, other = (masker(ids, 4, np.random.default_rng(seed)).ids for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


# --- whole words ------------------------------------------------------------------------------------------------------


def choose_words_of_a_row(candidates, continues, scores, count):
    """The words of one row in order of their score, chosen one by one."""
    words = []
    for i in np.flatnonzero(candidates):
        if words and words[-1][-1] == i - 1 and continues[i]:
            words[-1].append(i)
        else:
            words.append([i])
    words.sort(key=lambda word: scores[word[0]])
    chosen, is_full = [], False
    for word in words:
        is_full |= len(chosen) + len(word) > count
        if not is_full or (len(word) == 1 and len(chosen) < count):
            chosen += word
    return sorted(chosen or (words[0][:count] if words else []))


@pytest.mark.parametrize("continuing", [0.1, 0.4, 0.9])
def test_whole_words_are_those_of_a_loop_over_words(continuing):
    random = np.random.default_rng(0)
    candidates, continues = random.random((300, 30)) < 0.9, random.random((300, 30)) < continuing
    scores = random.random((300, 30))
    counts = np.minimum(candidates.sum(1), random.integers(1, 9, 300))
    chosen = choose_words(candidates, first_tokens(candidates, continues), scores, counts)
    for row in range(300):
        expected = choose_words_of_a_row(candidates[row], continues[row], scores[row], counts[row])
        assert np.flatnonzero(chosen[row]).tolist() == expected


def test_words_are_masked_whole_and_close_to_the_share(tokenizer):
    un = WORDS.index("un")
    ids = np.array([[2, *[5, 6, un, un + 1, un + 2, 7] * 10, 3]] * 200)
    _, positions, is_used = Masker(tokenizer, Masking(whole_words=True))(ids, 9, np.random.default_rng(0))
    assert (is_used.sum(1) == 9).all()
    assert (np.take_along_axis(ids, positions, 1) == un).any()
    for row in positions:
        for position in row:
            k = ids[0, position] - un
            if 0 <= k <= 2:
                assert set(range(position - k, position - k + 3)) <= set(row)


def byte_level_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer, trainers.UnigramTrainer


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer


@pytest.mark.parametrize("kind", [wordpiece, byte_level_bpe, unigram])
def test_tokens_that_continue_a_word_are_those_of_the_pre_tokenizer(kind):
    library, trainer = kind()
    special = {"unk_token": "<unk>"} if trainer is trainers.UnigramTrainer else {}
    names = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>"]
    library.train_from_iterator(TEXTS, trainer(vocab_size=70, special_tokens=names, show_progress=False, **special))
    continues = continues_word(FunnelTokenizer(library))
    for text in ("the unfilmed goods", "a therms wasteful affable anode", "thes fimil thet wath"):
        encoding = library.encode(text, add_special_tokens=False)
        expected = [a == b for a, b in itertools.pairwise(encoding.word_ids)]
        assert any(expected)
        assert not all(expected)
        assert continues[encoding.ids[1:]].tolist() == expected


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0}, "invalid share 0: expected"),
        ({"share": 1}, "invalid share 1"),
        ({"mask_token": 1.5}, "invalid mask_token 1.5"),
        ({"random_token": -0.1}, "invalid random_token -0.1"),
        ({"mask_token": 0.9, "random_token": 0.2}, "mask_token 0.9 and random_token 0.2 add up to more than 1"),
    ],
)
def test_invalid_shares_are_errors(values, message):
    with pytest.raises(FunnelError, match=message):
        Masking(**values)


def test_tokenizer_without_mask_is_an_error(tmp_path):
    (tmp_path / "vocab.txt").write_text("<pad>\n<unk>\n<cls>\n<sep>\na\n")
    with pytest.raises(FunnelError, match=r"vocab.txt: no mask token"):
        Masker(FunnelTokenizer.load(tmp_path), Masking())


def test_tokenizer_without_word_marks_is_an_error_for_whole_words():
    names = {name: i for i, name in enumerate(["<pad>", "<unk>", "<cls>", "<sep>", "<mask>", "a"])}
    tokenizer = FunnelTokenizer(Tokenizer(models.BPE(names, [], unk_token="<unk>")))
    assert Masker(tokenizer, Masking()).ordinary.tolist() == [5]
    with pytest.raises(FunnelError, match="does not mark where words begin"):
        Masker(tokenizer, Masking(whole_words=True))

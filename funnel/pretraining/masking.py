"""Masks tokens for ELECTRA and masked language modeling.

The masks are a function of the tokens and a random generator.

Shapes: b rows, l tokens, m slots for masked tokens, v tokens of the vocabulary.
"""

import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError


@dataclass(frozen=True)
class Masking:
    """How many tokens are masked, and what they are replaced with.

    The defaults are those of ELECTRA (google-research/electra, which keeps 15 % of the chosen tokens); BERT and the Funnel
    authors' code use 0.8 and 0.1.

    Attributes:
        share: of a row's tokens, [CLS] and [SEP] aside.
        mask_token, random_token: shares of the chosen tokens that become [MASK], or a random token; the others stay.
        whole_words: mask all tokens of a word together.

    Raises:
        FunnelError: a share is out of range.
    """

    share: float = 0.15
    mask_token: float = 0.85
    random_token: float = 0.0
    whole_words: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise FunnelError(f"invalid share {self.share}: expected a number in (0, 1)", "share")
        for name in ("mask_token", "random_token"):
            if not 0 <= getattr(self, name) <= 1:
                raise FunnelError(f"invalid {name} {getattr(self, name)}: expected a number in [0, 1]", name)
        if self.mask_token + self.random_token > 1 + 1e-9:
            message = f"mask_token {self.mask_token} and random_token {self.random_token} add up to more than 1"
            raise FunnelError(message, "mask_token")

    def counts(self, candidates: np.ndarray) -> np.ndarray:
        """How many tokens to mask in rows with the given numbers of candidates."""
        return np.minimum(candidates, np.maximum(1, np.floor(self.share * candidates + 0.5).astype(np.int64)))


class MaskedTokens(NamedTuple):
    """Masked rows.

    Attributes:
        ids: [b, l], the tokens with masks.
        positions: [b, m], int64, where the masked tokens are, in ascending order; 0 in unused slots, which come last.
        is_used: [b, m], bool, which slots are used.
    """

    ids: np.ndarray
    positions: np.ndarray
    is_used: np.ndarray


def special_tokens(tokenizer: FunnelTokenizer) -> np.ndarray:
    """Which tokens of the vocabulary are padding, [CLS], [SEP] or [MASK]; unknown tokens are like words. [v], bool"""
    is_special = np.zeros(1 + max(tokenizer.tokenizer.get_vocab(with_added_tokens=True).values()), bool)
    is_special[[token_id for role, token_id in tokenizer.ids.items() if role != "unk"]] = True
    return is_special


def continues_word(tokenizer: FunnelTokenizer) -> np.ndarray:
    """Which tokens belong to the same word as the token before. [v], bool

    WordPiece marks them ("##"). Byte-level BPE and SentencePiece's models mark the others with the space before them ("Ġ",
    "▁"), so that punctuation belongs to the word before it.

    Raises:
        FunnelError: the vocabulary has no such marks.
    """
    vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    continues = np.zeros(1 + max(vocabulary.values()), bool)
    model = json.loads(tokenizer.tokenizer.to_str())["model"]
    prefix = model.get("continuing_subword_prefix")
    spaces = max(("Ġ", "Ċ", "ĉ"), ("▁",), key=lambda marks: sum(token.startswith(marks[0]) for token in vocabulary))
    if not prefix and not any(token.startswith(spaces[0]) for token in vocabulary):
        raise FunnelError(f"whole_words: {tokenizer.source} does not mark where words begin", "whole_words")
    for token, token_id in vocabulary.items():
        continues[token_id] = token.startswith(prefix) if prefix else not token.startswith(spaces)
    return continues


class Masker:
    """Masks tokens at random.

    Attributes:
        mask_id: the id of [MASK].
        is_special: [v], bool, the tokens that are never masked.
        ordinary: ids of the tokens that may replace another; no special ones.

    Raises:
        FunnelError: the tokenizer has no [MASK], or, for whole words, does not mark where words begin.
    """

    def __init__(self, tokenizer: FunnelTokenizer, masking: Masking) -> None:
        if "mask" not in tokenizer.ids:
            raise FunnelError(f"{tokenizer.source}: no mask token; set mask_token in tokenizer_config.json")
        self.masking, self.mask_id = masking, tokenizer.ids["mask"]
        vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
        added = tokenizer.tokenizer.get_added_tokens_decoder().items()
        special = [*tokenizer.ids.values(), *(token_id for token_id, token in added if token.special)]
        self.ordinary = np.setdiff1d(list(vocabulary.values()), special)
        self.is_special = special_tokens(tokenizer)
        self.continues_word = continues_word(tokenizer) if masking.whole_words else None

    def __call__(self, ids: np.ndarray, slots: int, random: np.random.Generator) -> MaskedTokens:
        """Masks `masking.counts(number of candidates)` tokens of each row, `slots` at most.

        Args:
            ids: [b, l].
            slots: m.
        """
        is_candidate = ~self.is_special[ids]
        scores = random.random(ids.shape)
        actions, replacements = random.random((2, len(ids), slots))
        counts = np.minimum(self.masking.counts(is_candidate.sum(1)), slots)
        if self.continues_word is None:
            is_masked = choose_tokens(is_candidate, scores, counts)
        else:
            is_masked = choose_words(is_candidate, first_tokens(is_candidate, self.continues_word[ids]), scores, counts)
        positions, is_used = slot_positions(is_masked, slots)
        new = np.take_along_axis(ids, positions, 1)
        is_mask = actions < self.masking.mask_token
        is_random = ~is_mask & (actions < self.masking.mask_token + self.masking.random_token)
        new = np.where(is_mask, self.mask_id, new)
        new = np.where(is_random, self.ordinary[(replacements * len(self.ordinary)).astype(np.int64)], new)
        masked = ids.copy()
        masked[is_masked] = new[is_used]  # both in the order of rows and positions
        return MaskedTokens(masked, positions, is_used)


def choose_tokens(is_candidate: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Chooses the candidates with the lowest scores. [b, l], bool

    Args:
        is_candidate: [b, l], bool.
        scores: [b, l], random numbers in [0, 1).
        counts: [b], how many to choose in each row; not more than there are candidates.
    """
    order = np.where(is_candidate, scores, 2).argsort(1)
    chosen = np.zeros_like(is_candidate)
    np.put_along_axis(chosen, order, np.arange(order.shape[1]) < counts[:, None], 1)
    return chosen


def first_tokens(is_candidate: np.ndarray, continues: np.ndarray) -> np.ndarray:
    """For each token, the position of its word's first token. [b, l]

    Args:
        is_candidate: [b, l]; a word consists of candidates.
        continues: [b, l], whether the token continues a word.
    """
    is_first = ~continues | ~is_candidate
    is_first[:, 1:] |= ~is_candidate[:, :-1]
    is_first[:, 0] = True
    return np.maximum.accumulate(np.where(is_first, np.arange(is_first.shape[1]), 0), axis=1)


def choose_words(is_candidate: np.ndarray, firsts: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Chooses whole words in random order until the next would exceed the count, then words of one token. [b, l], bool

    So a row gets fewer tokens than `counts` only if it has too few words of one token. If its first word alone exceeds the
    count, and there are no words of one token, a part of the first word is chosen.

    Args:
        firsts: [b, l], as from `first_tokens`.
        is_candidate, scores, counts: as in `choose_tokens`; a word has the score of its first token.
    """
    scores = np.where(is_candidate, np.take_along_axis(scores, firsts, 1), 2)
    order = scores.argsort(1, kind="stable")  # the tokens of a word are consecutive
    first = np.take_along_axis(firsts, order, 1)
    column, limit = np.arange(order.shape[1]), counts[:, None]
    sizes = _sizes(firsts)
    size, valid = np.take_along_axis(sizes, first, 1), np.take_along_axis(is_candidate, order, 1)
    end = column - (order - first) + size  # number of tokens up to the end of the word
    taken = valid & (end <= limit)
    singles = valid & ~taken & (size == 1)
    taken |= singles & (singles.cumsum(1) <= limit - taken.sum(1, keepdims=True))
    taken |= valid & (column < limit) & ~taken.any(1, keepdims=True)
    chosen = np.zeros_like(is_candidate)
    np.put_along_axis(chosen, order, taken, 1)
    return chosen


def _sizes(firsts: np.ndarray) -> np.ndarray:
    """For each first token of a word, the number of its tokens. [b, l]"""
    rows, length = firsts.shape
    flat = firsts + np.arange(rows)[:, None] * length
    return np.bincount(flat.ravel(), minlength=rows * length).reshape(rows, length)


def slot_positions(is_masked: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """The positions of the masked tokens of each row, and which slots are used. [b, m] each

    Args:
        is_masked: [b, l], at most `slots` in a row.
        slots: m.
    """
    is_used = np.arange(slots) < is_masked.sum(1)[:, None]
    positions = np.zeros(is_used.shape, np.int64)
    positions[is_used] = is_masked.nonzero()[1]
    return positions, is_used

"""Encodes sentences of words, with a label on the first token of every word.

The words of a sentence are joined by single spaces and encoded as one text, so that a tokenizer that looks at the space before
a word (byte-level BPE, Unigram) sees what it sees in ordinary text. Tokens are assigned to words by their positions in the
text. A word without a token of its own, such as a control character that the tokenizer drops, gets the unknown token.

A sentence that is longer than the maximum length becomes several windows, each of which overlaps the next one by half. Every
word has its label in exactly one of them: the one in which its first token is farthest from a cut. So the labeled tokens of a
sentence's windows, in order, are its words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from funnel.data.checks import hash_texts
from funnel.data.dataset import IGNORED, Dataset, Rows, Truncation
from funnel.data.encoding import EncodedRows, row_starts, unknown_label
from funnel.data.files import Source
from funnel.data.tagged import TaggedSentence
from funnel.data.tokenizer import FunnelTokenizer

NO_LABEL = -1  # of a word in an unlabeled sentence; marks its first token, as a label would


class LabeledTokens(NamedTuple):
    """The tokens of a dataset that have a label, or whose word has none: one per word, in the order of the words.

    Attributes:
        rows, columns: row in the dataset, and position in the row, [m] each.
        labels: label ids, [m].
        sentences: number of the sentence, [m]; increasing.
    """

    rows: np.ndarray
    columns: np.ndarray
    labels: np.ndarray
    sentences: np.ndarray


@dataclass(frozen=True)
class TokenEncoder:
    """Encodes sentences as windows of tokens.

    Attributes:
        label_ids: label ids by tag; None for sentences without tags.
    """

    label_ids: Mapping[str, int] | None

    def settings(self) -> Any:
        return ["tokens", None if self.label_ids is None else sorted(self.label_ids.items())]

    def encode(
        self, source: Source, examples: Sequence[TaggedSentence], tokenizer: FunnelTokenizer, max_length: int
    ) -> EncodedRows:
        tokenizer.check_max_length(max_length)
        cls, sep, unknown = tokenizer.cls_id, tokenizer.ids["sep"], tokenizer.ids.get("unk", tokenizer.pad_id)
        ids: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        owners: list[int] = []
        totals: list[int] = []
        texts = [sentence.text for sentence in examples]
        for number, (sentence, encoding) in enumerate(zip(examples, tokenizer.encode_with_offsets(texts), strict=True)):
            tokens, firsts = assign_tokens(sentence.words, *encoding, unknown)
            word_labels = self._label_words(source, sentence)
            totals.append(len(tokens) + 2)
            for start, end, words in split_windows(len(tokens), firsts, max_length - 2):
                window_labels = np.full(end - start + 2, IGNORED, np.int32)
                window_labels[firsts[words] - start + 1] = word_labels[words]
                ids.append(np.concatenate([[cls], tokens[start:end], [sep]]).astype(np.int32))
                labels.append(window_labels)
                owners.append(number)
        lengths = np.array([len(window) for window in ids], np.int32)
        no_labels = np.full(len(ids), NO_LABEL, np.int32)
        hashes = hash_texts(texts, None)[owners]
        rows = Rows(row_starts(lengths), lengths, lengths, no_labels, hashes, np.array(owners))
        truncation = Truncation(0, 0, sum(totals), max(totals))
        return EncodedRows(np.concatenate(ids), rows, truncation, np.concatenate(labels))

    def _label_words(self, source: Source, sentence: TaggedSentence) -> np.ndarray:
        """The label id of every word."""
        if self.label_ids is None or sentence.tags is None:
            return np.full(len(sentence.words), NO_LABEL, np.int32)
        for line, tag in zip(sentence.lines, sentence.tags, strict=True):
            if tag not in self.label_ids:
                raise source.error(line, unknown_label(tag, self.label_ids))
        return np.array([self.label_ids[tag] for tag in sentence.tags], np.int32)


def assign_tokens(words: Sequence[str], ids: np.ndarray, offsets: np.ndarray, unknown: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a sentence, and which of them is the first one of each word.

    A token belongs to the word of its first character that is not a space; a token that is only a space, to the next word.

    Args:
        ids, offsets: the tokens of the words, joined by spaces, and their positions in that text.
        unknown: the token of words that have none.

    Returns:
        Token ids [t], and the index of the first token of each word [w].
    """
    if not words:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    text = " ".join(words)
    word_starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
    positions = []
    for start, end in offsets:
        covered = text[start:end]
        positions.append(start + len(covered) - len(covered.lstrip(" ")))
    owners = np.searchsorted(word_starts, np.array(positions, np.int64), side="right") - 1
    owners = np.maximum.accumulate(owners) if len(owners) else owners  # in the order of the words
    missing = np.setdiff1d(np.arange(len(words)), owners)
    at = np.searchsorted(owners, missing)
    tokens = np.insert(np.array(ids, np.int64), at, unknown)
    return tokens, np.searchsorted(np.insert(owners, at, missing), np.arange(len(words)))


def split_windows(n_tokens: int, firsts: np.ndarray, size: int) -> list[tuple[int, int, np.ndarray]]:
    """Windows of at most `size` tokens, each of which overlaps the next one by half or more.

    Args:
        firsts: index of the first token of each word, [w], increasing.

    Returns:
        Start and end of each window, and which words are labeled in it: those whose first token is farther from a cut than in
        any other window, or as far as in a later one. The ends of the sentence are not cuts.
    """
    n_windows = 1 + max(0, -(-(n_tokens - size) // max(1, size // 2)))
    starts = np.minimum(np.arange(n_windows) * max(1, size // 2), max(0, n_tokens - size))
    ends = np.minimum(starts + size, n_tokens)
    left = np.where(starts == 0, n_tokens, firsts[:, None] - starts)  # [w, n_windows], tokens before the first one
    right = np.where(ends == n_tokens, n_tokens, ends - 1 - firsts[:, None])
    chosen = np.minimum(left, right).argmax(1)
    windows = zip(starts.tolist(), ends.tolist(), strict=True)
    return [(start, end, np.flatnonzero(chosen == i)) for i, (start, end) in enumerate(windows)]


def labeled_tokens(dataset: Dataset) -> LabeledTokens:
    """The labeled tokens of a dataset of encoded sentences."""
    assert dataset.token_labels is not None, "encoded by a TokenEncoder"
    lengths = dataset.lengths
    rows = np.repeat(np.arange(len(dataset)), lengths)
    columns = np.arange(lengths.sum()) - np.repeat(row_starts(lengths), lengths)
    labels = dataset.token_labels[dataset.rows.starts[rows] + columns]
    found = labels != IGNORED
    rows, columns, labels = rows[found], columns[found], labels[found]
    return LabeledTokens(rows, columns, labels, rows if dataset.rows.examples is None else dataset.rows.examples[rows])

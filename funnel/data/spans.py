"""Encodes questions and the texts that answer them, for models that mark the first and the last token of the answer.

A row is [CLS] question [SEP] window of the context [SEP], with the tokenizer's separators and token types. A long context has
several windows, whose starts are `doc_stride` tokens apart; long questions are truncated. The defaults are those of BERT's
run_squad.py (max_query_length 64, doc_stride 128).

The label of a token (`Dataset.token_labels`) has the bits START and END for the first and the last token of the answer, and
MOST_CONTEXT in the window that shows the most text around the token: min(tokens before, tokens after) + 0.01 * length, as in
run_squad.py. Tokens that are neither [CLS] nor part of the context have the label `IGNORED`. If the window does not contain the
whole answer, or there is none, [CLS] is the first and the last token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from funnel.data.checks import hash_texts
from funnel.data.dataset import IGNORED, Rows, Truncation
from funnel.data.encoding import EncodedRows, row_starts
from funnel.data.files import Source
from funnel.data.squad import Question
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.options import option

MAX_QUERY_LENGTH, DOC_STRIDE = 64, 128  # tokens
START, END, MOST_CONTEXT = 1, 2, 4  # bits of a token's label
LENGTH_WEIGHT = 0.01  # of a window's length in the comparison of windows
UNLABELED = -1  # position of the answer
NO_ANSWER = (-1, -1)  # inside a context or a window


@dataclass(frozen=True)
class SpanArgs:
    """Options for encoding questions."""

    max_query_length: int | None = option(
        None, f"answer spans: truncate questions to this many tokens (default: {MAX_QUERY_LENGTH})", bounds="[1, inf)"
    )
    doc_stride: int | None = option(
        None, f"answer spans: tokens between the windows of a long context (default: {DOC_STRIDE})", bounds="[1, inf)"
    )


class Window(NamedTuple):
    """A row.

    Attributes:
        ids, token_labels: [l].
        offsets: [l, 2], as in `Dataset`; -1 for the question, too.
        pair_start: as in `Rows`.
        span: first and last token of the answer; (0, 0) without one, (-1, -1) if it is unknown.
    """

    ids: np.ndarray
    token_labels: np.ndarray
    offsets: np.ndarray
    pair_start: int
    span: tuple[int, int]


@dataclass(frozen=True)
class SpanEncoder:
    """Encodes questions with their contexts. If a question has several answers, the first one is the label.

    Attributes:
        max_query_length: longer questions are truncated to this number of tokens.
        doc_stride: number of tokens between the starts of windows; fewer if windows would not overlap.
    """

    max_query_length: int = MAX_QUERY_LENGTH
    doc_stride: int = DOC_STRIDE

    def settings(self) -> Any:
        return ["spans", self.max_query_length, self.doc_stride]

    def encode(self, source: Source, examples: Sequence[Question], tokenizer: FunnelTokenizer, max_length: int) -> EncodedRows:
        n_special = 2 + tokenizer.separators
        if max_length <= self.max_query_length + n_special:
            raise FunnelError(
                f"max_length {max_length}: expected more than max_query_length ({self.max_query_length}) and {n_special} "
                "special tokens, to leave room for the context",
                "max_length",
            )
        queries = tokenizer.encode_plain([example.question for example in examples])
        texts = list(dict.fromkeys(example.context for example in examples))
        contexts = dict(zip(texts, tokenizer.encode_with_offsets(texts), strict=True))
        windows: list[Window] = []
        numbers: list[int] = []  # of each window's example
        for number, (example, query) in enumerate(zip(examples, queries, strict=True)):
            frame = _Frame(tokenizer, query[: self.max_query_length])
            windows += self._windows(example, contexts[example.context], frame, max_length)
            numbers += [number] * (len(windows) - len(numbers))
        lengths = np.array([len(window.ids) for window in windows], np.int32)
        hashes = hash_texts([example.question for example in examples], [example.context for example in examples])
        rows = Rows(
            row_starts(lengths),
            lengths,
            np.array([window.pair_start for window in windows], np.int32),
            np.array([window.span for window in windows], np.int32),
            hashes[numbers],
            np.array(numbers),
            np.array([examples[number].group for number in numbers]),
        )
        ids, token_labels, offsets = (
            np.concatenate([getattr(window, name) for window in windows]) for name in ("ids", "token_labels", "offsets")
        )
        return EncodedRows(ids, rows, self._truncation(queries), token_labels, offsets)

    def _windows(
        self, example: Question, context: tuple[np.ndarray, np.ndarray], frame: "_Frame", max_length: int
    ) -> list[Window]:
        """The windows of an example, one at least. `context`: ids [t] and offsets [t, 2] of all of its tokens."""
        ids, offsets = context
        size = max_length - frame.length
        stride = min(self.doc_stride, size)
        bounds = [(start, min(start + size, len(ids))) for start in range(0, max(1, len(ids) - size + stride), stride)]
        owners = most_context(len(ids), bounds)
        answer = find_answer(example, offsets)
        windows = []
        for number, (start, end) in enumerate(bounds):
            labels = np.where(owners[start:end] == number, MOST_CONTEXT, 0)
            windows.append(frame.window(ids[start:end], labels, offsets[start:end], _shift(answer, start, end)))
        return windows

    def _truncation(self, queries: Sequence[Sequence[int]]) -> Truncation:
        """How much of the questions was cut off."""
        lengths = np.array([len(query) for query in queries])
        lost = np.maximum(lengths - self.max_query_length, 0)
        return Truncation(int((lost > 0).sum()), int(lost.sum()), int(lengths.sum()), int(lengths.max()))


class _Frame:
    """What surrounds the windows of an example: special tokens and the question, whose ids are `query`."""

    def __init__(self, tokenizer: FunnelTokenizer, query: Sequence[int]) -> None:
        separator = tokenizer.ids["sep"]
        self.before = np.array([tokenizer.cls_id, *query, *[separator] * tokenizer.separators], np.int32)
        self.after = np.array([separator], np.int32)
        self.length = len(self.before) + 1
        self.has_second_type = tokenizer.second_type == 1

    def window(self, ids: np.ndarray, labels: np.ndarray, offsets: np.ndarray, answer: tuple[int, int] | None) -> Window:
        """A row: the ids, labels and offsets of a part of the context, and the answer's tokens in this part, as in `_shift`."""
        n_before = len(self.before)
        token_labels = np.pad(labels, (n_before, 1), constant_values=IGNORED).astype(np.int8)
        token_labels[0] = 0
        span = (UNLABELED, UNLABELED)
        if answer is not None:
            span = (answer[0] + n_before, answer[1] + n_before) if answer[0] >= 0 else (0, 0)
            token_labels[span[0]] |= START
            token_labels[span[1]] |= END
        row = np.concatenate([self.before, ids, self.after])
        all_offsets = np.pad(offsets, ((n_before, 1), (0, 0)), constant_values=-1)
        return Window(row, token_labels, all_offsets, n_before if self.has_second_type else len(row), span)


def find_answer(example: Question, offsets: np.ndarray) -> tuple[int, int] | None:
    """The first and the last token that overlap the answer's characters; (-1, -1) without an answer, None if it is unknown.

    Args:
        offsets: [t, 2], of the context's tokens.
    """
    if example.answers is None:
        return None
    if not example.answers:
        return NO_ANSWER
    text, position = example.answers[0]
    start, end = position + len(text) - len(text.lstrip()), position + len(text.rstrip())
    found = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
    return (int(found[0]), int(found[-1])) if len(found) else NO_ANSWER


def _shift(answer: tuple[int, int] | None, start: int, end: int) -> tuple[int, int] | None:
    """The answer's tokens relative to a window of the context; (-1, -1) if it is not entirely inside."""
    if answer is None:
        return None
    return (answer[0] - start, answer[1] - start) if start <= answer[0] and answer[1] < end else NO_ANSWER


def most_context(n_tokens: int, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """The number of the window that shows the most text around each token, [n_tokens]; the first one of several.

    Args:
        bounds: first token of each window, and the one after its last.
    """
    best, owners = np.full(n_tokens, -1.0), np.zeros(n_tokens, int)
    for number, (start, end) in enumerate(bounds):
        tokens = np.arange(start, end)
        context = np.minimum(tokens - start, end - 1 - tokens) + LENGTH_WEIGHT * (end - start)
        is_better = context > best[start:end]
        best[start:end][is_better] = context[is_better]
        owners[start:end][is_better] = number
    return owners

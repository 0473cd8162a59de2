"""Pretraining batches: documents cut into sequences, padded, and masked.

A batch's sequences, segments and masks depend on the seed and the step only. All random numbers are drawn for the global
batch, so that it is the same for any number of ranks.

Shapes: b sequences, l tokens of the padded batch, m slots for masked tokens, n sequences of a corpus, v tokens of the
vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from funnel.data.batches import WHOLE, Batch, Shard, global_batches, rows_of_rank
from funnel.data.device_batches import move_batches, padded_length
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, plural
from funnel.pretraining.corpus import Corpus
from funnel.pretraining.masking import Masker, Masking

HELD_OUT_SHARE = 0.01  # of the documents
MAX_HELD_OUT = 1000  # documents, and sequences that are evaluated
EVALUATION_BATCH_SIZE = 64
SPLIT_SEED, EVALUATION_SEED = 0, 0
RANDOM_STREAM = 1  # separates a step's random stream from that of `epoch_batches`


@dataclass(frozen=True, eq=False)
class Sequences:
    """Pieces of a corpus' documents.

    Attributes:
        corpus: where the tokens are.
        starts: [n], int64, position of each sequence's first token in the corpus.
        lengths: [n], int32, number of tokens, without special ones.
    """

    corpus: Corpus
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def split(cls, corpus: Corpus, room: int) -> tuple["Sequences", "Sequences"]:
        """Cuts the documents of a corpus; returns sequences for training and held-out ones.

        The held-out documents, 1 % and at most `MAX_HELD_OUT`, depend on the corpus only. Of their sequences, those beyond this
        number are not used.

        Args:
            room: maximum length of a sequence.

        Raises:
            FunnelError: there are fewer than two documents with tokens.
        """
        documents = np.flatnonzero(corpus.lengths)
        if len(documents) < 2:
            needs = "two are needed, since one is held out for evaluation; separate documents by empty lines"
            message = f"corpus: fewer than two documents; {needs}"
            raise FunnelError(message, "corpus")
        count = min(MAX_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(documents))))
        held_out = np.sort(np.random.default_rng(SPLIT_SEED).choice(documents, count, replace=False))
        starts = corpus.starts()
        training, evaluation = (
            cls(corpus, *cut(starts[index], corpus.lengths[index], room))
            for index in (np.setdiff1d(documents, held_out, assume_unique=True), held_out)
        )
        if len(evaluation) > MAX_HELD_OUT:
            evaluation = evaluation.take(np.linspace(0, len(evaluation) - 1, MAX_HELD_OUT).astype(np.int64))
        return training, evaluation

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def longest(self) -> int:
        """Number of tokens of the longest sequence."""
        return int(self.lengths.max())

    def take(self, index: np.ndarray) -> "Sequences":
        """Selects sequences by index."""
        return Sequences(self.corpus, self.starts[index], self.lengths[index])


def cut(starts: np.ndarray, lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts each document into as few pieces of at most `room` tokens as possible, of nearly equal length.

    Args:
        starts, lengths: of the documents; lengths are positive.

    Returns:
        Starts (int64) and lengths (int32) of the pieces.
    """
    pieces = -(-lengths.astype(np.int64) // room)
    lengths, starts, count = (np.repeat(array, pieces) for array in (lengths.astype(np.int64), starts, pieces))
    piece = np.arange(len(count)) - np.repeat(pieces.cumsum() - pieces, pieces)
    begin, end = piece * lengths // count, (piece + 1) * lengths // count
    return starts + begin, (end - begin).astype(np.int32)


@dataclass(frozen=True, eq=False)
class SequenceFormat:
    """How sequences become rows of a batch.

    Attributes:
        tokenizer: the corpus' tokenizer.
        max_length: maximum number of tokens, including special ones.
        pairs: split half of the sequences, chosen at random for each batch, at a random point into two segments.
        masking: None for objectives without masks.

    Raises:
        FunnelError: `max_length` leaves no room for tokens, or the tokenizer does not support the masking.
    """

    tokenizer: FunnelTokenizer
    max_length: int
    pairs: bool = False
    masking: Masking | None = None

    def __post_init__(self) -> None:
        if self.room < 1:
            message = f"invalid max_length {self.max_length}: expected more than the {self.n_special} special tokens"
            raise FunnelError(message, "max_length")
        _ = self.masker

    @property
    def n_special(self) -> int:
        """The maximum number of special tokens per row."""
        return 2 + self.tokenizer.separators * self.pairs

    @property
    def room(self) -> int:
        """The maximum length of a sequence, without special tokens."""
        return self.max_length - self.n_special

    @cached_property
    def masker(self) -> Masker | None:
        """The masker for `masking`; None without masks."""
        return Masker(self.tokenizer, self.masking) if self.masking is not None else None

    def slots(self, width: int) -> int:
        """The number of slots for masked tokens per row of a batch of a padded length."""
        return int(self.masking.counts(np.array(width - 2))) if self.masking is not None else 0


class PretrainBatches:
    """Yields batches of sequences on a device, in the form that `funnel.pretraining.objective` describes."""

    def __init__(self, sequences: Sequences, format: SequenceFormat, device: torch.device) -> None:
        self.sequences, self.format, self.device = sequences, format, device

    def __call__(self, batch_size: int, seed: int, *, start: int = 0, shard: Shard = WHOLE) -> Iterator[Batch]:
        """Yields one training batch per step, indefinitely.

        Args:
            batch_size: number of sequences of the global batch.
            start: the first step.
            shard: the rank whose rows are returned.
        """
        return move_batches(self._training(batch_size, seed, start, shard), self.device)

    def _training(self, batch_size: int, seed: int, start: int, shard: Shard) -> Iterator[Batch]:
        for step, rows in enumerate(global_batches(self.sequences.lengths, batch_size, seed, start), start):
            yield self._share(self.assemble(rows, np.random.default_rng([seed, step, RANDOM_STREAM])), shard)

    def evaluation(self, batch_size: int = EVALUATION_BATCH_SIZE, *, shard: Shard = WHOLE) -> list[Batch]:
        """All sequences once, longest first, the same at every call.

        The weights are normalized over the whole list: an objective's values, summed over its batches, are means over all
        held-out (or masked) tokens.
        """
        order = np.argsort(-self.sequences.lengths, kind="stable")
        random = np.random.default_rng(EVALUATION_SEED)
        batches = [self.assemble(order[i : i + batch_size], random) for i in range(0, len(order), batch_size)]
        names = [name for name in ("token_weights", "position_weights") if name in batches[0]]
        for name in names:
            total = sum(int(np.count_nonzero(arrays[name])) for arrays in batches)
            for arrays in batches:
                arrays[name] = ((arrays[name] > 0) / max(1, total)).astype(np.float32)
        return [self._share(arrays, shard).to(self.device) for arrays in batches]

    def assemble(self, rows: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
        """A global batch: inputs and labels.

        Args:
            rows: [b], numbers of sequences.
        """
        longest = int(self.sequences.lengths[rows].max()) + self.format.n_special
        width = padded_length(self.sequences.longest + self.format.n_special, longest, self.device)
        arrays = self._layout(rows, width, random)
        ids = arrays["input_ids"]
        arrays["token_weights"] = mean_weights(arrays["attention_mask"] > 0)
        if self.format.masker is None:
            arrays["labels"] = np.zeros((len(rows), 0), np.int64)
            return arrays
        masked_ids, positions, is_used = self.format.masker(ids, self.format.slots(width), random)
        arrays["masked_ids"], arrays["positions"] = masked_ids, positions
        arrays["position_weights"] = mean_weights(is_used)
        arrays["uniforms"] = random.random(positions.shape, np.float32)
        arrays["labels"] = np.take_along_axis(ids, positions, 1)
        return arrays

    def _layout(self, rows: np.ndarray, width: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        """Ids, mask and token types of a global batch, as the tokenizer lays out texts and pairs. [b, l] each"""
        tokenizer, sequences, separators = self.format.tokenizer, self.sequences, self.format.tokenizer.separators
        n, row = sequences.lengths[rows].astype(np.int64), np.arange(len(rows))
        first = n  # number of tokens of the first segment; all of them if there is no second one
        if self.format.pairs:
            chance, point = random.random((2, len(rows)))
            first = np.where(chance < 0.5, 1 + (point * (n - 1)).astype(np.int64), n)
        is_pair = first < n
        second_start = first + 1 + separators * is_pair
        length = n + 2 + separators * is_pair
        ids = np.full((len(rows), width), tokenizer.pad_id, np.int64)
        for i, start in enumerate(sequences.starts[rows].tolist()):
            text = sequences.corpus.tokens(start, n[i])
            ids[i, 1 : 1 + first[i]] = text[: first[i]]
            if is_pair[i]:
                ids[i, second_start[i] : length[i] - 1] = text[first[i] :]
        ids[:, 0] = tokenizer.cls_id
        ids[row, length - 1] = tokenizer.ids["sep"]
        for k in range(separators):
            ids[row[is_pair], first[is_pair] + 1 + k] = tokenizer.ids["sep"]
        column = np.arange(width)
        is_token = column < length[:, None]
        is_second = is_token & (column >= second_start[:, None]) & is_pair[:, None]
        types = is_second * np.int64(tokenizer.second_type)
        types[:, 0] = 2  # [CLS]
        return {"input_ids": ids, "attention_mask": is_token.astype(np.int64), "token_type_ids": types}

    def _share(self, arrays: dict[str, np.ndarray], shard: Shard) -> Batch:
        """One rank's rows of a global batch; a rank without a row gets the first row, with weights 0."""
        size = len(arrays["input_ids"])
        part = rows_of_rank(np.arange(size), arrays["attention_mask"].sum(1), shard)
        tensors = {name: torch.from_numpy(array[part.rows]) for name, array in arrays.items()}
        for name in ("token_weights", "position_weights"):
            if name in tensors:
                tensors[name] *= shard.world_size if part.weight > 0 else 0
        batch = Batch(tensors, tensors.pop("labels"))
        return replace(batch, n_examples=size, world_size=shard.world_size)


@dataclass(frozen=True, eq=False)
class PretrainData:
    """The data of a pretraining run.

    Attributes:
        train_set, dev_set: sequences to train on, and held-out ones.
        format: how they become rows of a batch.
    """

    train_set: Sequences
    dev_set: Sequences
    format: SequenceFormat

    @classmethod
    def from_corpus(cls, corpus: Corpus, format: SequenceFormat, batch_size: int) -> "PretrainData":
        """Cuts a corpus into sequences.

        Raises:
            FunnelError: as `Sequences.split`, or there are fewer sequences than a batch has.
        """
        train_set, dev_set = Sequences.split(corpus, format.room)
        if batch_size > len(train_set):
            message = f"batch_size {batch_size}: the corpus has only {plural(len(train_set), 'sequence')} to train on"
            raise FunnelError(f"{message}; use a smaller batch or more text", "batch_size")
        return cls(train_set, dev_set, format)

    def batches(self, part: Sequences, device: torch.device) -> PretrainBatches:
        """Batches of `train_set` or `dev_set` on a device."""
        return PretrainBatches(part, self.format, device)

    def sample(self) -> Batch:
        """A batch of held-out sequences on the CPU."""
        return self.batches(self.dev_set, torch.device("cpu")).evaluation()[0]

    def settings(self) -> dict[str, Any]:
        """The settings of a run that are derived from its data, as in `run_dir.describe_data`."""
        return {
            "train_examples": len(self.train_set),
            "dev_examples": len(self.dev_set),
            "mean_tokens": round(float(self.train_set.lengths.mean()) + self.format.n_special, 1),
            "digests": {"corpus": self.train_set.corpus.digest},
        }

    def __str__(self) -> str:
        corpus = self.train_set.corpus
        sizes = f"{len(self.train_set):,} sequences to train on, {len(self.dev_set):,} held out"
        return f"{plural(corpus.n_documents, 'document')}, {corpus.n_tokens:,} tokens; {sizes}"


def mean_weights(counts: np.ndarray) -> np.ndarray:
    """Weights that turn a sum into the mean over some entries: 1 / their number there, 0 elsewhere. float32

    Args:
        counts: bool, the entries that count.
    """
    return (counts / max(1, np.count_nonzero(counts))).astype(np.float32)

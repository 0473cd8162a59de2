"""Warnings about suspicious data: unreadable texts, duplicates, overlapping sets."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from funnel.data.files import Example, Source
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import plural

if TYPE_CHECKING:
    from funnel.data.dataset import Dataset
    from funnel.data.tasks import Task


def hash_texts(texts: Sequence[str], pairs: Sequence[str] | None) -> np.ndarray:
    """64-bit hashes of texts, or of pairs of texts, [n], uint64."""
    joined = texts if pairs is None else map("\0".join, zip(texts, pairs, strict=True))
    digests = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in joined)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def shorten(text: str) -> str:
    """The beginning of a text, to be quoted in a message."""
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


class TextChecks:
    """Counts texts that consist only of unknown tokens, and texts that contain special tokens."""

    def __init__(self, tokenizer: FunnelTokenizer) -> None:
        self.tokenizer = tokenizer
        self.counts = {"unknown": 0, "special": 0}
        self.first: dict[str, str] = {}

    def update(self, examples: Sequence[Example], ids: np.ndarray, starts: np.ndarray) -> None:
        """Checks encoded examples.

        Args:
            ids: their token ids, concatenated.
            starts: position of each example's first token in `ids`.
        """
        roles = self.tokenizer.ids
        is_unknown = ids == roles.get("unk", -1)
        is_special = np.isin(ids, [token_id for role, token_id in roles.items() if role != "unk"])
        n_unknown, n_special, n_known = (
            np.add.reduceat(mask, starts, dtype=np.int64) for mask in (is_unknown, is_special, ~(is_unknown | is_special))
        )
        expected = 2 if examples[0].pair is None else 2 + self.tokenizer.separators  # [CLS], and [SEP] after each text
        for name, found in (("unknown", (n_unknown > 0) & (n_known == 0)), ("special", n_special > expected)):
            self.counts[name] += int(found.sum())
            if found.any():
                self.first.setdefault(name, examples[int(found.argmax())].text)

    def warnings(self) -> list[str]:
        """One line for each kind of text that was found."""
        names = self.tokenizer.names
        special = ", ".join(names[role] for role in ("cls", "sep", "pad", "mask") if role in names)
        messages = {
            "unknown": f"of unknown words only: all tokens are {names.get('unk')}",
            "special": f"with a special token inside ({special}), which is encoded as that token",
        }
        return [
            f"{plural(self.counts[name], 'text')} {messages[name]}, such as {shorten(self.first[name])}" for name in self.first
        ]


def compare_sets(task: "Task", train_set: "Dataset", eval_sets: Mapping[str, "Dataset"]) -> Iterator[str]:
    """Yields a warning about texts with different labels, and one per evaluation set that shares texts with the training set.

    Args:
        task: with the files of the sets; a set without a file was split off the training file.
    """
    if task.problem == "classification":  # repeated texts with different scores are common: several people rated them
        same_file = [train_set, *(dataset for split, dataset in eval_sets.items() if split not in task.files)]
        hashes, labels = (np.concatenate([getattr(dataset, name) for dataset in same_file]) for name in ("hashes", "labels"))
        order = np.lexsort((labels, hashes))
        hashes, labels = hashes[order], labels[order]
        contradicting = hashes[1:][(hashes[1:] == hashes[:-1]) & (labels[1:] != labels[:-1])]
        if len(contradicting):
            count, text = plural(len(np.unique(contradicting)), "text"), _find_text(task.files["train"], contradicting[0])
            yield f"train: {count} with different labels, such as {text}"
    for split, dataset in eval_sets.items():
        shared = np.isin(dataset.hashes, train_set.hashes)
        if split in task.files and dataset.digest == train_set.digest:
            yield f"{split} is the training file: results on {split} do not show how well the model handles new texts"
        elif shared.any():
            text = _find_text(task.files["train"], dataset.hashes[shared][0])
            yield f"{split}: {shared.sum():,} of {plural(len(dataset), 'text')} also occur in the training set, such as {text}"


def _find_text(source: Source, wanted: np.uint64) -> str:
    """The beginning of the text that has a hash, to be quoted in a message."""
    for example in source.rows():
        if hash_texts([example.text], None if example.pair is None else [example.pair])[0] == wanted:
            return shorten(example.text)
    return "?"  # the file has changed

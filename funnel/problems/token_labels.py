"""One label per word: named entities, parts of speech."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from funnel.data.custom import check_dev_share, find_files
from funnel.data.dataset import Dataset
from funnel.data.encoding import Encoder
from funnel.data.files import Column
from funnel.data.formats import file_format, is_gzipped
from funnel.data.tagged import TAGS, WORDS, TaggedFile, has_token_lists, is_column_file
from funnel.data.tasks import CUSTOM, TOKEN_METRICS, Task
from funnel.data.token_encoder import LabeledTokens, TokenEncoder, labeled_tokens
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model.heads import FunnelForTokenClassification
from funnel.problems.base import Problem
from funnel.problems.calibration import calibrate
from funnel.problems.error_analysis import confusion_counts, count_confusions, list_mistakes, score_classes
from funnel.problems.metrics import Metric, accuracy, macro_f1
from funnel.problems.tag_schemes import PLAIN, TagSequence, TagTable, count_spans, infer_tags, mark_entities

if TYPE_CHECKING:
    from funnel.problems.task_args import TaskArgs

PLAIN_METRICS = ("accuracy", "f1 (macro)")
STRICT_F1 = "f1 (strict)"
SUFFIXES = (".conll", ".bio", ".iob")  # of column files that need no `problem`
MAX_WRONG_WORDS = 10  # of a sentence in the error analysis


class TokenLabels(Problem):
    """One label per word, predicted at its first token; cross-entropy.

    In training, the sum over the labeled tokens of a batch is divided by its number of rows times the training set's mean
    number of labeled tokens per row, so that every word has the same weight in whatever batch it is.
    """

    name = "token-labels"
    title = "token classifier"
    model_class = FunnelForTokenClassification

    words_per_row = 1.0  # of the training set

    @classmethod
    def encoder(cls, task: Task) -> Encoder:
        return TokenEncoder(task.label_ids)

    def count_classes(self, dataset: Dataset) -> np.ndarray:
        return np.bincount(labeled_tokens(dataset).labels, minlength=len(self.labels))

    def prepare(self, train_set: Dataset, options: Any) -> None:
        super().prepare(train_set, options)
        self.words_per_row = max(1, len(labeled_tokens(train_set).rows)) / len(train_set)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        logits, flat = outputs.float().flatten(0, 1), labels.flatten()
        losses = F.cross_entropy(logits, flat, label_smoothing=self.label_smoothing, reduction="none")  # 0 without a label
        if self.class_weights is not None:
            losses = self.class_weights[flat.clamp(min=0)] * losses
        return losses.sum() / (len(labels) * self.words_per_row)

    def collect(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The label's negative log-probability, the predicted label id, and its probability, [b, l, 3]."""
        log_probs = outputs.float().log_softmax(-1)
        losses = -log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        best, predicted = log_probs.max(-1)
        return torch.stack([losses, predicted.float(), best.exp()], -1)

    def mean_loss(self, results: Tensor, dataset: Dataset) -> float:
        words = labeled_tokens(dataset)
        return float(results[words.rows, words.columns, 0].double().mean())

    @classmethod
    def metric_functions(cls, labels: Sequence[str]) -> Mapping[str, Metric]:
        def of_ids(metric: Metric, predictions: TagSequence, targets: TagSequence) -> float:
            return metric(predictions.ids, targets.ids)

        def of_spans(name: str, strict: bool, predictions: TagSequence, targets: TagSequence) -> float:
            return float(getattr(count_spans(labels, predictions, targets, strict), name))

        by_word = {"accuracy": partial(of_ids, accuracy)}
        if not mark_entities(labels):
            return {**by_word, "f1 (macro)": partial(of_ids, macro_f1)}
        by_entity = {name: partial(of_spans, name, False) for name in ("f1", "precision", "recall")}
        return {**by_entity, **by_word, STRICT_F1: partial(of_spans, "f1", True)}

    def predict(self, results: Tensor, dataset: Dataset) -> TagSequence:
        """The predicted tags of all words."""
        words = labeled_tokens(dataset)
        return TagSequence(results[words.rows, words.columns, 1].numpy().astype(np.int64), words.sentences)

    def targets(self, dataset: Dataset) -> TagSequence:
        words = labeled_tokens(dataset)
        return TagSequence(words.labels, words.sentences)

    def analyze(self, results: Tensor, dataset: Dataset, tokenizer: FunnelTokenizer) -> dict[str, Any]:
        """As in `error_analysis`; mistakes are the rows with most wrong tags. The confusion matrix is that of the tags."""
        words, names = labeled_tokens(dataset), self.labels
        predictions, targets = self.predict(results, dataset), self.targets(dataset)
        confusion = count_confusions(words.labels, predictions.ids, len(names))
        if mark_entities(names):
            classes, counts = TagTable(names).types, count_spans(names, predictions, targets)
        else:
            classes, counts = names, confusion_counts(confusion)
        wrong = np.flatnonzero(predictions.ids != words.labels)
        n_wrong = np.bincount(words.rows[wrong], minlength=len(dataset))

        def describe(row: int) -> dict[str, Any]:
            shown = wrong[words.rows[wrong] == row][:MAX_WRONG_WORDS]
            texts = [_word_text(dataset, words, int(index), tokenizer) for index in shown]
            pairs = {"label": words.labels[shown], "predicted": predictions.ids[shown]}
            return {
                key: ", ".join(f"{text} {names[i]}" for text, i in zip(texts, ids, strict=True)) for key, ids in pairs.items()
            }

        return {
            "examples": len(np.unique(words.sentences)),
            "unit": "word",
            "labels": names,
            "confusion": confusion.tolist(),
            **score_classes(classes, counts),
            "calibration": calibrate(results[words.rows, words.columns, 2].numpy(), predictions.ids == words.labels),
            "mistakes": list_mistakes(np.where(n_wrong > 0, n_wrong, -np.inf), describe, dataset, tokenizer),
        }


def _word_text(dataset: Dataset, words: LabeledTokens, index: int, tokenizer: FunnelTokenizer) -> str:
    """The text of a word: up to the next word's first token; only its own first token if the next word is in another window."""
    row, start, following = int(words.rows[index]), int(words.columns[index]), index + 1
    end = int(dataset.lengths[row]) - 1
    if following < len(words.rows) and words.sentences[following] == words.sentences[index]:
        end = int(words.columns[following]) if words.rows[following] == row else start + 1
    return tokenizer.decode(dataset.input_ids(row)[start:end]).strip()


# --- the user's own files ---------------------------------------------------------------------------------------------


def is_own_task(args: "TaskArgs", data: Path) -> bool:
    """Whether the user's own data are sentences with a tag per word.

    They are if `problem` says so; without it, column files with one of the `SUFFIXES`, a folder with such a file, and objects
    in which the columns of words and tags (`tokens` and `tags`) are lists.
    """
    if args.problem is not None:
        return args.problem == TokenLabels.name
    if os.path.isdir(data):
        return any(_has_suffix(path) for path in data.iterdir())
    names = (args.text_column or WORDS, args.label_column or TAGS)
    return _has_suffix(data) or (os.path.isfile(data) and has_token_lists(data, names))


def _has_suffix(path: Path) -> bool:
    return (path.with_suffix("") if is_gzipped(path) else path).suffix.lower() in SUFFIXES


def open_task(args: "TaskArgs", data: Path) -> Task:
    """A task made of the user's own files of tagged sentences; its hyperparameters are those of WNUT-17.

    Raises:
        FunnelError: a file cannot be read, or its columns or tags are not as expected.
    """
    for name in ("text_pair_column", "positive_label"):
        if getattr(args, name) is not None:
            raise FunnelError(f"{name} has no effect for a {TokenLabels.title}; omit it", name)
    paths = find_files(data, _is_readable) if os.path.isdir(data) else {"train": data}
    if args.dev is not None:
        paths["dev"] = args.dev
    check_dev_share(args.dev_share, paths)
    files = {
        split: open_tagged(path, args.text_column, args.label_column, "dev" if path == args.dev else "data")
        for split, path in paths.items()
    }
    tags = infer_tags(files["train"])
    if args.metric == STRICT_F1 and tags.scheme == "IOB1":
        raise FunnelError(f"metric {STRICT_F1!r} does not apply to IOB1 tags; use f1", "metric")
    metrics = PLAIN_METRICS if tags.scheme == PLAIN else TOKEN_METRICS
    names = {name: name for name in tags.names}
    lines = [*dict.fromkeys(file.description for file in files.values()), tags.description]
    task = Task(CUSTOM, data.resolve().name, names, metrics, 16, 4, 5e-5, problem=TokenLabels.name, files=files)
    return replace(task, description="\n".join(lines), warnings=tags.warnings)


def _is_readable(path: Path) -> bool:
    """Whether a file in a folder may be one of tagged sentences."""
    return _has_suffix(path) or file_format(path) in ("jsonl", "json", "parquet") or path.suffix.lower() == ".txt"


def open_tagged(path: Path, word_column: str | None, tag_column: str | None, parameter: str) -> TaggedFile:
    """A file of tagged sentences.

    Args:
        word_column, tag_column: names, or in column files numbers from 0; None for the default.
        parameter: the parameter that contains the path.

    Raises:
        FunnelError: the file does not exist, or is a table.
    """
    if not os.path.isfile(path):
        raise FunnelError(f"{parameter} {path}: {'expected a file' if os.path.exists(path) else 'no such file'}", parameter)
    if file_format(path) == "csv":
        expected = "columns with one word per line (.conll, .bio, .iob, .tsv or .txt), or .jsonl, .json or .parquet"
        raise FunnelError(f"{parameter} {path}: a table of texts; a {TokenLabels.title} reads {expected}", parameter)

    def column(name: str | None) -> Column | None:
        return int(name) if name is not None and is_column_file(path) and name.isdecimal() else name

    return TaggedFile(path, column(word_column), column(tag_column))

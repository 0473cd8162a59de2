"""Answers that are parts of a text (extractive question answering).

Shapes: n rows (windows), b rows of a batch, l tokens, m tokens of a window of the context, q questions.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from funnel.data.custom import check_dev_share, find_files
from funnel.data.dataset import IGNORED, Dataset
from funnel.data.encoding import Encoder
from funnel.data.spans import END, MOST_CONTEXT, START, SpanArgs, SpanEncoder
from funnel.data.squad import SUFFIXES, Question, SquadFile, is_squad
from funnel.data.tasks import CUSTOM, SPAN_METRICS, SPAN_METRICS_WITH_UNANSWERABLE, Task
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model.config import FunnelConfig
from funnel.model.heads import FunnelForQuestionAnswering
from funnel.problems.base import Problem
from funnel.problems.error_analysis import MAX_MISTAKES, MAX_TEXT_LENGTH
from funnel.problems.metrics import Metric
from funnel.problems.squad_metrics import SPANS, question_scores

if TYPE_CHECKING:
    from funnel.problems.task_args import TaskArgs

N_BEST = 20  # candidates per question, as in BERT's run_squad.py
MAX_ANSWER_LENGTH = 30  # tokens, as there
MASKED = -1e9  # logit of tokens that cannot be part of an answer; finite, so that losses are
CHUNK_SIZE = 256  # rows, when the loss of a dataset is computed


class Span(NamedTuple):
    """A candidate answer.

    Attributes:
        text: the part of the context.
        start, end: position of its first character in the context, and the one after its last.
        score: sum of the logits of its first and its last token.
    """

    text: str
    start: int
    end: int
    score: float


class Candidates(NamedTuple):
    """What the model says about a question.

    Attributes:
        question: the example.
        spans: the best spans, the best first; at most `N_BEST`, with different texts; empty if the context is.
        null_score: score of "no answer": the sum of [CLS]'s logits, the minimum over all windows.
    """

    question: Question
    spans: list[Span]
    null_score: float

    @property
    def margin(self) -> float:
        """How much higher the score of "no answer" is than that of the best span."""
        return self.null_score - self.spans[0].score if self.spans else float("inf")


class AnswerSpans(Problem):
    """The first and the last token of the answer to a question; cross-entropy over the tokens of the context and [CLS].

    [CLS] stands for "no answer". If questions of the dev set have none, as in SQuAD 2.0, `tune` chooses the threshold of
    `Candidates.margin` with the best F1 on dev: above it, the prediction is "no answer". Without a threshold (SQuAD 1.1), the
    prediction is always the best span.

    Results are logits, [n, l, 2]; `MASKED` where a token cannot be part of an answer.
    """

    name = "answer-spans"
    title = "question answerer"
    head = "span head"
    model_class = FunnelForQuestionAnswering
    has_classes = False

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__(config)
        self._decoded: tuple[Tensor, list[Candidates]] | None = None  # of the last results

    # --- data ---------------------------------------------------------------------------------------------------------

    @classmethod
    def outputs(cls, task: Task) -> Sequence[str]:
        return ["start", "end"]

    @classmethod
    def encoder(cls, task: Task) -> Encoder:
        return SpanEncoder(**task.encoding)

    # --- training and evaluation --------------------------------------------------------------------------------------

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean of the cross-entropy of first and last token. `labels`: [b, l], as in `funnel.data.spans`."""
        targets = torch.stack([(labels & bit).argmax(1) for bit in (START, END)], 1)  # [b, 2]; IGNORED has neither bit
        return F.cross_entropy(self.collect(outputs, labels), targets)

    def collect(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.float().masked_fill((labels == IGNORED).unsqueeze(2), MASKED)

    def mean_loss(self, results: Tensor, dataset: Dataset) -> float:
        total = 0.0
        for start in range(0, len(dataset), CHUNK_SIZE):
            rows = np.arange(start, min(start + CHUNK_SIZE, len(dataset)))
            total += len(rows) * float(self.loss(results[rows], dataset.batch(rows, results.shape[1]).labels))
        return total / len(dataset)

    def tune(self, results: Tensor, dataset: Dataset) -> None:
        gold, candidates = self.targets(dataset), self.decode(results, dataset)
        if all(gold):
            self.threshold = None
            return
        best_spans = [found.spans[0].text if found.spans else "" for found in candidates]
        answered, unanswered = question_scores("f1", best_spans, gold), question_scores("f1", [""] * len(gold), gold)
        self.threshold = best_threshold(np.array([found.margin for found in candidates]), answered - unanswered)

    @classmethod
    def metric_functions(cls, labels: Sequence[str]) -> Mapping[str, Metric]:
        return SPANS

    def predict(self, results: Tensor, dataset: Dataset) -> list[str]:
        """The answer to each question, [q]; "" for no answer."""
        return [self.answer(found) for found in self.decode(results, dataset)]

    def targets(self, dataset: Dataset) -> list[tuple[str, ...]]:
        """The gold answers of each question, [q]."""
        return [tuple(answer.text for answer in question.answers or ()) for question, _ in _questions(dataset)]

    def answer(self, found: Candidates) -> str:
        """The answer to a question; "" for no answer."""
        if not found.spans or (self.threshold is not None and found.margin > self.threshold):
            return ""
        return found.spans[0].text

    def analyze(self, results: Tensor, dataset: Dataset, tokenizer: FunnelTokenizer) -> dict[str, Any]:
        candidates, gold = self.decode(results, dataset), self.targets(dataset)
        predictions = [self.answer(found) for found in candidates]
        scores = question_scores("f1", predictions, gold)
        best = np.array([found.spans[0].score if found.spans else -np.inf for found in candidates])
        wrong = np.flatnonzero(question_scores("exact", predictions, gold) == 0)
        order = wrong[np.lexsort((-np.nan_to_num(best[wrong]), scores[wrong]))]  # lowest F1 first, then the highest logits
        mistakes = [
            {
                "text": candidates[number].question.question[:MAX_TEXT_LENGTH],
                "label": " / ".join(dict.fromkeys(gold[number])) or "(no answer)",
                "predicted": predictions[number] or "(no answer)",
            }
            for number in order[:MAX_MISTAKES]
        ]
        return {"examples": len(candidates), "threshold": self.threshold, "mistakes": mistakes}

    # --- decoding -----------------------------------------------------------------------------------------------------

    def decode(self, results: Tensor, dataset: Dataset) -> list[Candidates]:
        """The candidate answers to every question of a dataset, in the order of the source, [q]."""
        if self._decoded is None or self._decoded[0] is not results:
            logits = results.numpy()
            decoded = [decode_question(question, rows, logits, dataset) for question, rows in _questions(dataset)]
            self._decoded = (results, decoded)
        return self._decoded[1]


def _questions(dataset: Dataset) -> list[tuple[Question, np.ndarray]]:
    """The questions of a dataset in the order of the source, with the numbers of their windows."""
    examples, questions = dataset.rows.examples, dataset.examples
    assert examples is not None, "made by SpanEncoder"
    order = np.argsort(examples, kind="stable")
    numbers, starts = np.unique(examples[order], return_index=True)
    windows = np.split(order, starts[1:])
    return [(questions[number], rows) for number, rows in zip(numbers, windows, strict=True)]


def decode_question(question: Question, rows: np.ndarray, logits: np.ndarray, dataset: Dataset) -> Candidates:
    """The candidate answers to a question.

    Spans have at most `MAX_ANSWER_LENGTH` tokens and start in the window that shows the most text around their first token.

    Args:
        rows: the numbers of its windows.
        logits: [n, l, 2].
    """
    token_labels, all_offsets = dataset.token_labels, dataset.offsets
    assert token_labels is not None, "made by SpanEncoder"
    assert all_offsets is not None, "made by SpanEncoder"
    found: list[tuple[float, int, int]] = []  # score, first and last character
    for row in rows:
        start, length = int(dataset.rows.starts[row]), int(dataset.rows.lengths[row])
        labels = token_labels[start + 1 : start + length]
        context = 1 + np.flatnonzero(labels != IGNORED)
        if not len(context):
            continue
        scores = score_spans(logits[row, context].astype(np.float64), (labels[context - 1] & MOST_CONTEXT) != 0)
        offsets = all_offsets[start + context]
        for first, last in best_spans(scores):
            found.append((scores[first, last - first], int(offsets[first, 0]), int(offsets[last, 1])))
    spans: dict[str, Span] = {}
    for score, start, end in sorted(found, key=lambda candidate: (-candidate[0], *candidate[1:])):
        span = _cut_out(question.context, start, end, score)
        if span.text and len(spans) < N_BEST:
            spans.setdefault(span.text, span)
    return Candidates(question, list(spans.values()), float(logits[rows, 0].sum(1, dtype=np.float64).min()))


def score_spans(logits: np.ndarray, may_start: np.ndarray) -> np.ndarray:
    """The scores of all spans, [m, MAX_ANSWER_LENGTH], by first token and number of further tokens; -inf where impossible.

    Args:
        logits: [m, 2], of a window's context.
        may_start: [m].
    """
    ends = np.pad(logits[:, 1], (0, MAX_ANSWER_LENGTH - 1), constant_values=-np.inf)
    with np.errstate(invalid="ignore"):  # logits may not be finite in fp16, which is reported later
        scores = logits[:, :1] + np.lib.stride_tricks.sliding_window_view(ends, MAX_ANSWER_LENGTH)
    scores[~may_start] = -np.inf
    return np.where(np.isnan(scores), -np.inf, scores)


def best_spans(scores: np.ndarray) -> list[tuple[int, int]]:
    """First and last tokens of the `N_BEST` spans with the highest scores, in any order."""
    flat = scores.reshape(-1)
    best = np.argpartition(-flat, N_BEST)[:N_BEST] if flat.size > N_BEST else np.arange(flat.size)
    first, further = np.divmod(best[flat[best] > -np.inf], MAX_ANSWER_LENGTH)
    return list(zip(first.tolist(), (first + further).tolist(), strict=True))


def _cut_out(context: str, start: int, end: int, score: float) -> Span:
    """A part of the context without the whitespace around it, which some tokenizers count as part of a word."""
    text = context[start:end]
    start += len(text) - len(text.lstrip())
    text = text.strip()
    return Span(text, start, start + len(text), float(score))


def best_threshold(margins: np.ndarray, gains: np.ndarray) -> float:
    """The threshold with the highest total score if questions are answered whose margin does not exceed it.

    It is halfway between two margins.

    Args:
        margins: [q], as in `Candidates`.
        gains: [q], how much higher the score is if the question is answered.
    """
    usable = np.isfinite(margins)  # the others have no span
    if not usable.any():
        return 0.0
    order = np.argsort(margins[usable], kind="stable")
    margins, gains = margins[usable][order], gains[usable][order]
    bounds = np.concatenate([[margins[0] - 1], (margins[1:] + margins[:-1]) / 2, [margins[-1] + 1]])
    totals = np.concatenate([[0.0], gains.cumsum()])  # if the first 0, 1, … questions are answered
    totals[1:-1][margins[1:] == margins[:-1]] = -np.inf  # no threshold separates equal margins
    return float(bounds[totals.argmax()])


# --- tasks ------------------------------------------------------------------------------------------------------------

NO_COLUMNS = ("text_column", "text_pair_column", "label_column", "positive_label")


def open_task(args: "TaskArgs", data: Path) -> Task | None:
    """A task made of the user's own files in SQuAD's format; None if the files have another one.

    The learning rate, its decay, the batch size and the maximum length are those of SQuAD.

    Raises:
        FunnelError: a file is missing or malformed, or an option does not apply.
    """
    if args.problem not in (None, AnswerSpans.name):
        return None
    paths = find_files(data) if os.path.isdir(data) else {"train": data}
    if args.problem is None and not is_squad(paths["train"]):
        return None
    for name in NO_COLUMNS:
        if getattr(args, name) is not None:
            raise FunnelError(f"{name} has no effect on answer spans, whose files have fixed fields; omit it", name)
    check_dev_share(args.dev_share, paths)
    files = {"train": open_squad(paths["train"], "data")}
    dev = args.dev or paths.get("dev")
    if dev is not None:
        files["dev"] = open_squad(dev, "data" if args.dev is None else "dev")
    lines = [file.description for file in files.values()]
    if dev is None:
        lines.append(f"dev is split off by {files['train'].group_name}, so that no {files['train'].group_name} is in both sets")
    has_unanswerable = any(file.has_unanswerable for file in files.values())
    metrics = SPAN_METRICS_WITH_UNANSWERABLE if has_unanswerable else SPAN_METRICS
    task = Task(CUSTOM, data.resolve().name, None, metrics, 48, 3, 3e-5, 512, problem=AnswerSpans.name, layer_lr_decay=0.75)
    return replace(task, files=files, description="\n".join(lines))


def open_squad(path: Path, parameter: str, labeled: bool = True) -> SquadFile:
    """A file in SQuAD's format, checked.

    Args:
        parameter: the one that contains the path, for the error message.

    Raises:
        FunnelError: the file is missing or malformed.
    """
    if not path.name.lower().endswith(SUFFIXES) or not os.path.isfile(path):
        found = "no such file" if not os.path.exists(path) else "unknown format"
        expected = f"expected a {' or '.join(SUFFIXES)} file in the format of SQuAD"
        raise FunnelError(f"{parameter} {path}: {found}; {expected}", parameter)
    file = SquadFile(path, labeled)
    for _ in file.rows():
        break  # the whole file has been read
    return file


def with_encoding(task: Task, args: SpanArgs) -> Task:
    """The task with the encoder's settings.

    Raises:
        FunnelError: an option does not apply to the task.
    """
    given = {name: value for name in ("max_query_length", "doc_stride") if (value := getattr(args, name)) is not None}
    if given and task.problem != AnswerSpans.name:
        name = next(iter(given))
        raise FunnelError(f"{name} only applies to answer spans; omit it", name)
    return replace(task, encoding=given)

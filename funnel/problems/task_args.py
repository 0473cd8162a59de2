"""The options that select a task, and tasks made of the user's own files."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from funnel.data.dataset import Dataset
from funnel.data.folds import parse_fold
from funnel.data.spans import SpanArgs
from funnel.data.tasks import TASKS, Task, get_task, locate_files
from funnel.errors import FunnelError, format_list
from funnel.options import check_options, option
from funnel.problems import answer_spans, multiple_choice, own_texts, token_labels
from funnel.problems.metrics import LOSS
from funnel.problems.registry import PROBLEMS

DEFAULT_DEV_SHARE = 0.1  # of the training examples, without a dev file


@dataclass(frozen=True)
class TaskArgs(SpanArgs):
    """The options that select a task and its files.

    Raises:
        FunnelError: a value is invalid, the task is unknown, two of `dev`, `dev_share` and `fold` are combined, an option for
            custom files is set for another task, or the metric does not apply to the task (that of custom files is checked by
            `load_task`).
    """

    task: str | None = option(
        None, f"one of {', '.join(TASKS)}; default: demo, or a custom task if data is given", metavar="NAME"
    )
    data: Path | None = option(
        None,
        "folder with the task's files as published (default: download them), or, without a task, your own .csv, .tsv, "
        ".jsonl, .json or .parquet file, .conll, .bio or .iob file (a tag per word), or a folder with a train and a dev file",
        metavar="PATH",
    )
    dev: Path | None = option(None, "your own file to evaluate on (default: a random split of the data)", metavar="FILE")
    dev_share: float | None = option(
        None,
        f"fraction of your own data to evaluate on, stratified by class (default: {DEFAULT_DEV_SHARE})",
        bounds="(0, 1)",
        metavar="SHARE",
    )
    fold: str | None = option(
        None, "cross-validation on your own data: evaluate on fold K of N, train on the others", metavar="K/N"
    )
    text_column: str | None = option(
        None, "column of the texts in your own data; 0, 1, … if it has no header (default: text or sentence)", metavar="NAME"
    )
    text_pair_column: str | None = option(
        None, "column of the second texts, for tasks on pairs (default: none)", metavar="NAME"
    )
    label_column: str | None = option(None, "column of the labels in your own data (default: label)", metavar="NAME")
    problem: str | None = option(None, "kind of problem (default: inferred from the data)", choices=tuple(PROBLEMS))
    metric: str | None = option(
        None,
        "metric that selects the best checkpoint, such as accuracy, 'f1 (macro)', 'f1 (LABEL)', matthews, spearman, or loss "
        "(default: the task's; your own data: the first one that is printed)",
        metavar="NAME",
    )
    positive_label: str | None = option(
        None, "class of your own data whose F1 is computed (default: the mean F1 of all classes)", metavar="LABEL"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.task is not None:
            get_task(self.task)
        if self.dev is not None and self.dev_share is not None:
            raise FunnelError("dev_share cannot be combined with a dev file; use one of them", "dev_share")
        if self.fold is not None:
            parse_fold(self.fold)
            if self.dev is not None or self.dev_share is not None:
                raise FunnelError("fold cannot be combined with a dev file or share; the fold is the dev set", "fold")
        if self.task is None and self.data is not None:
            return
        own = ("dev", "dev_share", "fold", "text_column", "text_pair_column", "label_column", "problem", "positive_label")
        for name in own:
            if getattr(self, name) is not None:
                reason = f"task {self.task} defines its own" if self.task else "none is given"
                raise FunnelError(f"{name} only applies to your own data; {reason}", name)
        if self.metric is not None:
            with_metric(get_task(self.task or "demo"), self.metric)


def load_task(args: TaskArgs) -> Task:
    """The selected task with its files located, downloaded if necessary. Custom files are summarized in `description`.

    Raises:
        FunnelError: a file is missing, malformed or cannot be downloaded, or the metric does not apply to the task.
    """
    task = answer_spans.with_encoding(locate_task(args), args)
    if args.fold is not None and "dev" in task.files:
        raise FunnelError(f"fold cannot be combined with the dev set in {args.data}; pass the training file as data", "fold")
    return task if args.metric is None else with_metric(task, args.metric)


def split_off_dev(dataset: Dataset, args: TaskArgs, seed: int) -> tuple[Dataset, Dataset]:
    """Splits the data of a task without a dev set into a training and a dev set.

    Raises:
        FunnelError: there are not enough examples.
    """
    if args.fold is not None:
        return dataset.split_fold(*parse_fold(args.fold), seed)
    return dataset.split(args.dev_share or DEFAULT_DEV_SHARE, seed)


def locate_task(args: TaskArgs) -> Task:
    """The selected task, with its own metric."""
    if args.task is None and args.data is not None:
        if token_labels.is_own_task(args, args.data):
            return token_labels.open_task(args, args.data)
        if multiple_choice.has_choices(args, args.data):
            return multiple_choice.open_task(args, args.data)
        return answer_spans.open_task(args, args.data) or own_texts.open_task(args, args.data)
    if args.data is not None and os.path.isfile(args.data):
        found = f"expected a folder as data, found a file ({args.data.name})"
        raise FunnelError(f"task {args.task}: {found}; to train on your own file, pass no task", "task")
    return locate_files(get_task(args.task or "demo"), args.data)


def with_metric(task: Task, metric: str) -> Task:
    """The task with `metric` as the one that selects the best checkpoint.

    Args:
        metric: "f1" stands for the task's F1, whichever it is.

    Raises:
        FunnelError: the metric does not apply to the task.
    """
    functions = PROBLEMS[task.problem].metric_functions(task.label_names or [])
    names = [*(name for name in functions if name != "f1"), LOSS]
    own_f1 = next((name for name in task.metrics if name.startswith("f1")), None)
    chosen = own_f1 if metric == "f1" and own_f1 else metric
    if chosen not in {*names, own_f1}:
        choices = format_list(["f1", *names] if own_f1 else names)
        raise FunnelError(f"metric {metric!r} does not apply to {task.title}; choose from {choices}", "metric")
    return replace(task, metrics=tuple(dict.fromkeys([chosen, *task.metrics])))

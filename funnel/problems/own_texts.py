"""Tasks made of the user's own files of texts: classification, regression, and multi-label classification."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from funnel.data.custom import (
    MULTI_LABEL,
    ColumnChoice,
    Labels,
    check_dev_share,
    find_files,
    infer_labels,
    open_dev_file,
    open_examples,
)
from funnel.data.formats import check_file
from funnel.data.tasks import CUSTOM, REGRESSION_METRICS, Task
from funnel.errors import FunnelError, format_list

if TYPE_CHECKING:
    from funnel.problems.task_args import TaskArgs

METRICS = {
    "classification": ("accuracy", "f1 (macro)"),
    "regression": REGRESSION_METRICS,
    MULTI_LABEL: ("f1 (micro)", "f1 (macro)", "subset accuracy"),
}


def open_task(args: "TaskArgs", data: Path) -> Task:
    """A task made of the user's own files; its hyperparameters are those of QNLI and AG News.

    Raises:
        FunnelError: a file cannot be read, or its columns or labels are not as expected.
    """
    paths = find_files(data) if os.path.isdir(data) else {"train": data}
    if args.dev is not None:
        paths["dev"] = args.dev
    check_dev_share(args.dev_share, paths)
    for path in paths.values():
        check_file(path, "dev" if path == args.dev else "data")  # before either is read
    train = open_examples(paths["train"], ColumnChoice(args.text_column, args.text_pair_column, args.label_column))
    files = {"train": train}
    if "dev" in paths:
        files["dev"] = open_dev_file(paths["dev"], train, "data" if args.dev is None else "dev")
    labels = infer_labels(train, args.problem)
    metrics = METRICS[labels.problem]
    if args.positive_label is not None:
        metrics = ("accuracy", f"f1 ({_check_positive_label(args.positive_label, labels)})")
    lines = [*dict.fromkeys(file.description for file in files.values()), labels.description]
    task = Task(CUSTOM, data.resolve().name, labels.names, metrics, 32, 3, 2e-5, problem=labels.problem, files=files)
    return replace(task, description="\n".join(lines), warnings=labels.warnings)


def _check_positive_label(label: str, labels: Labels) -> str:
    """Returns the label, if it is one of the classes."""
    names = labels.names
    if labels.problem == MULTI_LABEL:
        raise FunnelError(f"positive_label {label!r}: examples have several labels; omit it", "positive_label")
    if names is None:
        raise FunnelError(f"positive_label {label!r}: the labels are scores, not classes; omit it", "positive_label")
    if label not in names.values():
        raise FunnelError(f"unknown positive_label {label!r}; choose from {format_list(names.values())}", "positive_label")
    if label == "macro":
        raise FunnelError(
            "positive_label 'macro': 'f1 (macro)' is the mean over all classes; rename the label", "positive_label"
        )
    return label

"""`funnel submit`: submission files for the GLUE server."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from funnel.cli.classifier import add_classifier_arguments, load_classifier
from funnel.cli.common import ArgumentParser, add_overwrite, check_output
from funnel.errors import FunnelError
from funnel.io import RUN_FILE

if TYPE_CHECKING:
    from funnel.data.tasks import Task


def add_submit(subparsers: "argparse._SubParsersAction[ArgumentParser]") -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "submit",
        help="submission files for the GLUE server",
        description="Predicts the unlabeled test files of the GLUE task that RUN was trained on, and writes the submission\n"
        "files that the GLUE server expects: all or none of them.",
    )
    add_classifier_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder that contains the task's test files, "
                        "or a GLUE folder that contains it")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write the submission files to")
    add_overwrite(parser)
    parser.set_defaults(work=submit)


def submit(args: argparse.Namespace) -> None:
    """Writes the submission files. Checks the run, the test files and the output folder first.

    Raises:
        FunnelError: one of them cannot be used; nothing is written.
    """
    from funnel.inference.predictions import write_glue_submission

    task = locate_test_files(trained_task(args.run), args.data)
    for source in task.tests.values():
        source.check()
    for name in task.tests:
        check_output(args.out / f"{name}.tsv", "out", [source.path for source in task.tests.values()], args.overwrite)
    with load_classifier(args) as classifier:
        paths = write_glue_submission(classifier, task, args.out)
    print(f"wrote {', '.join(map(str, paths))}")


def trained_task(run: Path) -> "Task":
    """The GLUE task that a run was trained on.

    Raises:
        FunnelError: the folder is not a run, or its task has no unlabeled test files.
    """
    from funnel.data.tasks import TASKS
    from funnel.inference.predictor import run_record

    name = run_record(run).get("task")
    if not isinstance(name, str):
        raise FunnelError(f"{run}: not a run or one of its checkpoints ({RUN_FILE} is missing or names no task)")
    if name not in TASKS or not TASKS[name].tests:
        raise FunnelError(f"{run}: trained on task {name}, which has no GLUE test files")
    return TASKS[name]


def locate_test_files(task: "Task", folder: Path) -> "Task":
    """The task with `tests` in a folder, or in its subfolder named after the task (GLUE/SST-2).

    Raises:
        FunnelError: a test file is missing, or the folder has the name of another task, whose files may have the same names
            and columns.
    """
    from funnel.data.tasks import TASKS, task_key

    if not os.path.isdir(folder):
        raise FunnelError(f"data {folder}: no such folder", "data")
    candidates = (folder, folder / task.title)
    first = next(iter(task.tests.values()))
    found = next((candidate for candidate in candidates if (candidate / first.path).exists()), folder)
    other = TASKS.get(task_key(found.resolve().name), task)
    if other.tests and other.name != task.name:
        raise FunnelError(f"data {folder}: the folder of {other.title}, but the run was trained on {task.title}", "data")
    tests = {name: source.in_folder(found) for name, source in task.tests.items()}
    for source in tests.values():
        if not source.path.is_file():
            raise FunnelError(f"{source.path}: no such file; the GLUE server expects predictions for it")
    return replace(task, tests=tests)

"""`funnel predict` and `funnel evaluate` for multiple-choice models."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funnel.cli.classifier import choose_output, load_predictor
from funnel.cli.common import flag
from funnel.errors import FunnelError, plural

if TYPE_CHECKING:
    from funnel.data.choices import ChoiceFile

COLUMN_OPTIONS = ("text_column", "text_pair_column", "label_column", "keep_columns")


def predict(args: argparse.Namespace) -> None:
    """Writes the answers to the questions of a file or folder.

    Raises:
        FunnelError: arguments do not apply, or the model or the file cannot be read.
    """
    from funnel.inference.choices import MultipleChoice
    from funnel.inference.predictions import SUFFIXES, write_choices

    if args.file is None:
        raise FunnelError("a multiple-choice model needs --file: a file or folder of questions with their choices")
    source = _open(args, args.file, labeled=False)
    out = choose_output(args, SUFFIXES, ".jsonl")
    with load_predictor(args, MultipleChoice) as model:
        count = write_choices(model.predict_file(source), out)
    print(f"wrote {plural(count, 'prediction')} to {out}")


def evaluate(args: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """Scores by name, and the error analysis, on a labeled file or folder."""
    from funnel.inference.choices import MultipleChoice

    source = _open(args, args.file, labeled=True)
    with load_predictor(args, MultipleChoice) as model:
        return model.evaluate_file(source, ["accuracy"])


def _open(args: argparse.Namespace, path: Path, labeled: bool) -> "ChoiceFile":
    """The file or folder of questions, if it exists."""
    from funnel.data.choices import ChoiceFile

    for name in COLUMN_OPTIONS:
        if getattr(args, name, None) is not None:
            raise FunnelError(f"{flag(name)} has no effect for multiple choice, whose fields have fixed names; omit it")
    if not path.exists():
        raise FunnelError(f"{path}: no such file or folder")
    return ChoiceFile(path, labeled)

"""`funnel predict` and `funnel evaluate` for models that answer questions."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funnel.cli.classifier import choose_output, load_predictor, read_standard_input
from funnel.cli.common import flag, positional
from funnel.errors import FunnelError, plural

if TYPE_CHECKING:
    from funnel.inference.answers import QuestionAnswerer

NOT_FOR_ANSWERS = ("text_column", "text_pair_column", "label_column", "keep_columns")


def load_answerer(args: argparse.Namespace) -> contextlib.AbstractContextManager["QuestionAnswerer"]:
    """As `load_predictor`, for a model that answers questions."""
    from funnel.inference.answers import QuestionAnswerer

    for name in NOT_FOR_ANSWERS:
        if getattr(args, name, None) is not None:
            raise FunnelError(f"{flag(name)} does not apply: the model answers questions, from files in the format of SQuAD")
    return load_predictor(args, QuestionAnswerer)


def predict(args: argparse.Namespace) -> None:
    """Prints the answers to questions, or writes those to a file in SQuAD's format: a JSON object of texts by question id.

    Raises:
        FunnelError: arguments conflict, the model cannot be loaded, or the input is malformed.
    """
    if args.texts and args.pair is None:
        raise FunnelError("--pair is required: the text that contains the answer")
    out = None if args.file is None else choose_output(args, (".json",), ".json")
    with load_answerer(args) as answerer:
        if out is not None:
            _predict_file(answerer, args.file, out)
        elif args.texts:
            _print_answers(answerer, args.texts, args.pair)
        else:
            for question, context in read_standard_input(has_pairs=True):
                _print_answers(answerer, [question], [context or ""])


def _predict_file(answerer: "QuestionAnswerer", path: Path, out: Path) -> None:
    from funnel.io import write_json

    answers = {question.id: answer.text for question, answer in answerer.predict_file(path)}
    write_json(out, answers)
    print(f"wrote {plural(len(answers), 'answer')} to {out}")


def _print_answers(answerer: "QuestionAnswerer", questions: list[str], contexts: list[str]) -> None:
    """Prints one tab-separated line per question: answer, probability, first and last character, question."""
    for question, answer in zip(questions, answerer(questions, contexts), strict=True):
        place = "-" if answer.start is None else f"{answer.start}-{answer.end}"
        fields = [answer.text or "(no answer)", f"{answer.probability:.1%}", place, question]
        print("\t".join(" ".join(field.split()) for field in fields), flush=True)


def evaluate(args: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """Scores by name and the error analysis on a file in SQuAD's format. The metrics are those of the run.

    Raises:
        FunnelError: the model cannot be loaded, or the file is malformed or has no answers.
    """
    from funnel.data.tasks import SPAN_METRICS
    from funnel.inference.predictor import run_record

    metrics = run_record(args.run).get("metrics") or SPAN_METRICS
    with load_answerer(args) as answerer, positional("file"):
        return answerer.evaluate_file(args.file, metrics)

"""`funnel predict`: labels and probabilities for texts, standard input, or a file; entities for token classifiers."""

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from funnel.cli import answers, choices, tokens
from funnel.cli.classifier import (
    add_classifier_arguments,
    add_ensemble,
    choose_output,
    load_classifier,
    read_standard_input,
)
from funnel.cli.common import ArgumentParser, add_overwrite, flag
from funnel.errors import FunnelError, format_list, plural

if TYPE_CHECKING:
    from funnel.data.files import ExampleFile
    from funnel.inference.classifier import Classifier

FILE_OPTIONS = ("out", "text_column", "text_pair_column", "keep_columns")


def add_predict(subparsers: "argparse._SubParsersAction[ArgumentParser]") -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser("predict", help="labels and probabilities for texts, or answers to questions")
    add_classifier_arguments(parser)
    parser.add_argument("texts", nargs="*", default=[], metavar="TEXT",
                        help="text (default: read standard input, one text per line, or two separated by a tab)")  # fmt: skip
    add_ensemble(parser)
    parser.add_argument("--pair", action="append", metavar="TEXT", help="second text of a pair; repeat for each TEXT")
    parser.add_argument("--file", type=Path, help="file of texts, in any format that train.py reads")
    parser.add_argument("--out", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl file, also gzipped (.gz), for the "
                        "predictions of --file; for answers to questions, a .json file (default: predictions-FILE in the "
                        "run's folder)")  # fmt: skip
    parser.add_argument("--text-column", metavar="NAME", help="text column of --file (default: as in training, else text or "
                        "sentence)")  # fmt: skip
    parser.add_argument("--text-pair-column", metavar="NAME", help="second text column of --file (default: as in training)")
    parser.add_argument("--keep-columns", nargs="*", metavar="NAME", help="also copy these columns of --file to the output; "
                        "without NAME, all of them")  # fmt: skip
    add_overwrite(parser)
    parser.set_defaults(work=predict, take_extra=_take_texts)


def _take_texts(args: argparse.Namespace, extra: list[str]) -> bool:
    """Accepts texts after options, which argparse leaves over once it has filled a positional list."""
    if any(argument.startswith("-") for argument in extra):
        return False
    args.texts += extra
    return True


def predict(args: argparse.Namespace) -> None:
    """Prints the predictions of texts, or writes those of a file.

    Raises:
        FunnelError: arguments conflict, the classifier cannot be loaded, or the input is malformed.
    """
    from funnel.inference.predictor import problem_name

    _check(args)
    problem = problem_name(args.run)
    if problem == "answer-spans":
        return answers.predict(args)
    if problem == "token-labels":
        return tokens.predict(args)
    if problem == "multiple-choice":
        return choices.predict(args)
    out = None if args.file is None else _choose_output(args)
    with load_classifier(args) as classifier:
        if out is not None:
            _predict_file(classifier, args, out)
        elif args.texts:
            classifier.check_pairs(args.pair is not None)
            _print_predictions(classifier, args.texts, args.pair)
        else:
            _predict_standard_input(classifier)


def _check(args: argparse.Namespace) -> None:
    if args.texts and args.file is not None:
        raise FunnelError("give either TEXT or --file, not both")
    if args.pair is not None and args.file is not None:
        raise FunnelError("--pair cannot be combined with --file; use --text-pair-column")
    for name in FILE_OPTIONS:
        if getattr(args, name) is not None and args.file is None:
            raise FunnelError(f"{flag(name)} requires --file")
    if args.pair is not None and len(args.pair) != len(args.texts):
        raise FunnelError(f"--pair: got {len(args.pair)} for {plural(len(args.texts), 'text')}; repeat it for each TEXT")


def _choose_output(args: argparse.Namespace) -> Path:
    """Checks --out, or chooses the default, which has the format of the file if possible."""
    from funnel.inference.predictions import SUFFIXES

    default = next((suffix for suffix in SUFFIXES if args.file.name.lower().endswith(suffix)), SUFFIXES[0])
    return choose_output(args, SUFFIXES, default)


def _predict_file(classifier: "Classifier", args: argparse.Namespace, out: Path) -> None:
    from funnel.data.custom import ColumnChoice
    from funnel.inference.predictions import write_predictions

    source = classifier.open_file(args.file, ColumnChoice(args.text_column, args.text_pair_column, labeled=False))
    if args.keep_columns is not None:
        source = _keep_columns(source, args.keep_columns)
    print(source.description, file=sys.stderr)
    count = write_predictions(classifier.predict_file(source), source, out)
    print(f"wrote {plural(count, 'prediction')} to {out}")


def _keep_columns(source: "ExampleFile", names: list[str]) -> "ExampleFile":
    """The file with further columns to copy to the output: all if no names are given."""
    columns = source.column_names()
    for name in names:
        if name not in columns:
            raise FunnelError(
                f"{source.path}: no column {name!r}; choose keep_columns from {format_list(columns)}", "keep_columns"
            )
    texts = {str(column) for column in source.text_columns}
    kept = [name for name in dict.fromkeys(names or columns) if name not in texts]
    return replace(source, extra_columns=tuple(name if source.has_header else int(name) for name in kept))


def _predict_standard_input(classifier: "Classifier") -> None:
    """Predicts line by line in a terminal, in chunks otherwise."""
    from funnel.inference.classifier import CHUNK_SIZE

    examples = read_standard_input(has_pairs=len(classifier.inputs.columns) == 2)
    while chunk := list(itertools.islice(examples, 1 if sys.stdin.isatty() else CHUNK_SIZE)):
        texts = [text for text, _ in chunk]
        pairs = [pair for _, pair in chunk if pair is not None]
        _print_predictions(classifier, texts, pairs or None)


def _print_predictions(classifier: "Classifier", texts: list[str], pairs: list[str] | None) -> None:
    """Prints one tab-separated line per text: label, probability (only of a single class), text, second text."""
    from funnel.inference.predictions import format_label

    for number, prediction in enumerate(classifier(texts, pairs)):
        fields = [format_label(prediction.label, digits=7)]
        if prediction.probability is not None:
            fields.append(f"{prediction.probability:.1%}")
        fields += [texts[number], *([pairs[number]] if pairs else [])]
        print("\t".join(" ".join(field.split()) for field in fields), flush=True)

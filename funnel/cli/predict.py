"""`funnel predict`: labels and probabilities for texts, standard input, or a file."""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from funnel.cli.classifier import add_classifier_arguments, load_classifier
from funnel.cli.common import ArgumentParser, flag
from funnel.errors import FunnelError, plural

if TYPE_CHECKING:
    from funnel.inference import Classifier

FILE_OPTIONS = ("out", "text_column", "text_pair_column")


def add_predict(subparsers: "argparse._SubParsersAction[ArgumentParser]") -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser("predict", help="labels and probabilities for texts")
    add_classifier_arguments(parser)
    parser.add_argument("texts", nargs="*", default=[], metavar="TEXT",
                        help="text (default: read standard input, one text per line, or two separated by a tab)")  # fmt: skip
    parser.add_argument("--pair", action="append", metavar="TEXT", help="second text of a pair; repeat for each TEXT")
    parser.add_argument("--file", type=Path, help=".tsv, .csv or .jsonl file of texts, also gzipped (.gz)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the predictions of --file, in any of these "
                        "formats (default: predictions-FILE in the run's folder)")  # fmt: skip
    parser.add_argument("--text-column", metavar="NAME", help="text column of --file (default: as in training, else text or "
                        "sentence)")  # fmt: skip
    parser.add_argument("--text-pair-column", metavar="NAME", help="second text column of --file (default: as in training)")
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
    _check(args)
    with load_classifier(args) as classifier:
        if args.file is not None:
            _predict_file(classifier, args)
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


def _predict_file(classifier: "Classifier", args: argparse.Namespace) -> None:
    from funnel.inference import write_predictions

    source = classifier.open_file(args.file, args.text_column, args.text_pair_column)
    out = args.out or args.run / f"predictions-{args.file.name}"
    if out.exists() and out.samefile(args.file):
        raise FunnelError(f"--out {out}: would overwrite --file; choose another name")
    count = write_predictions(classifier.predict_file(source), out)
    print(f"wrote {plural(count, 'prediction')} to {out}")


def _predict_standard_input(classifier: "Classifier") -> None:
    """Predicts line by line in a terminal, in chunks otherwise."""
    from funnel.inference import CHUNK_SIZE

    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("Enter one text per line; Ctrl-D to finish.", file=sys.stderr)
    examples = _read_standard_input(has_pairs=len(classifier.inputs.columns) == 2)
    while chunk := list(itertools.islice(examples, 1 if is_terminal else CHUNK_SIZE)):
        texts = [text for text, _ in chunk]
        pairs = [pair for _, pair in chunk if pair is not None]
        _print_predictions(classifier, texts, pairs or None)


def _read_standard_input(has_pairs: bool) -> Iterator[tuple[str, str | None]]:
    """Yields texts, or pairs of texts separated by a tab.

    Raises:
        FunnelError: a line is not UTF-8 text, or is not a pair.
    """
    from funnel.data.files import decode_lines

    for number, line in enumerate(decode_lines(sys.stdin.buffer, "standard input"), 1):
        text = line.rstrip("\r\n")
        if not has_pairs:
            yield text, None
            continue
        parts = text.split("\t")
        if len(parts) != 2:
            found = plural(len(parts) - 1, "tab")
            raise FunnelError(f"standard input, line {number}: expected two texts separated by a tab, found {found}")
        yield parts[0], parts[1]


def _print_predictions(classifier: "Classifier", texts: list[str], pairs: list[str] | None) -> None:
    """Prints one tab-separated line per text: label, probability (not for regression), text, second text."""
    for number, prediction in enumerate(classifier(texts, pairs)):
        fields = [prediction.label if isinstance(prediction.label, str) else f"{prediction.label:.4g}"]
        if prediction.probability is not None:
            fields.append(f"{prediction.probability:.1%}")
        fields += [texts[number], *([pairs[number]] if pairs else [])]
        print("\t".join(" ".join(field.split()) for field in fields), flush=True)

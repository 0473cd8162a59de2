"""Shared by the commands that use a trained model: loading it, its input and output."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from funnel.cli.common import check_output, files_of_run
from funnel.errors import FunnelError, plural

if TYPE_CHECKING:
    from funnel.inference.classifier import Classifier
    from funnel.inference.predictor import Predictor

AnyPredictor = TypeVar("AnyPredictor", bound="Predictor")


def add_classifier_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `load_classifier` reads."""
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder or checkpoint folder")
    add_device_arguments(parser)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say where a model runs."""
    # The choices repeat those of funnel.training.device, which imports PyTorch.
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="device (default: the fastest available)")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="dtype of matrix products (default: bf16 if the device supports it natively)",
    )


def add_ensemble(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that makes `load_classifier` load several classifiers."""
    parser.add_argument("--ensemble", nargs="+", action="extend", type=Path, metavar="RUN", help="average the predictions of "
                        "RUN and of these text classifiers, or of all runs in a folder")  # fmt: skip


@contextlib.contextmanager
def load_predictor(args: argparse.Namespace, kind: type[AnyPredictor]) -> Iterator[AnyPredictor]:
    """Yields the trained model; at the end, warns on standard error if texts were truncated.

    Raises:
        FunnelError: it cannot be loaded, or it is to be part of an ensemble and is not a classifier of texts.
    """
    if getattr(args, "ensemble", None):
        raise FunnelError(f"--ensemble averages the predictions of text classifiers; {args.run} is a {kind.title}")
    yield from _warn_at_end(kind.load(args.run, args.device, args.dtype))


def _warn_at_end(predictor: AnyPredictor) -> Iterator[AnyPredictor]:
    try:
        yield predictor
    finally:
        if predictor.truncation_note:
            print(f"warning: {predictor.truncation_note}", file=sys.stderr)


@contextlib.contextmanager
def load_classifier(args: argparse.Namespace) -> Iterator["Classifier"]:
    """As `load_predictor`, for a classifier of texts, or an ensemble of several."""
    from funnel.inference.classifier import Classifier
    from funnel.inference.ensemble import Ensemble

    if others := getattr(args, "ensemble", None):
        for path in others:
            if not path.is_dir():
                raise FunnelError(f"--ensemble {path}: no such folder; put texts before --ensemble")
        yield from _warn_at_end(Ensemble.load([args.run, *others], args.device, args.dtype))
    else:
        yield from _warn_at_end(Classifier.load(args.run, args.device, args.dtype))


def choose_output(args: argparse.Namespace, suffixes: Sequence[str], default: str) -> Path:
    """The file for the predictions of `args.file`: `args.out`, or predictions-FILE in the run's folder.

    Args:
        suffixes: that the name may have.
        default: suffix without `args.out`, whose file is replaced if it exists.

    Raises:
        FunnelError: the name has another suffix, or as `check_output`.
    """
    from funnel.data.formats import FORMATS
    from funnel.problems import token_labels

    if args.out is None:
        name = Path(args.file.name.removesuffix(".gz").removesuffix(".xz"))
        known = (*FORMATS, *token_labels.SUFFIXES)
        out = Path(args.run / f"predictions-{name.stem if name.suffix.lower() in known else name}{default}")
    else:
        out = Path(args.out)
        if not out.name.lower().endswith(tuple(suffixes)):
            expected = ", ".join(suffixes[:-1]) + " or " * (len(suffixes) > 1) + suffixes[-1]
            raise FunnelError(f"out {out}: unknown format; expected a {expected} file", "out")
    runs = (args.run, *(getattr(args, "ensemble", None) or ()))
    inputs = [args.file, *(file for run in runs for file in files_of_run(run))]
    check_output(out, "out", inputs, args.overwrite or args.out is None)
    return out


def read_standard_input(has_pairs: bool) -> Iterator[tuple[str, str | None]]:
    """Yields texts, or pairs of texts separated by a tab. In a terminal, asks for them.

    Raises:
        FunnelError: a line is not UTF-8 text, or is not a pair.
    """
    from funnel.data.formats import decode_lines

    if sys.stdin.isatty():
        expected = "two texts per line, separated by a tab" if has_pairs else "one text per line"
        print(f"Enter {expected}; Ctrl-D to finish.", file=sys.stderr)
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

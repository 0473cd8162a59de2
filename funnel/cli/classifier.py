"""Shared by the commands that use a trained classifier."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from funnel.errors import FunnelError

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

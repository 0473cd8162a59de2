"""Shared by the commands that use a trained classifier."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from funnel.inference.classifier import Classifier
    from funnel.inference.predictor import Predictor

AnyPredictor = TypeVar("AnyPredictor", bound="Predictor")


def add_classifier_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `load_classifier` reads."""
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder or checkpoint folder")
    # The choices repeat those of funnel.training.device, which imports PyTorch.
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="device (default: the fastest available)")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="dtype of matrix products (default: bf16 if the device supports it natively)",
    )


@contextlib.contextmanager
def load_predictor(args: argparse.Namespace, kind: type[AnyPredictor]) -> Iterator[AnyPredictor]:
    """Yields the trained model; at the end, warns on standard error if texts were truncated."""
    predictor = kind.load(args.run, args.device, args.dtype)
    try:
        yield predictor
    finally:
        if predictor.truncation_note:
            print(f"warning: {predictor.truncation_note}", file=sys.stderr)


def load_classifier(args: argparse.Namespace) -> contextlib.AbstractContextManager["Classifier"]:
    """As `load_predictor`, for a classifier of texts."""
    from funnel.inference.classifier import Classifier

    return load_predictor(args, Classifier)

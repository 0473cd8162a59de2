"""Shared by the commands that use a trained classifier."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from funnel.errors import plural

if TYPE_CHECKING:
    from funnel.inference import Classifier


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
def load_classifier(args: argparse.Namespace) -> Iterator["Classifier"]:
    """Yields the classifier; at the end, warns on standard error if texts were truncated."""
    from funnel.inference import Classifier

    classifier = Classifier.load(args.run, args.device, args.dtype)
    try:
        yield classifier
    finally:
        if classifier.n_truncated:
            truncated = plural(classifier.n_truncated, "text")
            verb = "was" if classifier.n_truncated == 1 else "were"
            print(f"warning: {truncated} {verb} truncated to {classifier.inputs.max_length} tokens", file=sys.stderr)

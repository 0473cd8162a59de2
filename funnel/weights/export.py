"""A model as one file that runs without this project: ONNX, and PyTorch's own exported program.

Both take input_ids, attention_mask and token_type_ids, [b, l] int64 each, of any number of texts and any length, and give
the logits. Attention runs in the plain way of attend.py, which both formats can express. Inputs are padded to a multiple
of 2**(blocks - 1) within, which changes no result (pooling.py says why) and lets one graph serve every length.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnel.errors import FunnelError, error_reason
from funnel.model.heads import Funnel, FunnelForSequenceClassification

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OPSET = 18  # of ONNX: what PyTorch's exporter writes without converting


class _Padded(nn.Module):
    """A model whose inputs may have any length, and whose inner lengths halve without a remainder."""

    def __init__(self, model: Funnel) -> None:
        super().__init__()
        self.model = model
        self.multiple = 2 ** (len(model.config.block_sizes) - 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        main_process_first = torch.stack([input_ids, attention_mask, token_type_ids])  # one shape for all three
        length = main_process_first.shape[2]
        # Three multiples at least: inner sizes of one are sizes that exporters treat apart.
        wanted = ((length - 1) // self.multiple + 3) * self.multiple
        return self.model(*F.pad(main_process_first, (0, wanted - length)).unbind())


def export_torch(model: Funnel) -> torch.export.ExportedProgram:
    """The model as an exported program; `torch.export.save` writes it, `.module()` calls it.

    Raises:
        FunnelError: it is no classifier of texts. The results of other heads have a place for every token, those that an
            exported model pads with among them.
    """
    if not isinstance(model, FunnelForSequenceClassification):
        raise FunnelError(f"a {type(model).__name__} cannot be exported, only a FunnelForSequenceClassification")
    example = tuple(torch.ones(2, 9, dtype=torch.int64) for _ in INPUTS)  # one tensor given thrice would be one input
    sizes = {0: torch.export.Dim("texts", min=1), 1: torch.export.Dim("length", min=1)}
    with _quietly():
        return torch.export.export(_Padded(model.eval()), example, dynamic_shapes=(sizes,) * 3, strict=False)


def export_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Writes what `export_torch` gave as an ONNX file with the inputs `INPUTS` and the output "logits".

    Raises:
        FunnelError: the packages of the extra "onnx" are not installed.
    """
    try:
        import onnxscript  # noqa: F401  # the exporter needs it
    except ImportError as error:
        raise FunnelError(f"ONNX needs the extra onnx ({error_reason(error)}): pip install -e '.[onnx]'") from None
    with _quietly():
        torch.onnx.export(
            program, (), path, input_names=INPUTS, output_names=["logits"], opset_version=OPSET,
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' notes to their own developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

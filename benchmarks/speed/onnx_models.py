"""The compared models as ONNX files, run with onnxruntime: float32 and int8 on both sides.

Both sides are exported for one shape. funnel's file for all lengths, as written by `funnel convert`, is measured, too; it pads
inside the graph. Both sides are quantized in the same way.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funnel.analysis.onnx_report import open_session
from funnel.data.batches import Batch
from funnel.model.heads import FunnelPreTrainedModel
from funnel.weights.export import INPUTS, OPSET, export_onnx, export_torch, quantize_onnx

Run = Callable[[], Any]


class _Logits(nn.Module):
    """A model that returns its logits as a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        output = self.model(input_ids, attention_mask, token_type_ids)
        return output if isinstance(output, Tensor) else output.logits


def onnx_runs(models: Mapping[str, nn.Module], batch: Batch) -> dict[str, dict[str, Run]]:
    """Functions that compute the logits of a batch with onnxruntime, by precision (fp32 and int8) and side.

    A model that cannot be exported is reported on standard error and left out.

    Args:
        models: float32 models in evaluation mode, by side.
    """
    runs: dict[str, dict[str, Run]] = {"fp32": {}, "int8": {}}
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        for side, model in models.items():
            path = Path(folder, f"{side}.onnx")
            if _export(model, batch, path):
                files[side] = path
            if isinstance(model, FunnelPreTrainedModel):
                path = files[f"{side}, any length"] = Path(folder, f"{side}-any.onnx")
                export_onnx(export_torch(model), path)
        for side, path in files.items():
            int8 = path.with_suffix(".int8.onnx")
            quantize_onnx(path, int8)
            runs["fp32"][side] = _open(path, batch)
            runs["int8"][side] = _open(int8, batch)
    return runs


def _export(model: nn.Module, batch: Batch, path: Path) -> bool:
    """Exports a model for the shape of a batch, with PyTorch's exporter or, if it fails, the older one."""
    arguments = tuple(batch.inputs[name] for name in INPUTS)
    for dynamo in (True, False):
        try:
            torch.onnx.export(
                _Logits(model).eval(), arguments, path, input_names=INPUTS, opset_version=OPSET, dynamo=dynamo,
                external_data=False, verbose=False,
            )  # fmt: skip
            return True
        except Exception as error:  # whatever the exporter or the model raises
            reason = (str(error).splitlines() or [""])[0][:120]
            print(f"  {type(model).__module__.split('.')[0]}: export with dynamo={dynamo} fails: {reason}", file=sys.stderr)
    return False


def _open(path: Path, batch: Batch) -> Run:
    session = open_session(path)
    names = {node.name for node in session.get_inputs()}  # an exporter may drop an unused input
    feed = {name: batch.inputs[name].numpy() for name in INPUTS if name in names}
    return lambda: session.run(None, feed)

"""Exporting models: for transformers, or a text classifier or multiple-choice model in one file that runs without this project,
ONNX or a PyTorch exported program.

The files take input_ids, attention_mask and token_type_ids, int64, [b, l] each, for multiple choice [b, c, l], of any sizes,
and return the logits, [b, k], of tokens [b, l, k], of choices [b, c]. They use the eager attention backend, whose operations
both formats support. Inputs are padded to a multiple of 2**(blocks - 1) inside the graph; this does not change results (see
pooling.py) and lets one graph serve all lengths. A text that is longer than the table of absolute positions is an error at run
time.

ONNX files can be quantized. That is dynamic: the weights are stored in int8, with a scale per output channel, and onnxruntime
rounds the other operand of each product to 8 bits at run time. Embeddings are int8, too. The products of two hidden states in
attention, softmax, LayerNorm and activations stay in float32.
"""

import contextlib
import importlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnel.data.tokenizer import DEFAULT_MAX_LENGTH
from funnel.errors import FunnelError, requires_extra
from funnel.io import write_json
from funnel.model import checkpoint
from funnel.model.checkpoint import Checkpoint
from funnel.model.config import FunnelConfig
from funnel.model.heads import MODELS, FunnelPreTrainedModel
from funnel.weights import bert_family, huggingface

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
UNITS = ("label_mean", "label_std")  # config fields that the graph applies
# Dimensions of the inputs, by the architectures that can be exported.
AXES = {
    name: ("batch", "choices", "length") if name == "FunnelForMultipleChoice" else ("batch", "length")
    for name in huggingface.WITH_ONNX
}
OPSET = 18  # native to PyTorch's exporter: needs no version conversion


class PaddedModel(nn.Module):
    """A model that pads its inputs, so that every pooled length is half the previous one without a remainder."""

    def __init__(self, model: FunnelPreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.multiple = 2 ** (len(model.config.blocks) - 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Logits of the model; if every token has some, without those of the padding."""
        inputs = torch.stack([input_ids, attention_mask, token_type_ids])  # tells the exporter that the shapes are equal
        length = inputs.shape[-1]
        # At least three multiples: exporters specialize on dimensions of size one.
        padded_length = ((length - 1) // self.multiple + 3) * self.multiple
        logits = self.model(*F.pad(inputs, (0, padded_length - length)).unbind())
        if not self.model.has_decoder:
            return logits
        return logits.index_select(1, torch.arange(length, device=logits.device))  # a slice would limit the length


def export_torch(model: FunnelPreTrainedModel) -> torch.export.ExportedProgram:
    """Exports a model with a head in `AXES`; `torch.export.save` writes the program, `.module()` makes it callable.

    Raises:
        FunnelError: the model has another head.
    """
    axes = _input_axes(type(model).__name__)
    shape = (2, 3, 9) if len(axes) == 3 else (2, 9)
    example = tuple(torch.ones(shape, dtype=torch.int64) for _ in INPUTS)  # a shared tensor would be a single input
    dynamic_shape = {number: torch.export.Dim(name, min=1) for number, name in enumerate(axes)}
    with _silence_exporter():
        return torch.export.export(PaddedModel(model.eval()), example, dynamic_shapes=(dynamic_shape,) * 3, strict=False)


def _input_axes(architecture: str) -> tuple[str, ...]:
    """The axes of a model's inputs."""
    if architecture not in AXES:
        raise FunnelError(f"cannot export a {architecture}, only {', '.join(AXES)}")
    return AXES[architecture]


def export_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Writes a program from `export_torch` as an ONNX file with the inputs `INPUTS` and the output "logits".

    Raises:
        FunnelError: the extra "onnx" is not installed.
    """
    _import_extra("onnxscript", "ONNX export")  # used by the exporter
    with _silence_exporter():
        torch.onnx.export(
            program,
            (),
            path,
            input_names=INPUTS,
            output_names=["logits"],
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def quantize_onnx(source: Path, target: Path) -> None:
    """Writes an ONNX file with int8 weights, for the same inputs.

    Raises:
        FunnelError: the extra "onnx" is not installed.
    """
    check_can_quantize()
    from onnxruntime.quantization import quant_pre_process, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "model.onnx")
        quant_pre_process(source, prepared, skip_symbolic_shape=True)  # folds constants, so that all weights are found
        quantize_dynamic(prepared, target, per_channel=True)


def check_can_quantize() -> None:
    """Raises FunnelError if the extra "onnx", which `quantize_onnx` needs, is not installed."""
    _import_extra("onnxruntime.quantization", "quantization")


def _import_extra(module: str, purpose: str) -> Any:
    with requires_extra("onnx", purpose):
        return importlib.import_module(module)


def max_length(config: FunnelConfig) -> int:
    """Maximum number of tokens per text: that of fine-tuning, limited by the position table."""
    return config.limit_length(config.model_max_length or DEFAULT_MAX_LENGTH)


def check_transformers(saved: Checkpoint) -> None:
    """Raises FunnelError if `write_transformers` cannot write the model. The weights are not used."""
    (huggingface if saved.config.family == "funnel" else bert_family).check_representable(saved)


def write_transformers(folder: Path, saved: Checkpoint) -> None:
    """Writes config.json and model.safetensors for transformers' `from_pretrained` into an existing folder.

    Writes Funnels in transformers' Funnel format, and BERT-like models of one block in their family's format.

    Raises:
        FunnelError: transformers has no such model.
    """
    write = huggingface.write_huggingface if saved.config.family == "funnel" else bert_family.write_bert
    write(folder, saved)


def write_onnx(folder: Path, saved: Checkpoint) -> None:
    """Writes model.onnx and config.json of a classifier or another model in `AXES` into an existing folder.

    config.json says how to use the graph: names of its inputs, maximum length, text columns and labels. The graph returns a
    regression's scores in the units of the labels.

    Raises:
        FunnelError: the checkpoint has another head, or the extra "onnx" is not installed.
    """
    _input_axes(saved.architecture)  # a bare model may have a pooler, which would be unexpected below
    model = MODELS[saved.architecture](saved.config)
    model.load_state_dict(saved.weights)
    export_onnx(export_torch(model), folder / "model.onnx")
    values = {
        **saved.config.to_dict(),
        "inputs": INPUTS,
        "model_max_length": max_length(saved.config),
    }
    write_json(folder / checkpoint.CONFIG, {name: value for name, value in values.items() if name not in UNITS})


@contextlib.contextmanager
def _silence_exporter() -> Iterator[None]:
    """Suppresses messages that are meant for the exporter's developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""Weights stored in 8 and 4 bits, compared with their definition in NumPy."""

import numpy as np
import pytest
import torch
from conftest import tiny_config

from funnel.errors import FunnelError
from funnel.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, save_weights
from funnel.model.heads import FunnelBaseModel
from funnel.model.quantization import dequantize, quantize


@pytest.mark.parametrize(("names", "largest"), [((), 127), (("a",), 7)])
def test_matrices_are_rounded_to_multiples_of_a_scale_per_row(names, largest):
    matrix = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1], [100], [1e-3], [0], [3]])
    restored = dequantize(quantize({"a": matrix}, names))["a"].numpy()
    scale = (np.abs(matrix.numpy()).max(1) / largest).clip(1e-6).astype(np.float16).astype(np.float32)[:, None]
    expected = np.clip(np.round(matrix.numpy() / scale), -largest, largest) * scale
    np.testing.assert_allclose(restored, expected, rtol=1e-6)
    assert (np.abs(restored - matrix.numpy()) <= 0.51 * scale + 1e-3 * np.abs(matrix.numpy())).all()


def test_sizes_and_dtypes():
    stored = quantize({"a": torch.randn(3, 8), "b": torch.randn(3, 8), "c": torch.randn(8)}, ["b"])
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        "a": (torch.int8, (3, 8)), "a.scale": (torch.float16, (3,)),
        "b": (torch.uint8, (3, 4)), "b.scale": (torch.float16, (3,)), "c": (torch.float16, (8,)),
    }  # fmt: skip


def test_a_quantized_checkpoint_loads_as_float32(tmp_path):
    model = FunnelBaseModel(tiny_config())
    save_checkpoint(tmp_path / "model", Checkpoint(model.config, model.state_dict(), "FunnelBaseModel"))
    save_weights(tmp_path / "model/model.safetensors", quantize(model.state_dict()))
    loaded = load_checkpoint(tmp_path / "model").weights
    assert loaded.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded[name].float(), tensor, rtol=0.01, atol=0.02)


def test_integers_without_a_scale_are_rejected(tmp_path):
    model = FunnelBaseModel(tiny_config())
    save_checkpoint(tmp_path / "model", Checkpoint(model.config, model.state_dict(), "FunnelBaseModel"))
    stored = quantize(model.state_dict())
    del stored["embeddings.word_embeddings.weight.scale"]
    save_weights(tmp_path / "model/model.safetensors", stored)
    with pytest.raises(FunnelError, match=r"embeddings.word_embeddings.weight is torch.int8"):
        load_checkpoint(tmp_path / "model")

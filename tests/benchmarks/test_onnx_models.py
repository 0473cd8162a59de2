"""The ONNX files that compare.py times compute the same logits as the models."""

import pytest
import torch
from conftest import tiny_config

from funnel.model.heads import FunnelForSequenceClassification


@pytest.mark.slow
def test_onnx_files_of_both_sides_compute_the_models_logits():
    for package in ("transformers", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    from benchmarks.speed.models import random_batch, transformers_copy
    from benchmarks.speed.onnx_models import onnx_runs

    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config(num_decoder_layers=0, vocab_size=30000)).eval()
    batch = random_batch((1, 16), torch.device("cpu"))
    runs = onnx_runs({"funnel": model, "transformers": transformers_copy(model).eval()}, batch)
    with torch.no_grad():
        expected = model(**batch.inputs)
    for precision, tolerance in (("fp32", 1e-5), ("int8", 0.05)):
        assert list(runs[precision]) == ["funnel", "funnel, any length", "transformers"]
        for run in runs[precision].values():
            torch.testing.assert_close(torch.from_numpy(run()[0]), expected, rtol=0, atol=tolerance)

"""The attention backends on a GPU, against the eager backend in float64 on the CPU. Skipped without a GPU."""

import pytest
import torch
from conftest import POSITIONS, padded_batch, tiny_config

from funnel.model.attention_backends import BACKENDS, attention_backend
from funnel.model.heads import FunnelForSequenceClassification

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


def logits_and_gradients(config, lengths, device, dtype, backend):
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(config)
    if model.encoder.distance_bias is not None:
        torch.nn.init.normal_(model.encoder.distance_bias.weight)  # initialized to zero
    model.to(dtype).to(device).eval()
    with attention_backend(backend):
        logits = model(*(tensor.to(device) for tensor in padded_batch(lengths)))
        logits.square().sum().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return [tensor.detach().double().cpu() for tensor in (logits, gradients)]


@pytest.mark.parametrize("blocks", ["1,2,1", "2,2x2", "1,1,1,1,1"])
@pytest.mark.parametrize("changes", [{}, {"truncate_seq": False}, {"separate_cls": False, "pool_q_only": False}])
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("lengths", [[1], [17, 5], [127, 128, 3]])
def test_backends_on_a_gpu_equal_the_reference(blocks, changes, positions, lengths):
    config = tiny_config(blocks=blocks, **changes, **positions)
    expected = logits_and_gradients(config, lengths, "cpu", torch.float64, "eager")
    for dtype, tolerance in TOLERANCES.items():
        for backend in BACKENDS:
            for actual, reference in zip(logits_and_gradients(config, lengths, "cuda", dtype, backend), expected, strict=True):
                scale = float(reference.abs().max())
                torch.testing.assert_close(actual, reference, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_step_in_bfloat16_on_a_gpu_has_finite_gradients(positions, backend):
    torch.manual_seed(0)
    config = tiny_config(hidden_dropout=0.1, attention_dropout=0.1, **positions)
    model = FunnelForSequenceClassification(config).cuda().train()
    with torch.autocast("cuda", torch.bfloat16), attention_backend(backend):
        logits = model(*(tensor.cuda() for tensor in padded_batch([33, 128, 5])))
    logits.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())

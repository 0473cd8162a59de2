"""Dropout: rate, scale, independence, gradient, seed."""

import pytest
import torch

from funnel.model.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_are_dropped_at_the_given_rate_and_the_others_scaled(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1000, 4001, dtype=dtype)
    output = Dropout(p)(x)
    rate = (output == 0).double().mean().item()
    assert abs(rate - p) < 1 / 65536 + 5 * (p * (1 - p) / x.numel()) ** 0.5
    scale = 1 / (1 - round(p * 65536) / 65536)
    torch.testing.assert_close(output[output != 0].unique(), torch.tensor([scale], dtype=dtype))


def test_elements_are_dropped_independently():
    torch.manual_seed(0)
    dropped = (Dropout(0.5)(torch.ones(4, 100_000)) == 0).double()
    for lag in (1, 2, 3, 4, 8):
        correlation = torch.corrcoef(torch.stack([dropped[0, :-lag], dropped[0, lag:]]))[0, 1]
        assert abs(correlation) < 0.02, lag
    assert torch.corrcoef(dropped).fill_diagonal_(0).abs().max() < 0.02


def test_gradient_uses_the_mask_of_the_forward_pass():
    x = torch.randn(33, 7, requires_grad=True)
    output = Dropout(0.3)(x)
    output.sum().backward()
    torch.testing.assert_close(x.grad, output.detach() / x.detach())


def test_the_seed_determines_the_mask():
    x, dropout = torch.randn(99), Dropout(0.3)
    torch.manual_seed(1)
    first = dropout(x)
    assert not torch.equal(dropout(x), first)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first)


def test_evaluation_mode_drops_nothing():
    x = torch.randn(99)
    assert torch.equal(Dropout(0.3).eval()(x), x)

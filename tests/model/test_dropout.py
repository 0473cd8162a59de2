"""Dropout against PyTorch's definition: rate, scale, gradient, seed."""

import pytest
import torch

from funnel.model import attention_backends
from funnel.model.attention_backends import AttentionTerms
from funnel.model.dropout import Dropout, share_of_batch


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rate_and_scale(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1000, 4001, dtype=dtype)
    out = Dropout(p)(x)
    share = (out == 0).double().mean().item()
    assert abs(share - p) < 1 / 65536 + 5 * (p * (1 - p) / x.numel()) ** 0.5
    scale = 1 / (1 - round(p * 65536) / 65536)
    torch.testing.assert_close(out[out != 0].unique(), torch.tensor([scale], dtype=dtype))


def test_elements_are_dropped_independently():
    torch.manual_seed(0)
    dropped = (Dropout(0.5)(torch.ones(4, 100_000)) == 0).double()
    for lag in (1, 2, 3, 4, 8):
        correlation = torch.corrcoef(torch.stack([dropped[0, :-lag], dropped[0, lag:]]))[0, 1]
        assert abs(correlation) < 0.02, lag
    assert torch.corrcoef(dropped).fill_diagonal_(0).abs().max() < 0.02


def test_the_gradient_goes_where_the_value_went():
    x = torch.randn(33, 7, requires_grad=True)
    out = Dropout(0.3)(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach() / x.detach())


def test_the_seed_decides_and_evaluation_drops_nothing():
    x, dropout = torch.randn(99), Dropout(0.3)
    torch.manual_seed(1)
    first = dropout(x)
    assert not torch.equal(dropout(x), first)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first)
    assert torch.equal(dropout.eval()(x), x)


def test_processes_that_share_a_batch_drop_what_one_would_drop():
    x = torch.ones(7, 5, 6)
    torch.manual_seed(1)
    whole = Dropout(0.3)(x)
    for first, last in ((0, 3), (3, 4), (4, 7)):
        torch.manual_seed(1)
        with share_of_batch(first, 7):
            assert torch.equal(Dropout(0.3)(x[first:last]), whole[first:last])
        torch.manual_seed(1)
        with share_of_batch(first, 7):  # sines and cosines are the same for all texts
            assert torch.equal(Dropout(0.3, by_text=False)(x), whole)


@pytest.mark.parametrize("way", ["plain", "tiled"])
@pytest.mark.parametrize("tile", [2**19, 300, 60, 7])
def test_so_does_attention_whatever_its_tiles(way, tile, monkeypatch):
    monkeypatch.setattr(attention_backends, "TILE", tile)
    b, q, k, h, c = 7, 3, 6, 4, 2
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = [draw(b, q, h, c), draw(b, k, h, c), draw(b, k, h, c), draw(k + 2 * q, h, c), draw(h, c), draw(h, c)]
    tensors += [draw(b, q, h, 2), draw(b, k, 2), torch.ones(b, k, dtype=torch.bool)]

    def gradients(rows, share):
        parts = [t[rows].clone() if len(t) == b and i not in (3, 4, 5) else t.clone() for i, t in enumerate(tensors)]
        for part in parts[:7]:
            part.requires_grad_()
        torch.manual_seed(5)
        with share_of_batch(*share), attention_backends.way(way):
            out = attention_backends.attend(AttentionTerms(*parts, step=2, separate_cls=True), 0.4)
            out.square().sum().backward()
        return [out.detach()] + [part.grad for part in parts[:7]]

    whole = gradients(slice(0, b), (0, b))
    parts = [gradients(slice(first, last), (first, b)) for first, last in ((0, 2), (2, 3), (3, 7))]
    for i, expected in enumerate(whole):
        found = [part[i] for part in parts]
        joined = sum(found) if i in (4, 5, 6) else torch.cat(found)
        torch.testing.assert_close(joined, expected, rtol=1e-5, atol=1e-5)

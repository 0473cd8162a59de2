"""The ways of attention against the plain one in float64: values, gradients, dropout, memory."""

import itertools

import pytest
import torch
from conftest import padded_batch, tiny_config

from funnel.errors import FunnelError
from funnel.model import attention_backends
from funnel.model.attention_backends import AttentionTerms, relative_shift
from funnel.model.heads import FunnelForSequenceClassification, FunnelModel


@pytest.mark.parametrize("queries", [1, 2, 5, 8])
@pytest.mark.parametrize("keys", [1, 3, 8])
@pytest.mark.parametrize("step", [1, 2])
def test_the_shift_reads_the_right_distance_for_every_pair(queries, keys, step):
    # Column c of the table stands for the distance step * (queries - 1) - c, in keys.
    table = (step * (queries - 1) - torch.arange(keys + step * queries)).expand(1, 1, queries, -1).contiguous()
    shifted = relative_shift(table, keys, step)
    for i, j in itertools.product(range(queries), range(keys)):
        assert shifted[0, 0, i, j] == step * i - j


def test_the_shift_is_a_view():
    table = torch.randn(2, 3, 5, 8 + 5)
    shifted = relative_shift(table, 8, 1)
    assert shifted.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()


def some_terms(b, q, k, h, c, s, step, separate_cls, dtype=torch.float64):
    """Random terms, and those of them that have gradients."""
    shapes = [(b, q, h, c), (b, k, h, c), (b, k, h, c), (k + step * q, h, c), (h, c), (h, c), (b, q, h, s)]
    generator = torch.Generator().manual_seed(0)
    free = [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    key_segments = torch.randint(0, 2, (b, k, s), generator=generator).to(dtype)
    key_mask = torch.rand(b, k, generator=generator) > 0.3
    key_mask[:, 0] = True
    return AttentionTerms(*free, key_segments, key_mask, step, separate_cls), free


SIZES = [
    (3, 9, 9, 2, 4, 4, 1, True),
    (3, 9, 9, 2, 4, 4, 1, False),
    (2, 5, 9, 3, 4, 4, 2, True),
    (2, 1, 9, 3, 4, 4, 1, True),
    (1, 1, 1, 1, 2, 4, 1, True),
    (4, 33, 65, 2, 8, 4, 2, False),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("way", ["sdpa", "tiled"])
@pytest.mark.parametrize(("tile", "kept"), [(2**19, 128), (2**19, 0), (600, 128), (600, 0), (100, 0), (10, 0)])
def test_all_ways_give_the_same_values_and_gradients(sizes, way, tile, kept, monkeypatch):
    monkeypatch.setattr(attention_backends, "TILE", tile)
    monkeypatch.setattr(attention_backends, "KEPT", kept)
    terms, free = some_terms(*sizes)
    expected = attention_backends.plain(terms, 0.0)
    weight = torch.randn_like(expected)
    found = attention_backends.BACKENDS[way](terms, 0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad((expected * weight).sum(), free)
    for mine, reference in zip(torch.autograd.grad((found * weight).sum(), free), wanted, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize("tile", [2**19, 10])
@pytest.mark.parametrize("kept", [128, 0])
def test_the_gradient_sees_the_same_dropout_as_the_value(tile, kept, monkeypatch):
    monkeypatch.setattr(attention_backends, "TILE", tile)
    monkeypatch.setattr(attention_backends, "KEPT", kept)
    terms, free = some_terms(2, 3, 6, 2, 3, 4, 2, False)

    def value(*tensors):
        torch.manual_seed(7)
        return attention_backends.tiled(AttentionTerms(*tensors, *terms[7:]), 0.3)

    assert torch.autograd.gradcheck(value, free)


def test_dropout_drops_weights_at_its_rate_and_keeps_the_mean():
    b, k = 64, 200
    terms, _ = some_terms(b, k, k, 2, 4, 4, 1, True, torch.float32)
    v = torch.ones_like(terms.v)
    with torch.no_grad():
        out = attention_backends.tiled(terms._replace(v=v, q=0 * terms.q, segments=0 * terms.segments, w_bias=0 * terms.w_bias,
                                          r_bias=0 * terms.r_bias, key_mask=torch.ones_like(terms.key_mask)), 0.25)  # fmt: skip
    # Equal weights on values of one: each output is the mean of k masks, 0 or 4/3.
    assert abs(out.mean().item() - 1) < 0.01
    assert abs(out[..., 0].var().item() - (0.25 / 0.75) / k) < 0.1 * (0.25 / 0.75) / k


@pytest.mark.parametrize("tile", [2**19, 3 * 32, 32])
def test_every_head_text_and_query_has_a_mask_of_its_own(tile, monkeypatch):
    monkeypatch.setattr(attention_backends, "TILE", tile)
    b, k, h = 3, 32, 2
    terms, _ = some_terms(b, k, k, h, k, 4, 1, True)
    v = torch.eye(k, dtype=terms.v.dtype)[None, :, None].expand(b, k, h, k)  # the result is the weights themselves
    with torch.no_grad():
        weights = attention_backends.tiled(terms._replace(v=v, key_mask=torch.ones_like(terms.key_mask)), 0.5)
    masks = (weights != 0).flatten(0, 2)  # [b * q * h, k]
    assert len(masks.unique(dim=0)) == len(masks)


def test_the_seed_decides_the_dropout():
    terms, _ = some_terms(2, 9, 9, 2, 4, 4, 1, True)
    torch.manual_seed(1)
    first = attention_backends.tiled(terms, 0.5)
    assert not torch.equal(attention_backends.tiled(terms, 0.5), first)
    torch.manual_seed(1)
    assert torch.equal(attention_backends.tiled(terms, 0.5), first)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("way", ["tiled", "sdpa"])
def test_models_give_the_same_logits_in_every_way(dtype, tolerance, way):
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config(d_model=32, d_head=16)).to(dtype).eval()
    batch = padded_batch([5, 40, 64, 1])
    with torch.no_grad():
        with attention_backends.way("plain"):
            expected = model(*batch)
        with attention_backends.way(way):
            torch.testing.assert_close(model(*batch), expected, rtol=0, atol=tolerance)


def test_training_is_the_same_in_every_way():
    """Loss curves of 200 steps lie on each other."""
    curves = {}
    for way in ("plain", "tiled"):
        torch.manual_seed(0)
        model = FunnelForSequenceClassification(tiny_config(vocab_size=99)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator().manual_seed(1)
        curves[way] = []
        for step in range(200):
            batch = padded_batch([9, 12, 20, 3], seed=step)
            labels = torch.randint(0, 2, (4,), generator=generator)
            with attention_backends.way(way):
                loss = torch.nn.functional.cross_entropy(model(*batch), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[way].append(loss.item())
    assert len(set(curves["plain"])) > 190  # it does train
    torch.testing.assert_close(torch.tensor(curves["tiled"]), torch.tensor(curves["plain"]), rtol=0, atol=2e-3)


@pytest.mark.parametrize("grad", [False, True])
def test_long_inputs_never_hold_all_scores(grad, monkeypatch):
    monkeypatch.setattr(attention_backends, "TILE", 4096)
    model = FunnelModel(tiny_config(num_decoder_layers=0)).train(grad)
    length = 700
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with torch.set_grad_enabled(grad), Watch():
        out = model(*padded_batch([length])).sum()
        if grad:
            out.backward()
    assert 0 < largest < length * length / 4


def test_an_unknown_way_is_refused():
    with pytest.raises(FunnelError, match="plain, tiled, sdpa"), attention_backends.way("fast"):
        pass

"""Attention backends compared with eager in float64: values, gradients, dropout, memory; selection and weight capture."""

import contextlib
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch
from conftest import POSITIONS, padded_batch, tiny_config

from funnel.errors import FunnelError
from funnel.model import attention_backends, tiled_attention
from funnel.model.attention_backends import BACKENDS, attention_backend, capture_attention_weights, compute_attention, eager
from funnel.model.attention_terms import AttentionTerms, RelativeTerms, relative_shift
from funnel.model.heads import FunnelForSequenceClassification, FunnelForTokenClassification, FunnelModel
from funnel.model.tiled_attention import NUM_TENSORS, _flatten, _unflatten

tiled = BACKENDS["tiled"]
LIMITS = [(2**19, 128), (2**19, 0), (600, 128), (600, 0), (100, 0), (10, 0)]  # of `set_limits`


@pytest.fixture
def set_limits(monkeypatch):
    """Sets the tile size and the number of keys up to which attention weights are saved."""

    def set_limits(tile_size: int, max_keys_to_save: int = 128) -> None:
        monkeypatch.setattr(tiled_attention, "TILE_SIZE", tile_size)
        monkeypatch.setattr(tiled_attention, "MAX_KEYS_TO_SAVE", max_keys_to_save)

    return set_limits


# --- the relative shift -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 2, 5, 8])
@pytest.mark.parametrize("keys", [1, 3, 8])
@pytest.mark.parametrize("step", [1, 2])
def test_relative_shift_reads_the_distance_of_every_pair(queries, keys, step):
    distances = step * (queries - 1) - torch.arange(keys + step * queries)  # of the table's columns, in keys
    table = distances.expand(1, 1, queries, -1).contiguous()
    shifted = relative_shift(table, keys, step)
    assert shifted.shape == (1, 1, queries, keys)
    for i, j in itertools.product(range(queries), range(keys)):
        assert shifted[0, 0, i, j] == step * i - j


def test_relative_shift_is_a_view():
    table = torch.randn(2, 3, 5, 8 + 5)
    shifted = relative_shift(table, 8, 1)
    assert shifted.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()


# --- values and gradients ---------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Sizes of random terms, in the notation of attention_terms.py."""

    b: int
    q: int
    k: int
    h: int
    c: int
    step: int = 1
    separate_cls: bool = True


TERMS = ("none", "distance bias", "relative", "relative and distance bias")  # besides the content scores
NUM_SEGMENTS = 4


def random_terms(sizes: Sizes, kind: str = "relative", dtype: torch.dtype = torch.float64) -> AttentionTerms:
    """Random terms; all floating-point tensors but `key_segments` have gradients."""
    b, q, k, h, c, step, separate_cls = sizes
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()

    key_mask = torch.rand(b, k, generator=generator) > 0.3
    key_mask[:, 0] = True
    bias = random(h, q, k) if "distance bias" in kind else None
    relative = None
    if "relative" in kind:
        key_segments = torch.randint(0, 2, (b, k, NUM_SEGMENTS), generator=generator).to(dtype)
        table, segments = random(k + step * q, h, c), random(b, q, h, NUM_SEGMENTS)
        relative = RelativeTerms(table, random(h, c), random(h, c), segments, key_segments, step, separate_cls)
    return AttentionTerms(random(b, q, h, c), random(b, k, h, c), random(b, k, h, c), key_mask, bias, relative)


def operands(terms: AttentionTerms) -> list[torch.Tensor]:
    """The tensors with a gradient."""
    return [x for x in _flatten(terms) if isinstance(x, torch.Tensor) and x.requires_grad]


def with_operands(terms: AttentionTerms, tensors: Iterable[torch.Tensor]) -> AttentionTerms:
    """Replaces the tensors with a gradient."""
    replacements = iter(tensors)
    arguments = [next(replacements) if isinstance(x, torch.Tensor) and x.requires_grad else x for x in _flatten(terms)]
    return _unflatten(arguments)


@pytest.mark.parametrize("kind", TERMS)
def test_flattened_terms_are_restored(kind):
    terms = random_terms(Sizes(2, 3, 3, 2, 4), kind)
    arguments = _flatten(terms)
    assert not any(isinstance(argument, torch.Tensor) for argument in arguments[NUM_TENSORS:])
    restored = _flatten(_unflatten(arguments))
    assert all(actual is expected for actual, expected in zip(restored, arguments, strict=True))


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(3, 9, 9, 2, 4),
        Sizes(3, 9, 9, 2, 4, separate_cls=False),
        Sizes(2, 5, 9, 3, 4, step=2),
        Sizes(2, 1, 9, 3, 4),
        Sizes(1, 1, 1, 1, 2),
        Sizes(4, 33, 65, 2, 8, step=2, separate_cls=False),
    ],
    ids=lambda sizes: "-".join(map(str, sizes)),
)
@pytest.mark.parametrize("backend", ["sdpa", "tiled"])
@pytest.mark.parametrize("kind", TERMS)
def test_all_backends_give_the_same_values_and_gradients(sizes, backend, kind, set_limits):
    terms = random_terms(sizes, kind)
    expected = eager(terms, 0.0)
    weight = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), operands(terms))
    for tile_size, max_keys_to_save in LIMITS if backend == "tiled" else LIMITS[:1]:
        set_limits(tile_size, max_keys_to_save)
        actual = BACKENDS[backend](terms, 0.0)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        gradients = torch.autograd.grad((actual * weight).sum(), operands(terms))
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", ["tiled", "sdpa"])
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_models_give_the_same_logits_with_all_backends(dtype, tolerance, backend, positions):
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config(d_model=32, d_head=16, **positions)).to(dtype).eval()
    batch = padded_batch([5, 40, 64, 1])
    with torch.no_grad():
        with attention_backend("eager"):
            expected = model(*batch)
        with attention_backend(backend):
            torch.testing.assert_close(model(*batch), expected, rtol=0, atol=tolerance)


def test_training_for_200_steps_gives_the_same_losses_with_the_eager_and_the_tiled_backend():
    losses = {}
    for backend in ("eager", "tiled"):
        torch.manual_seed(0)
        model = FunnelForSequenceClassification(tiny_config(vocab_size=99)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator().manual_seed(1)
        losses[backend] = []
        for step in range(200):
            batch = padded_batch([9, 12, 20, 3], seed=step)
            labels = torch.randint(0, 2, (4,), generator=generator)
            with attention_backend(backend):
                loss = torch.nn.functional.cross_entropy(model(*batch), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    assert len(set(losses["eager"])) > 190  # the model does train
    torch.testing.assert_close(torch.tensor(losses["tiled"]), torch.tensor(losses["eager"]), rtol=0, atol=2e-3)


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile_size", [2**19, 10])
@pytest.mark.parametrize("max_keys_to_save", [128, 0])
@pytest.mark.parametrize("kind", TERMS)
def test_gradient_uses_the_dropout_mask_of_the_forward_pass(tile_size, max_keys_to_save, kind, set_limits):
    set_limits(tile_size, max_keys_to_save)
    terms = random_terms(Sizes(2, 3, 6, 2, 3, step=2, separate_cls=False), kind)

    def attention(*tensors):
        torch.manual_seed(7)
        return tiled(with_operands(terms, tensors), 0.3)

    assert torch.autograd.gradcheck(attention, operands(terms))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_dropout_has_the_given_rate_and_keeps_the_mean(backend):
    b, k, p = 64, 200, 0.25
    terms = random_terms(Sizes(b, k, k, 2, 4), "none", torch.float32)
    uniform = terms._replace(q=0 * terms.q, key_mask=torch.ones_like(terms.key_mask), v=torch.ones_like(terms.v))
    with torch.no_grad():
        output = BACKENDS[backend](uniform, p)
    # With equal weights on values of 1, each output is the mean of k mask elements, which are 0 or 1 / (1 - p).
    assert abs(output.mean().item() - 1) < 0.01
    expected_variance = p / (1 - p) / k
    assert abs(output[..., 0].var().item() - expected_variance) < 0.1 * expected_variance


@pytest.mark.parametrize("tile_size", [2**19, 3 * 32, 32])
@pytest.mark.parametrize("kind", TERMS)
def test_every_head_example_and_query_has_its_own_dropout_mask(tile_size, kind, set_limits):
    set_limits(tile_size)
    b, k, h = 3, 32, 2
    terms = random_terms(Sizes(b, k, k, h, k), kind)
    identity = torch.eye(k, dtype=terms.v.dtype)[None, :, None].expand(b, k, h, k)  # the output is the weights themselves
    with torch.no_grad():
        weights = tiled(terms._replace(v=identity, key_mask=torch.ones_like(terms.key_mask)), 0.5)
    masks = (weights != 0).flatten(0, 2)  # [b * q * h, k]
    assert len(masks.unique(dim=0)) == len(masks)


def test_the_seed_determines_attention_dropout():
    terms = random_terms(Sizes(2, 9, 9, 2, 4))
    torch.manual_seed(1)
    first = tiled(terms, 0.5)
    assert not torch.equal(tiled(terms, 0.5), first)
    torch.manual_seed(1)
    assert torch.equal(tiled(terms, 0.5), first)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("relative_attention", [True, False])
def test_long_inputs_never_hold_all_scores_at_once(with_gradient, relative_attention, set_limits):
    set_limits(tile_size=4096)
    model = FunnelModel(tiny_config(num_decoder_layers=0, relative_attention=relative_attention)).train(with_gradient)
    length = 700
    largest = 0

    class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with torch.set_grad_enabled(with_gradient), LargestTensor():
        output = model(*padded_batch([length])).sum()
        if with_gradient:
            output.backward()
    assert 0 < largest < length * length / 4


# --- selection and capture --------------------------------------------------------------------------------------------


def test_an_unknown_backend_is_an_error():
    with pytest.raises(FunnelError) as error, attention_backend("x"):
        pass
    assert str(error.value) == f"unknown attention backend 'x'; choose from {', '.join(BACKENDS)}"


def test_the_backend_is_restored_after_the_context_even_after_an_error(monkeypatch):
    calls = []
    for name in BACKENDS:
        monkeypatch.setitem(BACKENDS, name, lambda terms, dropout_p, name=name: calls.append(name))
    monkeypatch.setattr(attention_backends, "tiled_attention", lambda terms, dropout_p: calls.append("default"))
    terms = random_terms(Sizes(1, 2, 2, 1, 2))
    with attention_backend("sdpa"):
        with contextlib.suppress(RuntimeError), attention_backend("eager"):
            compute_attention(terms, 0.0)
            raise RuntimeError
        compute_attention(terms, 0.0)
    compute_attention(terms, 0.0)
    assert calls == ["eager", "sdpa", "default"]


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_capture_yields_the_attention_weights_of_every_run(positions):
    model = FunnelForSequenceClassification(tiny_config(blocks="1,1x2", n_head=2, **positions)).eval()
    ids, mask, types = padded_batch([8, 5])
    expected = model(ids, mask, types)
    with capture_attention_weights() as weights:
        torch.testing.assert_close(model(ids, mask, types), expected)
    assert [tuple(layer.shape) for layer in weights] == [(2, 2, 8, 8), (2, 2, 4, 8), (2, 2, 1, 4)]  # [b, h, q, k]
    for layer in weights:
        torch.testing.assert_close(layer.sum(-1), torch.ones(layer.shape[:-1]))
    assert not weights[0][1, :, :, 5:].any()  # padding gets no attention
    model(ids, mask, types)
    assert len(weights) == 3


def test_the_backend_also_applies_when_gradient_checkpointing_recomputes():
    model = FunnelForTokenClassification(tiny_config()).train()
    model.set_gradient_checkpointing(True)
    runs = sum(block.runs for block in model.config.blocks) + model.config.num_decoder_layers
    with capture_attention_weights() as weights:
        model(*padded_batch([9])).sum().backward()
    assert len(weights) == 2 * runs

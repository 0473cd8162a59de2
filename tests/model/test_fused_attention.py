"""The Triton kernels compared with eager in float64: on a GPU, or on the CPU in Triton's interpreter."""

import pytest
import torch
from test_attention_backends import Sizes, operands, random_terms, with_operands
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from funnel.model.attention_backends import _attention_weights, eager
from funnel.model.attention_terms import AttentionTerms

triton = pytest.importorskip("triton", reason="needs Triton")
fused_attention = pytest.importorskip("funnel.model.fused_attention")
is_supported = fused_attention.is_supported
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def count_kernel(TOTAL, N):
    total = 0
    for _ in range(0, N):
        total += 1
    triton.language.store(TOTAL, total)


def can_run_kernels() -> bool:
    """Some versions of Triton's interpreter do not work with some versions of NumPy."""
    total = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    try:
        count_kernel[(1,)](total, 3)
    except Exception:
        return False
    return int(total) == 3


TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2}
if DEVICE == "cuda":
    TOLERANCES[torch.bfloat16] = 5e-2  # the interpreter multiplies bfloat16 matrices incorrectly

pytestmark = pytest.mark.skipif(not can_run_kernels(), reason="Triton's interpreter does not work with this NumPy")

SIZES = [
    Sizes(2, 1, 1, 2, 16),
    Sizes(2, 17, 17, 2, 16),
    Sizes(1, 64, 64, 2, 32, separate_cls=False),
    Sizes(1, 64, 127, 1, 16, step=2),
    Sizes(1, 128, 128, 1, 8),
    Sizes(1, 96, 192, 1, 16, step=2, separate_cls=False),
    Sizes(2, 1, 33, 2, 24, step=2),
]


def on_device(terms: AttentionTerms, dtype: torch.dtype) -> AttentionTerms:
    """The terms in another dtype, on the device of the test."""

    def convert(x):
        return x.to(DEVICE, dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    relative = type(terms.relative)(*map(convert, terms.relative))
    terms = AttentionTerms(*map(convert, terms[:3]), terms.key_mask.to(DEVICE), None, relative)
    return with_operands(terms, [x.detach().requires_grad_() for x in operands(terms)])


def results(backend, terms: AttentionTerms, dropout_p: float = 0.0) -> list[torch.Tensor]:
    """Output and gradients, in float64 on the CPU."""
    output = backend(terms, dropout_p)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(output, operands(terms), weight.to(output))
    return [x.detach().double().cpu() for x in (output, *gradients)]


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    scale = max(float(reference.norm()) for reference in expected)  # some gradients are zero
    for x, reference in zip(actual, expected, strict=True):
        assert float((x - reference).norm()) <= tolerance * max(float(reference.norm()), 0.1 * scale)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_values_and_gradients_equal_the_reference(sizes, dtype):
    terms = on_device(random_terms(sizes), dtype)
    exact = with_operands(random_terms(sizes), [x.detach().double().cpu().requires_grad_() for x in operands(terms)])
    assert is_supported(terms)
    assert_close(results(fused_attention.fused_attention, terms), results(eager, exact), TOLERANCES[dtype])


@pytest.mark.slow
def test_values_and_gradients_of_several_chunks_equal_the_reference():
    test_values_and_gradients_equal_the_reference(Sizes(1, 513, 513, 1, 16), torch.float32)


@pytest.mark.parametrize("sizes", [Sizes(5, 41, 41, 2, 16), Sizes(3, 35, 70, 2, 16, step=2)], ids=["step 1", "step 2"])
def test_chunks_of_examples_and_queries_give_the_same_result(sizes, monkeypatch):
    terms = on_device(random_terms(sizes), torch.float32)
    expected = results(fused_attention.fused_attention, terms)
    monkeypatch.setattr(fused_attention, "CHUNK_QUERIES", 16)
    monkeypatch.setattr(fused_attention, "TABLE_BYTES", 2**15)
    problem = fused_attention._Problem.create(terms.q, terms.k, (sizes.step, True, 0.0))
    assert len({chunk.examples.start for chunk in problem.chunks()}) > 1
    assert len({chunk.queries.start for chunk in problem.chunks()}) > 1
    assert_close(results(fused_attention.fused_attention, terms), expected, 1e-5)


def test_operands_in_any_layout_give_the_same_result():
    terms = on_device(random_terms(Sizes(2, 9, 9, 2, 16)), torch.float32)
    transposed = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in operands(terms)]
    actual = results(fused_attention.fused_attention, with_operands(terms, transposed))
    assert_close(actual, results(fused_attention.fused_attention, terms), 1e-6)


def test_an_example_without_a_real_key_has_the_gradients_of_the_reference_for_queries_and_keys():
    terms = on_device(random_terms(Sizes(2, 9, 9, 2, 16)), torch.float32)
    terms.key_mask[1] = False
    exact = with_operands(
        random_terms(Sizes(2, 9, 9, 2, 16)), [x.detach().double().cpu().requires_grad_() for x in operands(terms)]
    )
    exact.key_mask[1] = False
    actual, expected = results(fused_attention.fused_attention, terms), results(eager, exact)
    for i in (0, 1, 2):  # output, queries, keys
        assert_close(actual[i : i + 1], expected[i : i + 1], 1e-5)


def test_a_large_bias_of_the_position_scores_costs_little_precision():
    sizes, dtype = Sizes(2, 33, 33, 2, 16), torch.float16
    terms = on_device(random_terms(sizes), dtype)
    bias = (terms.relative.r_bias * 10).detach().requires_grad_()
    terms = terms._replace(relative=terms.relative._replace(r_bias=bias, r=(terms.relative.r * 0.1).detach().requires_grad_()))
    exact = with_operands(random_terms(sizes), [x.detach().double().cpu().requires_grad_() for x in operands(terms)])
    assert_close(results(fused_attention.fused_attention, terms)[:1], results(eager, exact)[:1], 2e-2)


def dropout_mask(sizes: Sizes, dropout_p: float) -> torch.Tensor:
    """The mask that these sizes and the current seed give, [b, h, q, k]: zero scores, and the identity as values."""
    b, _, k, h, *_ = sizes
    terms = on_device(random_terms(sizes._replace(c=k)), torch.float32)
    zeros = with_operands(terms, [torch.zeros_like(x) for x in operands(terms)])
    values = torch.eye(k, device=DEVICE).view(1, k, 1, k).expand(b, k, h, k)
    terms = zeros._replace(v=values, key_mask=torch.ones_like(zeros.key_mask))
    return fused_attention.fused_attention(terms, dropout_p).transpose(1, 2) * k


@pytest.mark.parametrize("sizes", [Sizes(2, 40, 40, 2, 16), Sizes(2, 20, 40, 2, 16, step=2)], ids=["step 1", "step 2"])
def test_values_and_gradients_with_dropout_equal_the_reference_with_the_same_mask(sizes):
    torch.manual_seed(3)
    mask = dropout_mask(sizes, 0.3).cpu().double()
    terms = on_device(random_terms(sizes), torch.float32)
    exact = with_operands(random_terms(sizes), [x.detach().double().cpu().requires_grad_() for x in operands(terms)])

    def reference(terms: AttentionTerms, _: float) -> torch.Tensor:
        return torch.einsum("bhqk,bkhc->bqhc", _attention_weights(terms) * mask, terms.v)

    torch.manual_seed(3)
    assert_close(results(fused_attention.fused_attention, terms, 0.3), results(reference, exact), 1e-5)


def test_dropout_masks_have_the_right_rate_and_scale_and_are_independent():
    sizes = Sizes(4, 64, 64, 4, 64)
    torch.manual_seed(0)
    first, second = dropout_mask(sizes, 0.25), dropout_mask(sizes, 0.25)
    kept = (first > 0.5).double().cpu()
    assert float(kept.mean()) == pytest.approx(0.75, abs=0.006)  # 65,536 elements: 3.5 standard deviations
    torch.testing.assert_close(first.cpu().double(), kept / 0.75, rtol=0, atol=1e-5)
    rows = torch.cat([kept.flatten(0, 1).flatten(1), (second > 0.5).double().cpu().flatten(0, 1).flatten(1)])  # per head
    correlations = torch.corrcoef(rows) - torch.eye(len(rows), dtype=torch.float64)
    assert float(correlations.abs().max()) < 0.08  # 4,096 elements: 5 standard deviations
    assert abs(float(torch.corrcoef(torch.stack([kept[..., 1:].flatten(), kept[..., :-1].flatten()]))[0, 1])) < 0.015


def test_the_same_seed_gives_the_same_result():
    terms = on_device(random_terms(Sizes(2, 20, 20, 2, 16)), torch.float32)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(results(fused_attention.fused_attention, terms, 0.5))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_the_operators_are_registered_correctly():
    terms = on_device(random_terms(Sizes(1, 9, 9, 1, 16)), torch.float32)
    r = terms.relative
    arguments = [terms.q, r.w_bias, terms.k, terms.v, r.r, r.segments, r.key_segments, terms.key_mask]
    for check in ("test_schema", "test_faketensor", "test_autograd_registration"):
        torch.library.opcheck(fused_attention._attention, (arguments, 1, True, 0.0), test_utils=check)


@pytest.mark.slow
@torch.fx.experimental._config.patch(use_duck_shape=False)  # as in funnel.model.compilation
def test_it_compiles_once_for_all_lengths_without_graph_breaks():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_attention.fused_attention, backend=counter, dynamic=True, fullgraph=True)
    counts = []
    for sizes in (Sizes(2, 17, 17, 2, 16), Sizes(3, 40, 40, 2, 16), Sizes(4, 130, 130, 2, 16)):
        terms = on_device(random_terms(sizes), torch.float32)
        assert_close(results(compiled, terms), results(fused_attention.fused_attention, terms), 1e-6)
        counts.append(counter.frame_count)
    assert counts[1:] == counts[:-1]


def test_it_can_be_recomputed_by_gradient_checkpointing():
    terms = on_device(random_terms(Sizes(2, 20, 20, 2, 16)), torch.float32)

    def checkpointed(terms: AttentionTerms, dropout_p: float) -> torch.Tensor:
        return checkpoint(fused_attention.fused_attention, terms, dropout_p, use_reentrant=False)

    torch.manual_seed(1)
    expected = results(fused_attention.fused_attention, terms, 0.2)
    torch.manual_seed(1)
    assert_close(results(checkpointed, terms, 0.2), expected, 1e-6)


@pytest.mark.parametrize("kind", ["none", "distance bias", "relative and distance bias"])
def test_other_terms_are_not_supported(kind):
    assert not is_supported(random_terms(Sizes(1, 3, 3, 1, 16), kind, torch.float32))


def test_float64_and_wide_heads_are_not_supported():
    assert not is_supported(random_terms(Sizes(1, 3, 3, 1, 16)))
    assert not is_supported(random_terms(Sizes(1, 3, 3, 1, 256), dtype=torch.float32))

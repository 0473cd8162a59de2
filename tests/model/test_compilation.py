"""Regional compilation: number of compiled graphs, equality with eager mode, checkpointing, evaluation, state dict."""

import copy

import pytest
import torch
from conftest import BUCKETS, padded_batch, tiny_config

from funnel.model import attention
from funnel.model.attention_backends import attention_backend
from funnel.model.compilation import compile_regions
from funnel.model.heads import MODELS, FunnelForSequenceClassification

# Even and odd lengths, before and after pooling; a batch as large as its texts are long; never a batch or a block of size 1.
LENGTHS = ([16] * 16, [13, 9, 8], [32, 20], [33, 31], [65, 64, 63, 9], [101] * 5, [24] * 12)
REGIONS_WITHOUT_LAYERS = 2  # embeddings and head


@pytest.fixture
def graphs(compile_with):
    """The graphs compiled by `compile_regions`, which are traced and run without generating kernels."""
    recorded = []

    def record(graph, _):
        recorded.append(graph)
        return graph.forward

    compile_with(record)
    return recorded


def make_classifier(**changes):
    torch.manual_seed(0)
    return FunnelForSequenceClassification(tiny_config(**{"num_decoder_layers": 0, "blocks": "2,2,2", **changes})).train()


def train_step(model, lengths):
    model(*padded_batch(lengths)).square().sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "dtype"),
    [({}, torch.bfloat16), (BUCKETS, torch.float32)],
    ids=str,
)
def test_any_batch_of_any_number_of_layers_runs_the_same_three_variants(changes, dtype, graphs):
    for blocks in ("2,2,2", "4,3x2,1,2"):
        model = make_classifier(blocks=blocks, **changes)
        compile_regions(model)
        for lengths in LENGTHS:
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                train_step(model, lengths)
    # A plain layer, one that pools (its query only), and the last one, which computes [CLS] only.
    assert len(graphs) == 3 + REGIONS_WITHOUT_LAYERS


@pytest.mark.slow
def test_short_texts_in_seven_blocks_need_one_variant_more_per_size_of_one(graphs):
    """Blocks of length 1, pooling of lengths 2 and 1, and the same for one text; none of them exceeds the limit (an error)."""
    model = make_classifier(blocks="2,2,2,2,2,2,2")
    compile_regions(model)
    for lengths in ([16] * 4, [5, 2], [1, 1], [3, 3], [150, 3], [150], [3], [13], [1]):
        train_step(model, lengths)
    layers, embeddings, head = 7, 2, 1
    assert len(graphs) <= 2 * (layers + embeddings + head)


@pytest.mark.slow
def test_what_a_gpu_runs_compiles_without_graph_breaks(compile_with, monkeypatch):
    """Joint products and the fused attention backend, traced on the CPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(attention, "prefers_joint_products", lambda x: True)
    compile_with("aot_eager")
    model = make_classifier(d_model=32, d_head=16)
    eager = copy.deepcopy(model)
    compile_regions(model)
    for lengths in LENGTHS[:2]:
        with attention_backend("fused"):
            train_step(model, lengths)
        with attention_backend("eager"):
            train_step(eager, lengths)
    gradient, expected = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, eager))
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.slow
def test_compiled_training_gives_the_gradients_of_eager_training(compile_with):
    compile_with("aot_eager")
    model = make_classifier(blocks="1,2x2,1").double()
    eager = copy.deepcopy(model)
    compile_regions(model)
    model.set_gradient_checkpointing(True)
    for lengths in LENGTHS[:3]:
        train_step(model, lengths)
        train_step(eager, lengths)
    for (name, parameter), expected in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.slow
def test_a_recomputed_layer_draws_the_same_dropout_masks(compile_with):
    compile_with("aot_eager")
    gradients = []
    for checkpointing in (False, True):
        model = make_classifier(hidden_dropout=0.3, attention_dropout=0.3).double()
        compile_regions(model)
        model.set_gradient_checkpointing(checkpointing)
        torch.manual_seed(1)
        train_step(model, [17, 9, 4])
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_a_model_with_a_decoder_compiles(graphs):
    torch.manual_seed(0)
    model = MODELS["FunnelForMaskedLM"](tiny_config()).train()
    eager = copy.deepcopy(model)
    compile_regions(model)
    for lengths in LENGTHS:
        batch = padded_batch(lengths)
        torch.testing.assert_close(model(*batch), eager(*batch))
    assert len(graphs) == 2 + 1  # plain and pooling layers, embeddings


@torch.no_grad()
def test_evaluation_is_not_compiled(graphs):
    model = make_classifier()
    expected = model.eval()(*padded_batch([13, 9]))
    compile_regions(model)
    assert torch.equal(model(*padded_batch([13, 9])), expected)
    assert graphs == []


def test_compiling_keeps_the_names_of_the_weights(graphs):
    model = make_classifier()
    names = list(model.state_dict())
    compile_regions(model)
    assert list(model.state_dict()) == names

"""Models with absolute positions, token-type embeddings, a distance bias, or no positions at all: parameters, embeddings,
lengths, padding, layout changes, checkpoints, export. `POSITIONS` in conftest.py has the config fields."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ABSOLUTE, BOTH, BUCKETS, NONE, POSITIONS, count_compiled_graphs, padded_batch, tiny_config

from funnel.analysis.rollout import explain
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.inference.classifier import Classifier
from funnel.model.heads import MODELS, FunnelBaseModel, FunnelForSequenceClassification
from funnel.weights.export import export_torch
from funnel.weights.surgery import calibrate_layer_norms, make_plan

LAYOUTS = [{}, {"blocks": "2"}, {"blocks": "1,2x2", "truncate_seq": False}, {"separate_cls": False, "pool_q_only": False}]
RELATIVE_PARAMETERS = {"r_w_bias", "r_r_bias", "r_s_bias", "r_kernel", "seg_embed"}
each_positions = pytest.mark.parametrize("positions", POSITIONS, ids=str)
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def make_model(cls_name: str = "FunnelForSequenceClassification", **changes) -> torch.nn.Module:
    """A random model in evaluation mode; its weights are large enough for every parameter to matter."""
    torch.manual_seed(0)
    model = MODELS[cls_name](tiny_config(**changes))
    if model.encoder.distance_bias is not None:
        torch.nn.init.normal_(model.encoder.distance_bias.weight)  # initialized to zero
    return model.eval()


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ({}, set()),
        (NONE, set()),
        (ABSOLUTE, {"embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"}),
        (BUCKETS, {"embeddings.position_embeddings.weight", "encoder.distance_bias.weight"}),
        (
            BOTH,
            {
                "embeddings.position_embeddings.weight",
                "embeddings.token_type_embeddings.weight",
                "embeddings.projection.weight",
                "embeddings.projection.bias",
                "encoder.distance_bias.weight",
            },
        ),
    ],
    ids=["relative", "none", "absolute", "buckets", "both"],
)
def test_a_model_has_only_the_parameters_that_its_positions_need(positions, expected):
    names = {name for name, _ in make_model("FunnelModel", **positions).named_parameters()}
    is_relative = positions.get("relative_attention", True)
    always = {f"embeddings.{name}" for name in ("word_embeddings.weight", "layer_norm.weight", "layer_norm.bias")}
    assert {name for name in names if name.startswith(("embeddings.", "encoder.distance"))} == always | expected
    in_attention = {name.split("attention.")[1] for name in names if ".attention." in name}
    assert RELATIVE_PARAMETERS & in_attention == (RELATIVE_PARAMETERS if is_relative else set())
    assert ("q_head.bias" in in_attention) is not is_relative


@pytest.mark.parametrize("name", ["FunnelForSequenceClassification", "FunnelForMaskedLM", "FunnelForTokenClassification"])
@each_positions
@each_layout
def test_every_parameter_gets_a_gradient(name, positions, layout):
    model = make_model(name, num_decoder_layers=1, **positions, **layout).train()
    model(*padded_batch([13, 5, 1])).square().sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    # Softmax ignores a constant in the scores. [CLS], alone in a classifier's last layer, has no relative scores.
    assert {name.split(".")[-1] for name in without if not name.endswith("k_head.bias")} <= RELATIVE_PARAMETERS
    assert name == "FunnelForSequenceClassification" or not any(".r_" in name for name in without)


# --- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("width", [None, 6])
@torch.no_grad()
def test_embeddings_are_the_normalized_sum_of_word_position_and_token_type(rows, width):
    positions = {"position_embeddings": 20, "position_offset": 3, "token_type_embeddings": rows, "embedding_size": width}
    embeddings = make_model(**positions).embeddings
    ids, types = torch.tensor([[7, 8, 9, 10]]), torch.tensor([[2, 0, 1, 1]])
    type_rows = [0, 0, 1, 1] if rows > 1 else [0, 0, 0, 0]  # [CLS] has type 2 and reads row 0
    total = (
        embeddings.word_embeddings.weight[[7, 8, 9, 10]]
        + embeddings.position_embeddings.weight[[3, 4, 5, 6]]
        + embeddings.token_type_embeddings.weight[type_rows]
    )
    expected = F.layer_norm(total, total.shape[1:], embeddings.layer_norm.weight, embeddings.layer_norm.bias, 1e-9)
    if width is not None:
        expected = expected @ embeddings.projection.weight.T + embeddings.projection.bias
    torch.testing.assert_close(embeddings(ids, torch.ones_like(ids).bool(), types)[0], expected)


@pytest.mark.parametrize("positions", [ABSOLUTE, BUCKETS, NONE], ids=str)
def test_the_order_of_tokens_matters_only_with_positions(positions):
    model = make_model("FunnelBaseModel", blocks="2", **positions).double()
    ids, _, _ = padded_batch([9])
    reordered = ids[:, [0, *range(8, 0, -1)]]
    matters = not torch.allclose(model(ids)[:, 0], model(reordered)[:, 0], rtol=0, atol=1e-9)
    assert matters is (positions is not NONE)


# --- lengths and padding ----------------------------------------------------------------------------------------------


@each_positions
@pytest.mark.parametrize("layout", [{"blocks": "1,1,1,1"}, {"truncate_seq": False}, {"separate_cls": False}], ids=str)
@torch.no_grad()
def test_output_does_not_depend_on_padding(positions, layout):
    model = make_model("FunnelModel", **positions, **layout).double()
    for length in (1, 2, 5, 8, 17):
        batch = padded_batch([length], seed=length)
        expected = model(*batch)
        for width in (length + 1, length + 2, 32):
            padded = model(*(F.pad(x, (0, width - length)) for x in batch))
            torch.testing.assert_close(padded[:, :length], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", [{}, {"truncate_seq": False}, {"separate_cls": False}], ids=str)
@pytest.mark.parametrize("blocks", ["1", "1,1,1,1,1,1,1"])
@torch.no_grad()
def test_any_length_up_to_the_position_table_works_with_any_number_of_blocks(layout, blocks):
    positions = {"relative_attention": False, "position_embeddings": 12, "position_offset": 2}
    model = make_model("FunnelModel", blocks=blocks, **positions, **layout)
    for length in range(1, 11):
        assert model(*padded_batch([length, 1])).isfinite().all()
    with pytest.raises(FunnelError) as error:
        model(*padded_batch([11]))
    assert "11 tokens per example, but the model has 10 position embeddings; truncate texts to 10 tokens" in str(error.value)


# --- training and inference -------------------------------------------------------------------------------------------


@each_positions
@each_layout
@torch.no_grad()
def test_computing_cls_only_in_the_last_layer_does_not_change_the_logits(positions, layout):
    model = make_model(**positions, **layout).double()
    batch = padded_batch([13, 30, 1])
    states, _ = model.encode(*batch)
    torch.testing.assert_close(model(*batch), model.classifier(states[-1][:, 0]), rtol=0, atol=1e-12)


@each_positions
def test_gradient_checkpointing_gives_the_same_gradients(positions):
    model = make_model("FunnelForTokenClassification", hidden_dropout=0.3, attention_dropout=0.3, **positions).train()
    gradients = []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        torch.manual_seed(1)
        loss = model(*padded_batch([40, 33])).square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for gradient, checkpointed_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, checkpointed_gradient)


@each_positions
def test_autocast_gives_hidden_states_in_bfloat16(positions):
    model = make_model("FunnelBaseModel", **positions)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states, _ = model.encode(*padded_batch([13, 5]))
    assert {state.dtype for state in states} == {torch.bfloat16}


@each_positions
def test_rollout_contributions_sum_to_one(positions):
    text = "a film that was good and bad"
    tokenizer = FunnelTokenizer.train([text] * 5)
    model = make_model(vocab_size=tokenizer.vocab_size, num_decoder_layers=0, **positions)
    explanation = explain(Classifier(model, tokenizer), text)
    assert sum(explanation.contributions) == pytest.approx(1, abs=1e-5)


# --- checkpoints and layout changes -----------------------------------------------------------------------------------


@each_positions
def test_a_saved_model_is_loaded_unchanged(positions, tmp_path):
    model = make_model(**positions, num_decoder_layers=0)
    model.save_pretrained(tmp_path / "saved")
    loaded = FunnelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert loaded.config == model.config
    assert torch.equal(loaded(*padded_batch([13, 5])), model(*padded_batch([13, 5])))


@pytest.mark.parametrize("positions", [ABSOLUTE, BUCKETS, BOTH], ids=str)
@torch.no_grad()
def test_a_one_block_model_keeps_its_layers_in_a_pooled_layout(positions, tmp_path):
    source = make_model("FunnelBaseModel", blocks="4", **positions)
    source.save_pretrained(tmp_path / "saved")
    pooled = FunnelBaseModel.from_pretrained(tmp_path / "saved", blocks="3,1")
    batch = padded_batch([13, 5])
    expected, actual = (model.encode(*batch)[0] for model in (source, pooled))
    assert all(torch.equal(first, second) for first, second in zip(expected[:4], actual[:4], strict=True))
    old, new = source.encoder.layers(0)[3].state_dict(), pooled.encoder.layers(1)[0].state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


@each_positions
@torch.no_grad()
def test_calibrated_identity_layers_preserve_the_mean_and_std_of_cls(positions, tmp_path):
    source = make_model(blocks="2", num_decoder_layers=0, **positions)
    source.save_pretrained(tmp_path / "saved")
    deep = FunnelForSequenceClassification.from_pretrained(tmp_path / "saved", blocks="2,2,2")
    batch = padded_batch([13, 5])
    calibrate_layer_norms(deep, make_plan(source.config, deep.config), *batch)
    cls_state = source.encode(*batch)[0][-1][:, 0]
    normalized = F.layer_norm(cls_state, cls_state.shape[1:], eps=1e-9)
    expected = normalized * cls_state.std(1, correction=0).mean() + cls_state.mean()
    torch.testing.assert_close(deep.encode(*batch)[0][-1][:, 0], expected, rtol=0, atol=1e-5)


# --- compilation and export -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FunnelForSequenceClassification", "FunnelForMaskedLM"])
@pytest.mark.parametrize("positions", [ABSOLUTE, BUCKETS, BOTH, NONE], ids=str)
def test_forward_compiles_to_one_graph_for_all_lengths(name, positions):
    is_token_level = name == "FunnelForMaskedLM"  # padding has other positions in a compiled graph
    assert count_compiled_graphs(make_model(name, **positions), only_real_tokens=is_token_level) == 1


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_model_without_positions_gives_the_same_logits_for_any_batch_and_length():
    """tests/weights/test_export.py covers the other kinds."""
    model = make_model(num_decoder_layers=0, **NONE)
    program = export_torch(model).module()
    for lengths in ([1], [2], [5, 3], [16, 9], [17], [30, 64, 1, 50], [130]):
        batch = padded_batch(lengths)
        torch.testing.assert_close(program(*batch), model(*batch), rtol=0, atol=1e-5)

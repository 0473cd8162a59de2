"""Changing the layout: where each layer comes from, and what the changed model computes."""

import json

import pytest
import torch
from conftest import padded_batch, tiny_config

from funnel.cli.convert import convert
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model import pooling
from funnel.model.checkpoint import load_weights
from funnel.model.heads import FunnelForSequenceClassification, FunnelModel
from funnel.weights.load import read_source
from funnel.weights.surgery import (
    apply_plan,
    calibrate_layer_norms,
    make_decoder_identity,
    make_plan,
    read_plan,
    recommended_blocks,
    write_plan,
)


def plan_rows(old: str, new: str, init: str = "identity") -> list[str]:
    return [str(row) for row in make_plan(tiny_config(blocks=old), tiny_config(blocks=new), init)]


def make_model(blocks: str) -> FunnelForSequenceClassification:
    torch.manual_seed(0)
    return FunnelForSequenceClassification(tiny_config(blocks=blocks)).eval()


def make_trained_model(blocks: str) -> FunnelForSequenceClassification:
    """A float64 model whose LayerNorms have weights and biases as after training."""
    model = make_model(blocks).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" in name:
                weight += torch.randn_like(weight) * 0.3
    return model


def change_layout(
    model: FunnelForSequenceClassification, blocks: str, init: str = "identity"
) -> FunnelForSequenceClassification:
    config = model.config.replace(blocks=blocks)
    changed = FunnelForSequenceClassification(config).to(model.embeddings.word_embeddings.weight.dtype).eval()
    changed.load_state_dict(apply_plan(model.state_dict(), make_plan(model.config, config, init), changed.state_dict()))
    return changed


def change_layout_and_calibrate(model: FunnelForSequenceClassification, blocks: str) -> FunnelForSequenceClassification:
    changed = change_layout(model, blocks)
    calibrate_layer_norms(changed, make_plan(model.config, changed.config), *padded_batch([30, 12]))
    return changed


def cls_state(model: FunnelForSequenceClassification, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return model.encode(*batch)[0][-1][:, 0]


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "init", "expected"),
    [
        ("1,2", "1,2", "identity", ["0.0: keep from 0.0", "1.0: keep from 1.0", "1.1: keep from 1.1"]),
        ("1,2", "1,2,2", "copy", ["0.0: keep from 0.0", "1.0: keep from 1.0", "1.1: keep from 1.1",
                                  "2.0: copy from 1.0", "2.1: copy from 1.1"]),
        ("1,1", "2,1", "identity", ["0.0: keep from 0.0", "0.1: identity from 0.0", "1.0: keep from 1.0"]),
        ("2,2", "1", "identity", ["0.0: keep from 0.0"]),
        ("1", "1,1", "random", ["0.0: keep from 0.0", "1.0: random"]),
        ("2x2", "4", "identity", ["0.0: keep from 0.0", "0.1: keep from 0.0", "0.2: keep from 0.1", "0.3: keep from 0.1"]),
        ("4", "2x2", "identity", ["0.0: keep from 0.0", "0.1: keep from 0.2"]),
        # the layout only shrinks: blocks keep their own layers, evenly spread
        ("6", "3", "identity", ["0.0: keep from 0.0", "0.1: keep from 0.2", "0.2: keep from 0.4"]),
        ("2,2,2", "1,1,1", "identity", ["0.0: keep from 0.0", "1.0: keep from 1.0", "2.0: keep from 2.0"]),
        ("2,2,2", "2,2", "identity", ["0.0: keep from 0.0", "0.1: keep from 0.1", "1.0: keep from 1.0", "1.1: keep from 1.1"]),
        ("3,3,2", "2,2", "identity", ["0.0: keep from 0.0", "0.1: keep from 0.1", "1.0: keep from 1.0", "1.1: keep from 1.1"]),
        # some blocks shrink, others grow: all old layers keep their order, new ones follow
        ("3", "1,1,1", "identity", ["0.0: keep from 0.0", "1.0: keep from 0.1", "2.0: keep from 0.2"]),
        ("1,2", "3", "identity", ["0.0: keep from 0.0", "0.1: keep from 1.0", "0.2: keep from 1.1"]),
        ("2,2", "1,2,2", "identity", ["0.0: keep from 0.0", "1.0: keep from 0.1", "1.1: keep from 1.0", "2.0: keep from 1.1",
                                      "2.1: identity from 1.1"]),
        ("2", "1,1,1,1", "random", ["0.0: keep from 0.0", "1.0: keep from 0.1", "2.0: random", "3.0: random"]),
        # copies: blocks keep their own layers in any case
        ("2,2", "1,2,2", "copy", ["0.0: keep from 0.0", "1.0: keep from 1.0", "1.1: keep from 1.1", "2.0: copy from 1.0",
                                  "2.1: copy from 1.1"]),
        ("1,2x2", "1,1,2x2", "copy", ["0.0: keep from 0.0", "1.0: keep from 1.0", "2.0: copy from 1.0", "2.1: copy from 1.1"]),
    ],
)  # fmt: skip
def test_plan_says_where_each_layer_comes_from(old, new, init, expected):
    assert plan_rows(old, new, init) == expected


@pytest.mark.parametrize(("keep", "kept"), [("first", "0.0 0.1"), ("last", "0.3 0.4"), ("spread", "0.0 0.2")])
def test_keep_selects_the_layers_that_remain(keep, kept):
    rows = make_plan(tiny_config(blocks="5,1"), tiny_config(blocks="2"), keep=keep)
    assert " ".join(str(row).split()[-1] for row in rows) == kept


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("keep", "best", "unknown keep 'best'; choose from spread, first, last"),
        ("init", "zero", "unknown init 'zero'; choose from identity, copy, random"),
    ],
)
def test_unknown_init_or_keep_is_an_error(name, value, words):
    with pytest.raises(FunnelError, match=words) as error:
        make_plan(tiny_config(blocks="3"), tiny_config(blocks="2"), **{name: value})
    assert error.value.parameter == name


@pytest.mark.parametrize("name", ["d_model", "d_inner"])
def test_different_width_is_an_error(name, tmp_path):
    old, new = tiny_config(blocks="1"), tiny_config(blocks="1,1", **{name: 64})
    words = rf"cannot change {name}: it is \d\d in the weights and 64 in the new config"
    with pytest.raises(FunnelError, match=words):
        make_plan(old, new)
    write_plan(tmp_path / "plan.json", make_plan(old, tiny_config(blocks="1,1")))
    with pytest.raises(FunnelError, match=words):
        read_plan(tmp_path / "plan.json", old, new)


@pytest.mark.parametrize("init", ["identity", "random"])
def test_plan_file_round_trips(init, tmp_path):
    old, new = tiny_config(blocks="2,1"), tiny_config(blocks="3,1x2,1")
    plan = make_plan(old, new, init)
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json", old, new) == plan


KEEP = {"layer": "0.0", "start": "keep", "source": "0.0"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({}, "not a layout plan"),
        ([KEEP], "no row for layer 1.0 of the layout 1,1x2"),
        ([KEEP, KEEP], "row 2: layer 0.0 already has a row"),
        ([KEEP, {"layer": "1.0", "start": "copy", "source": "0.1"}], "row 2: source 0.1 is not in the layout 1"),
        ([KEEP, {"layer": "1.1", "start": "copy", "source": "0.0"}], "row 2: layer 1.1 is not in the layout 1,1x2 .repeats"),
        ([{"layer": "0.0", "start": "zero", "source": "0.0"}], "row 1: unknown start 'zero'; choose from keep, identity"),
        ([{"layer": "0.0", "start": "copy"}], "row 1: a layer with start 'copy' needs a source"),
        ([{"layer": "0.0", "start": "random", "source": "0.0"}], "row 1: a layer with start 'random' has no source"),
        ([{"layer": 0, "start": "random"}], 'row 1: layer 0 is invalid: expected "block.layer"'),
        (["keep"], "row 1: expected an object with layer, start and source"),
    ],
)
def test_invalid_plan_file_is_an_error_that_names_the_row(rows, words, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"layers": rows}))
    with pytest.raises(FunnelError, match=words):
        read_plan(tmp_path / "plan.json", tiny_config(blocks="1"), tiny_config(blocks="1,1x2"))


@pytest.fixture(scope="module")
def minilm_source(minilm):
    return read_source(minilm)


# --- changed models ---------------------------------------------------------------------------------------------------


def test_same_layout_gives_the_same_model():
    model, batch = make_model("1,2"), padded_batch([9, 4])
    assert torch.equal(change_layout(model, "1,2")(*batch), model(*batch))


def test_unrolled_repeats_compute_the_same():
    model, batch = make_model("1,2x2"), padded_batch([9, 4])
    torch.testing.assert_close(change_layout(model, "1,4")(*batch), model(*batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("blocks", ["2,3", "1,2,2", "3,3,2,2,2,2,2"])
def test_identity_layers_preserve_the_logits_of_an_untrained_model(blocks):
    """A LayerNorm with weight 1 and bias 0 does not change a normalized state."""
    model, batch = make_model("1,2").double(), padded_batch([40, 17, 5])
    torch.testing.assert_close(change_layout(model, blocks)(*batch), model(*batch), rtol=0, atol=1e-6)


def test_identity_layers_change_only_mean_and_std_of_cls():
    """For every text; averaged over the calibration texts, both are preserved."""
    model, batch = make_trained_model("1,2"), padded_batch([30, 12])
    old, new = cls_state(model, batch), cls_state(change_layout_and_calibrate(model, "1,2,2"), batch)
    centered = [state - state.mean(1, keepdim=True) for state in (old, new)]
    torch.testing.assert_close(torch.cosine_similarity(*centered), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(new.mean(), old.mean())
    torch.testing.assert_close(new.std(1).mean(), old.std(1).mean())


@pytest.mark.parametrize(("blocks", "limit"), [("2,2,2,2,2,2,2", 0.03), ("4,4,4", 0.1), ("4,4,4,4,4,4,4", 0.1)])
def test_identity_layers_nearly_preserve_cls_of_minilm(blocks, limit, minilm_source):
    """[CLS] changes by 2 % if layers are added at the end, by 6 % if some are added in between (copies: 100 to 250 %)."""
    source = minilm_source
    flat = FunnelForSequenceClassification(source.config).eval()
    load_weights(flat, source.weights, "MiniLM")
    model = change_layout(flat, "2,2,2")
    texts = ["a gorgeous , witty , seductive movie .", "it 's a charming and often affecting journey .", "dull ."]
    texts += ["a sentence of words that the model has not seen often , let alone in this order", "no"]
    encoded = [encoding.input_ids for encoding in source.tokenizer.encode(texts)]
    width = max(map(len, encoded))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in encoded])
    batch = ids, (ids != 0).long()
    changed = change_layout(model, blocks)
    calibrate_layer_norms(changed, make_plan(model.config, changed.config), *batch)
    with torch.no_grad():
        old, new = cls_state(model, batch), cls_state(changed, batch)
    assert ((new - old).norm(dim=1) / old.norm(dim=1)).mean() < limit


def test_many_identity_layers_change_cls_as_much_as_one():
    model, batch = make_trained_model("1,2"), padded_batch([40, 17, 5])
    one, many = (cls_state(change_layout_and_calibrate(model, blocks), batch) for blocks in ("1,2,1", "1,2,4,4,4,4,4"))
    torch.testing.assert_close(many, one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("blocks", ["1,4", "2,2", "1,2,2,2"])
def test_identity_layers_without_their_norms_preserve_cls_exactly(blocks):
    model, batch = make_trained_model("1,2"), padded_batch([40, 17, 5])
    changed = change_layout(model, blocks)
    for row in make_plan(model.config, changed.config):
        if row.start == "identity":
            layer = changed.get_submodule(f"encoder.blocks.{row.block}.{row.layer}")
            layer.attention.layer_norm = layer.ffn.layer_norm = torch.nn.Identity()
    torch.testing.assert_close(cls_state(changed, batch), cls_state(model, batch), rtol=0, atol=1e-12)


def test_calibration_changes_only_norms_of_identity_layers():
    model = make_trained_model("1,2").train()
    config = tiny_config(blocks="1,3")
    changed = FunnelForSequenceClassification(config).double().train()
    plan = make_plan(model.config, config)
    changed.load_state_dict(apply_plan(model.state_dict(), plan, changed.state_dict()))
    before = {name: weight.clone() for name, weight in changed.state_dict().items()}
    calibrate_layer_norms(changed, plan, *padded_batch([9]))
    calibrated = {name for name, weight in changed.state_dict().items() if not torch.equal(weight, before[name])}
    assert calibrated
    assert all(name.startswith("encoder.blocks.1.2.") and "layer_norm" in name for name in calibrated)
    assert changed.training
    assert not any(module._forward_pre_hooks for module in changed.modules())


def test_copied_layers_change_the_logits():
    model, batch = make_model("1,2"), padded_batch([40, 17])
    assert (change_layout(model, "1,2,2", "copy")(*batch) - model(*batch)).abs().max() > 1e-2


@pytest.mark.parametrize("blocks", ["1,1", "3,2,2", "1,2,2,2,1", "2x2,1", "5"])
def test_transformers_computes_the_same_logits_in_a_changed_layout(blocks, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra test")
    changed = change_layout_and_calibrate(make_trained_model("1,2,1"), blocks).float()
    changed.save_pretrained(tmp_path / "changed")
    FunnelTokenizer.train(["a b"]).save(tmp_path / "changed")
    convert(str(tmp_path / "changed"), tmp_path / "huggingface", "huggingface")
    peer = transformers.FunnelForSequenceClassification.from_pretrained(tmp_path / "huggingface").eval()
    ids, mask, types = padded_batch([32, 32])  # a length at which transformers pools in the same way
    with torch.no_grad():
        expected = peer(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
        torch.testing.assert_close(changed(ids, mask, types), expected, rtol=0, atol=1e-5)


def test_new_layers_share_no_memory():
    model, config = make_model("1,2"), tiny_config(blocks="1,2,2,2")
    fresh = FunnelForSequenceClassification(config).state_dict()
    weights = apply_plan(model.state_dict(), make_plan(model.config, config, "copy"), fresh)
    pointers = [tensor.data_ptr() for tensor in [*weights.values(), *model.state_dict().values()] if tensor.numel()]
    assert len(set(pointers)) == len(pointers)


# --- the recommended layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "recommended"),
    [
        ("6", "4,2"),
        ("12", "8,4"),
        ("24", "16,8"),
        ("1x12", "1x8,1x4"),
        ("3x4", "2x4,1x4"),
        ("3", "2,1"),
        ("2x6", "2x6"),
        ("1", "1"),
        ("4,4,4", "4,4,4"),
    ],
)
def test_recommended_layout_pools_the_last_third(blocks, recommended):
    config = tiny_config(blocks=blocks)
    assert config.replace(blocks=recommended_blocks(config)).layout == recommended


# --- a new decoder ----------------------------------------------------------------------------------------------------


def test_an_identity_decoder_returns_the_normalized_sum_of_last_block_and_block_0():
    torch.manual_seed(0)
    model = FunnelModel(tiny_config(num_decoder_layers=2)).eval()
    batch = padded_batch([13, 6])
    assert model.config.blocks[0].runs == 1
    make_decoder_identity(model)
    states, mask = model.encode(*batch)
    total = pooling.upsample(states[-1], mask, 13, model.config) + states[1]
    expected = (total - total.mean(-1, keepdim=True)) / total.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(model(*batch), expected, rtol=1e-4, atol=1e-4)

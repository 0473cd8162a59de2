"""Changing a layout: where each layer comes from, and what the grown model computes."""

import json

import pytest
import torch
from conftest import padded_batch, tiny_config

import convert_weights
from funnel.model import flops
from funnel.weights.build import build_classifier
from funnel.model.checkpoint import load_weights
from funnel.model.config import parse_blocks
from funnel.weights.load import read_weights_from
from funnel.errors import FunnelError
from funnel.model.heads import FunnelForSequenceClassification
from funnel.weights.surgery import apply_plan, calibrate_layer_norms, make_plan, read_plan, write_plan
from funnel.data.tokenizer import FunnelTokenizer


def with_layout(text, **more):
    sizes, repeats = parse_blocks(text)
    return tiny_config(block_sizes=sizes, block_repeats=repeats, **more)


def plan(old, new, init="identity"):
    return [str(row) for row in make_plan(with_layout(old), with_layout(new), init)]


def grow(model, text, init="identity"):
    sizes, repeats = parse_blocks(text)
    config = model.config.replace(block_sizes=sizes, block_repeats=repeats)
    grown = FunnelForSequenceClassification(config).to(model.embeddings.word_embeddings.weight.dtype).eval()
    grown.load_state_dict(apply_plan(model.state_dict(), make_plan(model.config, config, init), grown.state_dict()))
    return grown


@pytest.mark.parametrize(
    ("old", "new", "init", "expected"),
    [
        ("1,2", "1,2", "identity", ["0.0 keep of 0.0", "1.0 keep of 1.0", "1.1 keep of 1.1"]),
        ("1,2", "1,2,2", "copy", ["0.0 keep of 0.0", "1.0 keep of 1.0", "1.1 keep of 1.1",
                                  "2.0 copy of 1.0", "2.1 copy of 1.1"]),
        ("1,1", "2,1", "identity", ["0.0 keep of 0.0", "0.1 identity of 0.0", "1.0 keep of 1.0"]),
        ("2,2", "1", "identity", ["0.0 keep of 0.0"]),
        ("1", "1,1", "random", ["0.0 keep of 0.0", "1.0 random"]),
        ("2x2", "4", "identity", ["0.0 keep of 0.0", "0.1 keep of 0.0", "0.2 keep of 0.1", "0.3 keep of 0.1"]),
        ("4", "2x2", "identity", ["0.0 keep of 0.0", "0.1 keep of 0.2"]),
        # nothing but fewer layers: blocks keep theirs, evenly spread
        ("6", "3", "identity", ["0.0 keep of 0.0", "0.1 keep of 0.2", "0.2 keep of 0.4"]),
        ("2,2,2", "1,1,1", "identity", ["0.0 keep of 0.0", "1.0 keep of 1.0", "2.0 keep of 2.0"]),
        ("2,2,2", "2,2", "identity", ["0.0 keep of 0.0", "0.1 keep of 0.1", "1.0 keep of 1.0", "1.1 keep of 1.1"]),
        ("3,3,2", "2,2", "identity", ["0.0 keep of 0.0", "0.1 keep of 0.1", "1.0 keep of 1.0", "1.1 keep of 1.1"]),
        # smaller blocks here, more there: all old layers keep their order, new ones come behind them
        ("3", "1,1,1", "identity", ["0.0 keep of 0.0", "1.0 keep of 0.1", "2.0 keep of 0.2"]),
        ("1,2", "3", "identity", ["0.0 keep of 0.0", "0.1 keep of 1.0", "0.2 keep of 1.1"]),
        ("2,2", "1,2,2", "identity", ["0.0 keep of 0.0", "1.0 keep of 0.1", "1.1 keep of 1.0", "2.0 keep of 1.1",
                                      "2.1 identity of 1.1"]),
        ("2", "1,1,1,1", "random", ["0.0 keep of 0.0", "1.0 keep of 0.1", "2.0 random", "3.0 random"]),
        # copies as in the study: blocks keep their own layers
        ("2,2", "1,2,2", "copy", ["0.0 keep of 0.0", "1.0 keep of 1.0", "1.1 keep of 1.1", "2.0 copy of 1.0",
                                  "2.1 copy of 1.1"]),
        ("1,2x2", "1,1,2x2", "copy", ["0.0 keep of 0.0", "1.0 keep of 1.0", "2.0 copy of 1.0", "2.1 copy of 1.1"]),
    ],
)  # fmt: skip
def test_plans(old, new, init, expected):
    assert plan(old, new, init) == expected


@pytest.mark.parametrize(("keep", "kept"), [("first", "0.0 0.1"), ("last", "0.3 0.4"), ("spread", "0.0 0.2")])
def test_which_layers_stay_is_a_choice(keep, kept):
    rows = make_plan(with_layout("5,1"), with_layout("2"), keep=keep)
    assert " ".join(str(row).split()[-1] for row in rows) == kept
    with pytest.raises(FunnelError, match="--keep 'best': it takes one of spread, first, last"):
        make_plan(with_layout("3"), with_layout("2"), keep="best")


def test_an_unknown_init_is_an_error():
    with pytest.raises(FunnelError, match="zero"):
        plan("1", "1,1", "zero")


def test_the_same_layout_is_the_same_model():
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(with_layout("1,2")).eval()
    batch = padded_batch([9, 4])
    assert torch.equal(grow(model, "1,2")(*batch), model(*batch))


def test_unrolled_repeats_compute_the_same():
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(with_layout("1,2x2")).eval()
    batch = padded_batch([9, 4])
    torch.testing.assert_close(grow(model, "1,4")(*batch), model(*batch), rtol=0, atol=1e-6)


def trained(text):
    """A model whose LayerNorms have gains and biases, as training leaves them."""
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(with_layout(text)).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" in name:
                weight += torch.randn_like(weight) * 0.3
    return model


def grow_and_fit(model, text):
    grown = grow(model, text)
    calibrate_layer_norms(grown, make_plan(model.config, grown.config), *padded_batch([30, 12]))
    return grown


def cls_of(model, batch):
    return model.encode(*batch)[0][-1][:, 0]


@pytest.mark.parametrize("text", ["2,3", "1,2,2", "3,3,2,2,2,2,2"])
def test_layers_that_start_as_the_identity_keep_cls(text):
    """Exactly so where LayerNorms have no gain and bias: a LayerNorm of a normalised state changes nothing."""
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(with_layout("1,2")).double().eval()
    batch = padded_batch([40, 17, 5])
    torch.testing.assert_close(grow(model, text)(*batch), model(*batch), rtol=0, atol=1e-6)


def test_identity_layers_behind_trained_layer_norms_change_no_more_than_mean_and_deviation():
    """Of [cls] in each text; and both stay what they are on average over the texts that the norms were fitted to."""
    model, batch = trained("1,2"), padded_batch([30, 12])
    old, new = cls_of(model, batch), cls_of(grow_and_fit(model, "1,2,2"), batch)
    centred = [state - state.mean(1, keepdim=True) for state in (old, new)]
    torch.testing.assert_close(torch.cosine_similarity(*centred), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(new.mean(), old.mean())
    torch.testing.assert_close(new.std(1).mean(), old.std(1).mean())


@pytest.mark.parametrize(("text", "far"), [("2,2,2,2,2,2,2", 0.03), ("4,4,4", 0.1), ("4,4,4,4,4,4,4", 0.1)])
def test_a_grown_minilm_computes_nearly_what_it_did(text, far, minilm):
    """[cls] differs by 2 % where layers are added behind, by 6 % where some come between (it is 1 to 2.5 with copies)."""
    source = read_weights_from(minilm)
    model = FunnelForSequenceClassification(source.config)
    load_weights(model, source.weights, "MiniLM")
    texts = ["a gorgeous , witty , seductive movie .", "it 's a charming and often affecting journey .", "dull ."]
    texts += ["a sentence of words that the model has not seen often , let alone in this order", "no"]
    encoded = [e.input_ids for e in FunnelTokenizer.load(minilm).encode(texts)]
    width = max(map(len, encoded))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in encoded])
    batch = ids, (ids != 0).long()
    grown = grow(model.eval(), text)
    calibrate_layer_norms(grown, make_plan(source.config, grown.config), *batch)
    with torch.no_grad():
        old, new = cls_of(model, batch), cls_of(grown, batch)
    assert ((new - old).norm(dim=1) / old.norm(dim=1)).mean() < far


def test_any_number_of_identity_layers_changes_cls_as_one_does():
    model, batch = trained("1,2"), padded_batch([40, 17, 5])
    one, many = (cls_of(grow_and_fit(model, text), batch) for text in ("1,2,1", "1,2,4,4,4,4,4"))
    torch.testing.assert_close(many, one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", ["1,4", "2,2", "1,2,2,2"])
def test_without_their_layer_norms_identity_layers_keep_cls_exactly(text):
    model, batch = trained("1,2"), padded_batch([40, 17, 5])
    grown = grow(model, text)
    for row in make_plan(model.config, grown.config):
        if row.start == "identity":
            layer = grown.encoder.layers(row.block)[row.layer]
            layer.attention.layer_norm = layer.ffn.layer_norm = torch.nn.Identity()
    torch.testing.assert_close(cls_of(grown, batch), cls_of(model, batch), rtol=0, atol=1e-12)


def test_fitting_norms_leaves_other_layers_and_the_mode_alone():
    model = trained("1,2").train()
    config = with_layout("1,3")
    grown = FunnelForSequenceClassification(config).double().train()
    plan = make_plan(model.config, config)
    grown.load_state_dict(apply_plan(model.state_dict(), plan, grown.state_dict()))
    before = {name: weight.clone() for name, weight in grown.state_dict().items()}
    calibrate_layer_norms(grown, plan, *padded_batch([9]))
    changed = {name for name, weight in grown.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed
    assert all(name.startswith("encoder.blocks.1.2.") and "layer_norm" in name for name in changed)
    assert grown.training
    assert not grown.encoder.blocks[1][2]._forward_pre_hooks


def test_copied_layers_do_not_keep_cls():
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(with_layout("1,2")).eval()
    batch = padded_batch([40, 17])
    assert (grow(model, "1,2,2", "copy")(*batch) - model(*batch)).abs().max() > 1e-2


@pytest.mark.parametrize("text", ["1,1", "3,2,2", "1,2,2,2,1", "2x2,1", "5"])
def test_a_changed_layout_gives_the_same_logits_in_transformers(text, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra test")
    grown = grow_and_fit(trained("1,2,1"), text).float()
    grown.save_pretrained(tmp_path / "ours")
    FunnelTokenizer.train(["a b"]).save(tmp_path / "ours")
    assert convert_weights.main([str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "huggingface"]) == 0
    peer = transformers.FunnelForSequenceClassification.from_pretrained(tmp_path / "theirs").eval()
    ids, mask, types = padded_batch([32, 32])  # a length at which transformers pools as we do
    with torch.no_grad():
        theirs = peer(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
        torch.testing.assert_close(grown(ids, mask, types), theirs, rtol=0, atol=1e-5)


def test_a_source_of_another_width_is_refused():
    model, config = FunnelForSequenceClassification(with_layout("1")), with_layout("1,1", d_model=32)
    fresh = FunnelForSequenceClassification(config).state_dict()
    with pytest.raises(
        FunnelError, match=r"layer 0.0 keep of 0.0: attention.r_kernel is \[16, 2, 8\] there and \[32, 2, 8\] here"
    ):
        apply_plan(model.state_dict(), make_plan(model.config, config), fresh)


def test_grown_layers_share_no_memory():
    model = FunnelForSequenceClassification(with_layout("1,2"))
    config = with_layout("1,2,2,2")
    fresh = FunnelForSequenceClassification(config).state_dict()
    weights = apply_plan(model.state_dict(), make_plan(model.config, config, "copy"), fresh)
    pointers = [t.data_ptr() for t in [*weights.values(), *model.state_dict().values()] if t.numel()]
    assert len(set(pointers)) == len(pointers)


def test_a_plan_survives_its_file(tmp_path):
    old, new = with_layout("2,1"), with_layout("3,1x2,1")
    rows = make_plan(old, new)
    write_plan(tmp_path / "plan.json", rows)
    assert read_plan(tmp_path / "plan.json", old, new) == rows
    rows = make_plan(old, new, "random")
    write_plan(tmp_path / "plan.json", rows)
    assert read_plan(tmp_path / "plan.json", old, new) == rows


KEEP = {"layer": "0.0", "start": "keep", "source": "0.0"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({}, "no layout plan"),
        ([KEEP], "no row for layer 1.0 of the layout 1,1x2"),
        ([KEEP, KEEP], "row 2: layer 0.0 has a row already"),
        ([KEEP, {"layer": "1.0", "start": "copy", "source": "0.1"}], "row 2: source 0.1 is not in the layout 1"),
        ([KEEP, {"layer": "1.1", "start": "copy", "source": "0.0"}], "row 2: layer 1.1 is not in the layout 1,1x2 .layers"),
        ([{"layer": "0.0", "start": "zero", "source": "0.0"}], "row 1: start 'zero' is none of keep, identity"),
        ([{"layer": "0.0", "start": "copy"}], "row 1: a layer that starts as 'copy' takes a source"),
        ([{"layer": "0.0", "start": "random", "source": "0.0"}], "row 1: a layer that starts as 'random' takes no source"),
        ([{"layer": 0, "start": "random"}], 'row 1: layer 0 is no place; it takes "block.layer"'),
        (["keep"], "row 1: it takes layer, start and source"),
    ],
)  # fmt: skip
def test_a_plan_with_a_mistake_is_refused_with_its_row(rows, words, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"layers": rows}))
    with pytest.raises(FunnelError, match=words):
        read_plan(tmp_path / "plan.json", with_layout("1"), with_layout("1,1x2"))


def test_what_cannot_be_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    FunnelForSequenceClassification(with_layout("1,1")).save_pretrained(tmp_path / "old")
    (tmp_path / "old/model.safetensors").unlink()
    (tmp_path / "plan.json").write_text(json.dumps({"layers": [{"layer": "0.0", "start": "keep", "source": "9.0"}]}))
    with pytest.raises(FunnelError, match=r"plan.json, row 1: source 9.0 is not in the layout 1,1"):
        build_classifier(str(tmp_path / "old"), ["a", "b"], "1", plan_file=tmp_path / "plan.json")
    monkeypatch.setattr(cost, "available_memory", lambda: 2**20)
    with pytest.raises(FunnelError, match="GiB are free; take fewer layers"):
        build_classifier(str(tmp_path / "old"), ["a", "b"], "999")


def test_a_built_model_is_in_evaluation_mode():
    assert not build_classifier("none", ["a", "b"], "1,1", texts=["a b"]).model.training


def test_a_layout_larger_than_the_memory_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr(cost, "available_memory", lambda: 2**20)
    with pytest.raises(FunnelError, match=r"blocks 999, width 16: [\d,]+ parameters need .* GiB, and 0.0 GiB are free"):
        flops.check_memory(with_layout("999"), 16)

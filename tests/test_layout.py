"""Changing a layout: where each layer comes from, and what the grown model computes."""

import json

import pytest
import torch
from conftest import real_batch, tiny

from funnel import cost
from funnel.config import parse_layout
from funnel.errors import FunnelError
from funnel.heads import FunnelForSequenceClassification
from funnel.layout import apply_plan, make_plan, read_plan, write_plan


def with_layout(text, **more):
    sizes, repeats = parse_layout(text)
    return tiny(block_sizes=sizes, block_repeats=repeats, **more)


def plan(old, new, init="identity"):
    return [str(row) for row in make_plan(with_layout(old), with_layout(new), init)]


def grow(model, text, init="identity", **more):
    config = with_layout(text, **more)
    grown = FunnelForSequenceClassification(config).eval()
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
    ],
)  # fmt: skip
def test_plans(old, new, init, expected):
    assert plan(old, new, init) == expected


def test_an_unknown_init_is_an_error():
    with pytest.raises(FunnelError, match="zero"):
        plan("1", "1,1", "zero")


def test_the_same_layout_is_the_same_model():
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(with_layout("1,2")).eval()
    batch = real_batch([9, 4])
    assert torch.equal(grow(model, "1,2")(*batch), model(*batch))


def test_unrolled_repeats_compute_the_same():
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(with_layout("1,2x2")).eval()
    batch = real_batch([9, 4])
    torch.testing.assert_close(grow(model, "1,4")(*batch), model(*batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", ["2,3", "1,2,2", "3,3,2,2,2,2,2"])
def test_layers_that_start_as_the_identity_keep_cls(text):
    """Exactly so where LayerNorms have no gain and bias: a LayerNorm of a normalised state changes nothing."""
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(with_layout("1,2")).double().eval()
    batch = real_batch([40, 17, 5])
    torch.testing.assert_close(grow(model, text).double()(*batch), model(*batch), rtol=0, atol=1e-6)


def test_copied_layers_do_not_keep_cls():
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(with_layout("1,2")).eval()
    batch = real_batch([40, 17])
    assert (grow(model, "1,2,2", "copy")(*batch) - model(*batch)).abs().max() > 1e-2


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


def test_a_layout_larger_than_the_memory_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr(cost, "available_memory", lambda: 2**20)
    with pytest.raises(FunnelError, match=r"blocks 999, width 16: [\d,]+ parameters need .* GiB, and 0.0 GiB are free"):
        cost.check_memory(with_layout("999"), 16)

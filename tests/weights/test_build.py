"""Building classifiers, and the options for weights and layout."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config

from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model import flops
from funnel.model.heads import FunnelForSequenceClassification
from funnel.weights.build import WeightsArgs, build_classifier

LABELS = ["bad", "good"]
TEXTS = ["a good film", "a bad film"]


def save_classifier(folder: Path, blocks: str = "1,1") -> Path:
    torch.manual_seed(0)
    tokenizer = FunnelTokenizer.train(TEXTS)
    config = tiny_config(blocks=blocks, vocab_size=tokenizer.vocab_size, id2label=dict(enumerate(LABELS)))
    FunnelForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


# --- options ----------------------------------------------------------------------------------------------------------


def test_malformed_blocks_are_an_error():
    with pytest.raises(FunnelError, match="blocks '2,,2'") as error:
        WeightsArgs(blocks="2,,2")
    assert error.value.parameter == "blocks"


@pytest.mark.parametrize(("name", "value"), [("init", "copy"), ("keep", "last")])
def test_layout_plan_excludes_init_and_keep(name, value):
    with pytest.raises(FunnelError, match=f"{name} has no effect with a layout plan") as error:
        WeightsArgs(layout_plan=Path("plan.json"), **{name: value})
    assert error.value.parameter == name
    WeightsArgs(layout_plan=Path("plan.json"))


def test_weights_must_be_chosen():
    with pytest.raises(FunnelError, match="missing weights") as error:
        build_classifier(WeightsArgs(), LABELS)
    assert error.value.parameter == "weights"


# --- models -----------------------------------------------------------------------------------------------------------


def test_impossible_layout_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    FunnelForSequenceClassification(tiny_config(blocks="1,1")).save_pretrained(tmp_path / "old")
    (tmp_path / "old/model.safetensors").unlink()
    rows = [{"layer": "0.0", "start": "keep", "source": "9.0"}]
    (tmp_path / "plan.json").write_text(json.dumps({"layers": rows}))
    args = WeightsArgs(str(tmp_path / "old"), "1", layout_plan=tmp_path / "plan.json")
    with pytest.raises(FunnelError, match=r"plan.json, row 1: source 9.0 is not in the layout 1,1"):
        build_classifier(args, LABELS)
    monkeypatch.setattr(flops, "available_memory", lambda: 2**20)
    with pytest.raises(FunnelError, match="GiB are available; use fewer layers"):
        build_classifier(WeightsArgs(str(tmp_path / "old"), "999"), LABELS)


def test_layout_larger_than_memory_is_refused(monkeypatch):
    monkeypatch.setattr(flops, "available_memory", lambda: 2**20)
    with pytest.raises(FunnelError, match=r"blocks 999 with d_model 16: [\d,]+ parameters need .* GiB, but only 0\.0 GiB"):
        flops.check_memory(tiny_config(blocks="999"), 16)


def test_built_model_is_in_evaluation_mode():
    assert not build_classifier(WeightsArgs("none", "1,1"), LABELS, ["a b"]).model.training


def test_same_layout_keeps_all_weights(tmp_path):
    folder = save_classifier(tmp_path / "old")
    built = build_classifier(WeightsArgs(str(folder)), LABELS)
    expected = FunnelForSequenceClassification.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in built.model.state_dict().items())
    assert built.origin == f"{folder} (blocks 1,1; 2 layers kept, 0 new: identity)"


def test_a_different_number_of_classes_gets_a_new_head(tmp_path):
    folder = save_classifier(tmp_path / "old")
    built = build_classifier(WeightsArgs(str(folder), "1,1,1"), [*LABELS, "average"])
    assert built.origin.endswith("(blocks 1,1; 2 layers kept, 1 new: identity), new classifier")
    assert built.model.config.id2label == {0: "bad", 1: "good", 2: "average"}
    assert [row.start for row in built.plan] == ["keep", "keep", "identity"]


def test_regression_has_one_output(tmp_path):
    built = build_classifier(WeightsArgs(str(save_classifier(tmp_path / "old"))), None)
    assert built.model.config.num_labels == 1
    assert built.model.config.problem_type == "regression"


def test_random_weights_depend_on_the_seed_only():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        built = build_classifier(WeightsArgs("none", "1,1"), LABELS, TEXTS)
        states.append(built.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert states[0]["embeddings.word_embeddings.weight"].std() < 0.03
    assert built.origin.startswith("random weights (blocks 2,2,2;")

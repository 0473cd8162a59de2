"""Building classifiers, and the options for weights and layout."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config

from funnel.cli.convert import convert
from funnel.data.encoding import encode_texts
from funnel.data.files import ExampleFile, InMemoryExamples
from funnel.data.tasks import Task
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model import flops
from funnel.model.checkpoint import load_checkpoint
from funnel.model.heads import FunnelForSequenceClassification
from funnel.weights.build import WeightsArgs, build_task_model

LABELS = ["bad", "good"]
TEXTS = ["a good film", "a bad film"]


def make_task(labels: list[str] | None = LABELS, **files) -> Task:
    names = None if labels is None else {label: label for label in labels}
    return Task("custom", "test", names, (), 8, 1, 1e-3, files=files or {"train": InMemoryExamples(TEXTS, None, LABELS)})


def build(args: WeightsArgs, labels: list[str] | None = LABELS):
    return build_task_model(args, make_task(labels), 128)


def save_classifier(folder: Path, labels: list[str] = LABELS, **changes) -> Path:
    torch.manual_seed(0)
    tokenizer = FunnelTokenizer.train(TEXTS)
    config = tiny_config(vocab_size=tokenizer.vocab_size, id2label=dict(enumerate(labels)), **{"blocks": "1,1", **changes})
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
        build(WeightsArgs())
    assert error.value.parameter == "weights"


# --- models -----------------------------------------------------------------------------------------------------------


BERT_LIKE = {"relative_attention": False, "position_embeddings": 16, "token_type_embeddings": 2, "num_decoder_layers": 0}


def test_max_length_beyond_the_position_embeddings_is_an_error(tmp_path):
    folder = save_classifier(tmp_path / "weights", blocks="3", **BERT_LIKE)
    with pytest.raises(FunnelError, match=r"max_length 17: .* has position embeddings for only 16 tokens") as error:
        build_task_model(WeightsArgs(str(folder)), make_task(), 17)
    assert error.value.parameter == "max_length"
    for max_length in (16, None):  # None: the task's 128, limited by the position embeddings
        assert build_task_model(WeightsArgs(str(folder)), make_task(), max_length).model.config.model_max_length == 16


def test_a_model_without_pooling_gets_a_recommended_layout(tmp_path):
    folder = save_classifier(tmp_path / "weights", blocks="6", **BERT_LIKE)
    built = build_task_model(WeightsArgs(str(folder)), make_task(), 16)
    assert built.note.startswith("layout 6 does not pool; blocks 4,2 would use 90% of its FLOPs at 16 tokens")
    assert build_task_model(WeightsArgs(str(folder), "6"), make_task(), 16).note == ""  # chosen by the user
    small = save_classifier(tmp_path / "small", blocks="4", **BERT_LIKE)
    assert build_task_model(WeightsArgs(str(small)), make_task(), 16).note == ""  # 3,1 would save nothing
    assert build_task_model(WeightsArgs(str(folder), "4,2"), make_task(), 16).note == ""


def test_blocks_copy_a_layer_that_an_albert_shares(tmp_path):
    folder = save_classifier(tmp_path / "weights", blocks="1x12", embedding_size=8, **BERT_LIKE)
    built = build_task_model(WeightsArgs(str(folder), "1x4,1x4,1x4"), make_task(), 16)
    assert "3 layers copied from 1 shared layer" in built.origin
    layers = [built.model.encoder.layers(block)[0] for block in range(3)]
    assert all(torch.equal(layer.ffn.linear_1.weight, layers[0].ffn.linear_1.weight) for layer in layers)
    assert len({layer.ffn.linear_1.weight.data_ptr() for layer in layers}) == 3


def test_impossible_layout_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    FunnelForSequenceClassification(tiny_config(blocks="1,1")).save_pretrained(tmp_path / "old")
    (tmp_path / "old/model.safetensors").unlink()
    rows = [{"layer": "0.0", "start": "keep", "source": "9.0"}]
    (tmp_path / "plan.json").write_text(json.dumps({"layers": rows}))
    args = WeightsArgs(str(tmp_path / "old"), "1", layout_plan=tmp_path / "plan.json")
    with pytest.raises(FunnelError, match=r"plan.json, row 1: source 9.0 is not in the layout 1,1"):
        build(args)
    monkeypatch.setattr(flops, "available_memory", lambda: 2**20)
    with pytest.raises(FunnelError, match="GiB are available; use fewer layers"):
        build(WeightsArgs(str(tmp_path / "old"), "999"))


def test_layout_larger_than_memory_is_refused(monkeypatch):
    monkeypatch.setattr(flops, "available_memory", lambda: 2**20)
    with pytest.raises(FunnelError, match=r"blocks 999 with d_model 16: [\d,]+ parameters need .* GiB, but only 0\.0 GiB"):
        flops.check_memory(tiny_config(blocks="999"), 16)


def test_built_model_is_in_evaluation_mode():
    assert not build(WeightsArgs("none", "1,1")).model.training


def test_same_layout_keeps_all_weights(tmp_path):
    folder = save_classifier(tmp_path / "old")
    built = build(WeightsArgs(str(folder)))
    expected = FunnelForSequenceClassification.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in built.model.state_dict().items())
    assert built.origin == f"{folder} (blocks 1,1; 2 layers kept), classifier of {folder}"


def test_new_layers_and_labels_are_described(tmp_path):
    folder = save_classifier(tmp_path / "old")
    built = build(WeightsArgs(str(folder), "1,1,1"), [*LABELS, "average"])
    assert built.origin.endswith("2 layers kept, 1 new: identity), classifier: 2 of 3 labels kept; new: average")
    assert built.model.config.id2label == {0: "bad", 1: "good", 2: "average"}
    assert [row.start for row in built.plan] == ["keep", "keep", "identity"]


def test_regression_has_one_output(tmp_path):
    built = build(WeightsArgs(str(save_classifier(tmp_path / "old"))), None)
    assert built.model.config.num_labels == 1
    assert built.model.config.problem_type == "regression"


def test_config_records_how_texts_are_encoded(tmp_path):
    args = WeightsArgs(str(save_classifier(tmp_path / "old", text_columns=("old",), model_max_length=7)))
    for columns, recorded in ((("first", "second"), ("first", "second")), ((3,), ("3",))):
        task = make_task(train=ExampleFile(tmp_path / "train.tsv", columns, "label"))
        config = build_task_model(args, task, 64).model.config
        assert (config.model_max_length, config.text_columns) == (64, recorded)
    joined = make_task(train=ExampleFile(tmp_path / "train.csv", (1, 2), 0, joined=True))  # a single text
    assert build_task_model(args, joined, 64).model.config.text_columns == ()


def test_escaped_special_tokens_are_saved_with_the_tokenizer(tmp_path):
    folder = str(save_classifier(tmp_path / "old"))
    for escape, n_separators in ((False, 2), (True, 1)):
        build(WeightsArgs(folder, escape_special_tokens=escape)).tokenizer.save(tmp_path)
        tokenizer = FunnelTokenizer.load(tmp_path)
        assert tokenizer.encode(["a <sep> film"])[0].input_ids.count(tokenizer.ids["sep"]) == n_separators


def test_text_needs_a_tokenizer(tmp_path):
    folder = save_classifier(tmp_path / "old")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FunnelError, match="old: no tokenizer found; copy the model's tokenizer"):
        build(WeightsArgs(str(folder)))


def test_random_weights_depend_on_the_seed_only():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        built = build(WeightsArgs("none", "1,1"))
        states.append(built.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert states[0]["embeddings.word_embeddings.weight"].std() < 0.03
    assert built.origin == "random weights (2 blocks, 2 layers)"


# --- labels -----------------------------------------------------------------------------------------------------------

OUTPUT = ("classifier.linear_out.weight", "classifier.linear_out.bias")


def output_rows(folder: Path, built) -> tuple[torch.Tensor, torch.Tensor]:
    """The output layers of the weights and of the model built from them, [num_labels, d + 1]."""
    states = load_checkpoint(folder).weights, built.model.state_dict()
    return tuple(torch.cat([state[OUTPUT[0]], state[OUTPUT[1]][:, None]], dim=1) for state in states)


@pytest.mark.parametrize(
    ("labels", "sources", "head"),
    [
        (["bad", "good"], {0: 0, 1: 1}, "classifier of "),
        (["good", "bad"], {0: 1, 1: 0}, "classifier of "),
        (["average", "bad", "good"], {1: 0, 2: 1}, "classifier: 2 of 3 labels kept; new: average"),
        (["good", "other"], {0: 1}, "classifier: 1 of 2 labels kept; new: other; dropped: bad"),
        (["no", "yes"], {}, "new classifier (the weights have the labels bad, good)"),
        (["Bad", "Good"], {}, "new classifier (the weights have the labels bad, good)"),
        (None, {}, "new classifier (the weights are for single-label classification)"),
    ],
)
@pytest.mark.parametrize("is_exported", [False, True])
def test_outputs_are_matched_by_label(labels, sources, head, is_exported, tmp_path):
    folder = save_classifier(tmp_path / "old")
    weights = folder
    if is_exported:
        convert(str(folder), tmp_path / "exported", "huggingface")
        weights = tmp_path / "exported"
    torch.manual_seed(1)
    built = build(WeightsArgs(str(weights)), labels)
    assert f"layers kept), {head}" in built.origin
    assert built.has_new_head == (not head.startswith("classifier of"))
    old, new = output_rows(folder, built)
    for row in range(len(new)):
        assert torch.equal(new[row], old[sources[row]]) if row in sources else not (new[row] == old).all(1).any()
    hidden = "classifier.linear_hidden.weight"
    assert torch.equal(built.model.state_dict()[hidden], load_checkpoint(folder).weights[hidden])


def test_classification_replaces_the_output_of_a_regression(tmp_path):
    units = {"label_mean": 5.0, "label_std": 2.0}
    folder = save_classifier(tmp_path / "old", ["bad"], problem_type="regression", **units)
    built = build(WeightsArgs(str(folder)), ["bad", "good"])
    assert built.origin.endswith("new classifier (the weights are for regression)")
    assert (built.model.config.label_mean, built.model.config.label_std) == (0, 1)
    old, new = output_rows(folder, built)
    assert not torch.equal(new[0], old[0])


def test_regression_keeps_the_output_and_the_units_of_a_regression(tmp_path):
    units = {"label_mean": 5.0, "label_std": 2.0}
    folder = save_classifier(tmp_path / "old", ["LABEL_0"], problem_type="regression", **units)
    built = build(WeightsArgs(str(folder)), None)
    assert built.origin.endswith(f"classifier of {folder}")
    assert (built.model.config.label_mean, built.model.config.label_std) == (5, 2)
    old, new = output_rows(folder, built)
    assert torch.equal(new, old)


def test_multi_label_weights_start_a_single_label_classifier(tmp_path):
    save_classifier(tmp_path / "old", problem_type="multi_label_classification")
    convert(str(tmp_path / "old"), tmp_path / "exported", "huggingface")
    built = build(WeightsArgs(str(tmp_path / "exported")))
    assert built.origin.endswith("new classifier (the weights are for multi-label classification)")
    assert built.model.config.problem_type == "single_label_classification"


# --- regression -------------------------------------------------------------------------------------------------------


def labeled(built, labels):
    dataset = encode_texts(["a good film"] * len(labels), None, built.tokenizer, 32)
    return replace(dataset, rows=dataset.rows._replace(labels=np.array(labels, dtype=np.float32)))


def scores_of(built):
    with torch.no_grad():
        return built.model(torch.tensor([[2, 5, 6], [2, 7, 8]]))


def build_regression(weights):
    return build(WeightsArgs(str(weights)), None)


def continue_regression(labels, folder):
    """A regression with standardized labels, and one built from it."""
    first = build_regression(save_classifier(folder / "weights"))
    first.standardize_labels(labeled(first, labels))
    first.model.save_pretrained(folder / "trained")
    first.tokenizer.save(folder / "trained")
    return first, build_regression(folder / "trained")


@pytest.mark.parametrize("is_random", [True, False])
def test_a_new_regression_head_predicts_near_the_mean_of_the_labels(is_random, tmp_path):
    torch.manual_seed(0)
    built = build_regression("none" if is_random else save_classifier(tmp_path / "weights"))
    built.standardize_labels(labeled(built, [10_000, 50_000, 90_000]))
    config = built.model.config
    assert config.label_mean == 50_000
    assert config.label_std == pytest.approx(np.std([10_000, 50_000, 90_000]))
    distances = (scores_of(built) - config.label_mean).abs() / config.label_std
    assert ((distances > 1e-3) & (distances < 5)).all()


def test_a_trained_regression_head_keeps_its_scores_in_other_units(tmp_path):
    first, second = continue_regression([1, 2, 6], tmp_path)
    second.standardize_labels(labeled(second, [2, 4, 9, 3]))
    assert second.model.config.label_mean == 4.5
    torch.testing.assert_close(scores_of(second), scores_of(first))
    weight = second.model.classifier.linear_out.weight.clone()
    second.standardize_labels(labeled(second, [2, 4, 9, 3]))  # as on resuming
    assert torch.equal(second.model.classifier.linear_out.weight, weight)


def test_in_another_unit_a_trained_regression_head_keeps_its_standardized_scores(tmp_path):
    first, second = continue_regression([10_000, 50_000, 90_000], tmp_path)
    second.standardize_labels(labeled(second, [10, 50, 90]))
    torch.testing.assert_close(scores_of(second) * 1000, scores_of(first))


def test_a_head_without_units_keeps_its_scores(tmp_path):
    """Another program's head, whose outputs have the unit of the labels."""
    folder = save_classifier(tmp_path / "weights", ["score"], problem_type="regression")
    built = build_regression(folder)
    before = scores_of(built)
    built.standardize_labels(labeled(built, [10_000, 50_000, 90_000]))
    torch.testing.assert_close(scores_of(built), before, rtol=0, atol=0.1)


@pytest.mark.parametrize("label", [0.1, 1e30, 0.0])
def test_constant_labels_have_the_deviation_1(tmp_path, label):
    built = build_regression(save_classifier(tmp_path / "weights"))
    built.standardize_labels(labeled(built, [label] * 7))
    assert built.model.config.label_std == 1
    assert built.model.config.label_mean == pytest.approx(label if label > 3 else 0)


def test_small_labels_are_not_standardized(tmp_path):
    built = build_regression(save_classifier(tmp_path / "weights"))
    before = scores_of(built)
    built.standardize_labels(labeled(built, [0, 2, 3, 5]))  # as in STS-B
    assert (built.model.config.label_mean, built.model.config.label_std) == (0, 1)
    assert torch.equal(scores_of(built), before)

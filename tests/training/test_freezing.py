"""Freezing: what stays as it is, what is still trained, and that the backward pass stops."""

import copy
import json

import pytest
import torch
from conftest import padded_batch, tiny_config

import train
from funnel.errors import FunnelError
from funnel.model.compilation import compile_regions
from funnel.model.encoder import FunnelLayer
from funnel.model.heads import FunnelForSequenceClassification, FunnelForTokenClassification
from funnel.training.freezing import FreezeArgs, describe_frozen, freeze, layer_runs
from funnel.training.optim import build_adamw, clip_grad_norm, layer_lr_scales, param_groups

BATCH = padded_batch([9, 5, 12])


def make_model(cls=FunnelForSequenceClassification, **changes):
    torch.manual_seed(0)
    return cls(tiny_config(**{"blocks": "2,1x2,2", "distance_buckets": 8, **changes})).train()


def frozen_model(layers=None, cls=FunnelForSequenceClassification, **changes):
    model = make_model(cls, **changes)
    freeze(model, FreezeArgs(freeze_embeddings=True, freeze_layers=layers))
    return model


def backward(model):
    model(*BATCH).square().sum().backward()
    return model


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- which parameters -------------------------------------------------------------------------------------------------


def test_layers_are_counted_in_runs_through_all_blocks():
    names = trained_names(frozen_model(4))
    prefixes = {".".join(name.split(".")[:4]) for name in names if name.startswith("encoder")}
    assert prefixes == {"encoder.blocks.2.0", "encoder.blocks.2.1"}
    assert [
        len({name.split(".")[2:4][0] for name in trained_names(frozen_model(n)) if "blocks" in name}) for n in (1, 2, 5)
    ] == [
        3,
        2,
        1,
    ]


def test_freezing_layers_freezes_the_embeddings_and_the_distance_bias():
    model = make_model()
    freeze(model, FreezeArgs(freeze_layers=1))
    assert not any(name.startswith(("embeddings", "encoder.distance_bias")) for name in trained_names(model))
    assert trained_names(frozen_model()) == trained_names(frozen_model(1)) | {
        name for name, _ in model.named_parameters() if name.startswith("encoder.blocks.0.0.")
    }


def test_without_the_options_everything_is_trained():
    model = make_model()
    freeze(model, FreezeArgs())
    assert trained_names(model) == dict(model.named_parameters()).keys()
    assert describe_frozen(model, None) == ""


def test_all_layers_can_be_frozen_but_not_the_head_and_the_decoder():
    assert {name.split(".")[0] for name in trained_names(frozen_model(6))} == {"classifier"}
    model = frozen_model(6, FunnelForTokenClassification, num_decoder_layers=1)
    assert {name.split(".")[0] for name in trained_names(model)} == {"classifier", "decoder"}


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (7, "freeze_layers 7: the layout 2,1x2,2 has 6 layers"),
        (3, r"layers 3 to 4 of 2,1x2,2 share their weights; choose 2 or 4"),
    ],
)
def test_an_impossible_number_of_layers_is_an_error(count, message):
    model = make_model()
    with pytest.raises(FunnelError, match=message):
        freeze(model, FreezeArgs(freeze_layers=count))
    assert trained_names(model) == dict(model.named_parameters()).keys()


def test_the_banner_gives_the_number_of_trained_parameters():
    model = frozen_model(6)
    head = sum(parameter.numel() for parameter in model.classifier.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert describe_frozen(model, 6) == f"training {head:,} of {total:,} parameters; frozen: embeddings, 6 layers"
    assert describe_frozen(frozen_model(), None).endswith("frozen: embeddings")


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, 2, 4, 6])
@pytest.mark.parametrize("cls", [FunnelForSequenceClassification, FunnelForTokenClassification])
def test_gradients_of_the_trained_part_equal_those_of_the_whole_model(layers, cls):
    whole, partial = backward(make_model(cls, num_decoder_layers=1)), backward(frozen_model(layers, cls, num_decoder_layers=1))
    expected = dict(whole.named_parameters())
    for name, parameter in partial.named_parameters():
        assert (parameter.grad is not None) == (name in trained_names(partial))
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_frozen_weights_stay_bit_for_bit_and_all_others_change(decay):
    model = frozen_model(2, FunnelForTokenClassification, hidden_dropout=0.1, num_decoder_layers=1)
    before, trained = copy.deepcopy(model.state_dict()), trained_names(model)
    optimizer = build_adamw(param_groups(model, 0.1, decay), 1e-2)
    for _ in range(3):
        backward(model)
        clip_grad_norm(model, 1.0, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


def test_the_optimizer_gets_only_trained_parameters_with_the_rates_they_would_have():
    model = frozen_model(4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups(model, 0.01, 0.8)
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    expected = layer_lr_scales(make_model(), 0.8)
    assert scales == {name: expected[name] for name in trained_names(model)}


# --- the backward pass ------------------------------------------------------------------------------------------------


def saved_bytes(model) -> int:
    """Size of the activations that a forward pass saves for the backward pass."""
    saved, weights = {}, {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*BATCH)
    del output
    return sum(saved.values())


def test_no_activations_are_saved_below_the_first_trained_layer():
    outputs = {}
    model = frozen_model(4, hidden_dropout=0.1, attention_dropout=0.1)
    for number, layer in enumerate(dict.fromkeys(layer_runs(model))):
        layer.register_forward_hook(lambda _m, _i, output, number=number: outputs.update({number: output}))
    backward(model)
    assert [outputs[number].requires_grad for number in range(5)] == [False, False, False, True, True]
    whole, embeddings, half, head = (saved_bytes(m) for m in (make_model(), frozen_model(), frozen_model(4), frozen_model(6)))
    assert whole > embeddings > half > head
    assert head < 0.02 * whole


def test_frozen_layers_are_not_recomputed_with_gradient_checkpointing(monkeypatch):
    runs, compute = [], FunnelLayer.compute
    monkeypatch.setattr(FunnelLayer, "compute", lambda self, *inputs: runs.append(self) or compute(self, *inputs))
    model, plain = frozen_model(4), frozen_model(4)
    model.set_gradient_checkpointing(True)
    backward(model)
    assert [runs.count(layer) for layer in dict.fromkeys(layer_runs(model))] == [1, 1, 2, 2, 2]
    backward(plain)
    for actual, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert (actual.grad is None and expected.grad is None) or torch.equal(actual.grad, expected.grad)


def test_dropout_stays_active_in_frozen_layers():
    model = frozen_model(6, hidden_dropout=0.5)
    assert not torch.equal(model(*BATCH), model(*BATCH))


@pytest.mark.slow
def test_a_compiled_model_has_the_same_gradients(compile_with):
    compile_with(lambda graph, _: graph.forward)
    eager, compiled = (frozen_model(1, blocks="1,1", distance_buckets=0) for _ in range(2))
    compile_regions(compiled)
    for actual, expected in zip(backward(compiled).parameters(), backward(eager).parameters(), strict=True):
        assert (actual.grad is None) == (expected.grad is None)
        if expected.grad is not None:
            torch.testing.assert_close(actual.grad, expected.grad)


# --- train.py ---------------------------------------------------------------------------------------------------------


def test_a_frozen_run_resumes_with_the_same_frozen_part(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "a good film\t1\na bad film\t0\n" * 10)
    arguments = [
        "--data",
        str(tmp_path / "train.tsv"),
        "--weights",
        "none",
        "--blocks",
        "1,1",
        "--steps",
        "6",
        "--device",
        "cpu",
    ]
    arguments += ["--batch-size", "4", "--eval-every", "2", "--freeze-layers", "1", "--dtype", "fp32", "--max-length", "8"]
    assert train.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    assert "frozen: embeddings, 1 layer" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(train.TrainComponents, "autocast", fail_at(6, train.TrainComponents.autocast))
        with pytest.raises(ZeroDivisionError):
            train.main([*arguments, "--out", str(tmp_path / "run")])
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 0
    assert "frozen: embeddings, 1 layer" in capsys.readouterr().out
    whole, resumed = (FunnelForSequenceClassification.from_pretrained(tmp_path / name / "last") for name in ("whole", "run"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"]["freeze_layers"] == 1
    assert train.main([*arguments[:-6], "--freeze-layers", "2", "--resume", "--out", str(tmp_path / "run")]) == 2
    assert "was started with 1; omit --freeze-layers" in capsys.readouterr().err


def fail_at(number, function):
    """Wraps a function so that its `number`-th call fails."""
    calls = []

    def wrapped(*arguments):
        calls.append(arguments)
        return function(*arguments) if len(calls) < number else 1 / 0

    return wrapped


def test_a_number_of_layers_that_the_model_lacks_is_an_error_before_the_run_folder_is_created(tmp_path, capsys):
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "a good film\t1\na bad film\t0\n" * 10)
    arguments = ["--data", str(tmp_path / "train.tsv"), "--weights", "none", "--blocks", "1,1", "--steps", "1"]
    assert train.main([*arguments, "--freeze-layers", "3", "--out", str(tmp_path / "run")]) == 2
    assert "--freeze-layers 3: the layout 1,1 has 2 layers" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

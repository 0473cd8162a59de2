"""Distillation of hidden states, against computations in numpy on one text at a time."""

import copy

import numpy as np
import pytest
import torch
from conftest import ABSOLUTE, padded_batch, tiny_config

from funnel.errors import FunnelError
from funnel.model.compilation import compile_regions
from funnel.model.heads import FunnelBaseModel, FunnelModel
from funnel.pretraining.distill import PROJECTIONS, STATES, Distillation

LENGTHS = [13, 4, 9, 1, 2]


def make_teacher(**changes):
    """A BERT: one block, absolute positions, no decoder."""
    torch.manual_seed(1)
    values = {"blocks": "4", "num_decoder_layers": 0, "hidden_dropout": 0.5, **ABSOLUTE}
    return FunnelModel(tiny_config(**{**values, **changes})).double()


def make_student(**changes):
    torch.manual_seed(2)
    return FunnelModel(tiny_config(**{"blocks": "2,1,1x2", "num_decoder_layers": 1, **changes})).double()


def make_inputs(padding=0):
    ids, mask, types = (torch.nn.functional.pad(tensor, (0, padding)) for tensor in padded_batch(LENGTHS))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "token_weights": mask.double() / sum(LENGTHS)}


def distill(student=None, teacher=None, states="decoder"):
    return Distillation(student or make_student(), teacher or make_teacher(), None, states).double()


def assert_close(actual, expected):
    """Distances are computed in float32."""
    torch.testing.assert_close(actual.float(), expected.float(), rtol=1e-5, atol=1e-6)


def values_of(objective, inputs=None):
    return dict(zip(objective.names, objective(**(inputs or make_inputs())).tolist(), strict=True))


# --- the terms against numpy ------------------------------------------------------------------------------------------


def single_texts(inputs):
    """The texts one by one, without padding: the model's inputs, [1, l] each."""
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        yield [inputs[name][row : row + 1, :length] for name in ("input_ids", "attention_mask", "token_type_ids")]


def halve(states):
    """Means of pairs of tokens; [CLS] is kept, and a last token without a partner is dropped."""
    pairs = states[1 : 1 + (len(states) - 1) // 2 * 2]
    return np.concatenate([states[:1], pairs.reshape(-1, 2, states.shape[1]).mean(1)])


def numpy_distance(student, teacher):
    return 1 - (student * teacher).sum(1) / np.linalg.norm(student, axis=1) / np.linalg.norm(teacher, axis=1)


def expected_states(inputs, pairs_of):
    """The values, where `pairs_of` returns the student's and the teacher's states, [p, d], and the tokens per position."""
    states = cls = 0.0
    total = inputs["attention_mask"].sum().item()
    for text in single_texts(inputs):
        pairs = pairs_of(*text)
        for student, teacher, window in pairs:
            distances = numpy_distance(student[: len(teacher)], teacher)
            states += distances[1:].sum() * window / total / len(pairs)
            cls += distances[0] * text[0].shape[1] / total / len(pairs)
    return {"states": states, "cls": cls, "loss": states + 5 * cls}


@torch.no_grad()
def encoder_states(model, *inputs):
    return [state[0].numpy() for state in model.eval().encode(*inputs)[0]]


@torch.no_grad()
def output(model, *inputs):
    return model.eval()(*inputs)[0].numpy()


def test_decoder_states_are_compared_with_the_teachers_last_states():
    student, teacher, inputs = make_student(), make_teacher(), make_inputs()
    expected = expected_states(inputs, lambda *text: [(output(student, *text), output(teacher, *text), 1)])
    assert values_of(distill(student, teacher), inputs) == pytest.approx(expected, rel=1e-5)


def test_the_last_block_is_compared_with_pooled_states_of_the_teacher():
    student, teacher, inputs = make_student(), make_teacher(), make_inputs()

    def pairs(*text):
        return [(encoder_states(student, *text)[-1], halve(halve(output(teacher, *text))), 4)]

    assert values_of(distill(student, teacher, states="pooled"), inputs) == pytest.approx(
        expected_states(inputs, pairs), rel=1e-5
    )


def test_every_block_is_compared_with_the_layer_at_the_same_relative_depth():
    student, teacher, inputs = make_student(blocks="2,1,1x2"), make_teacher(blocks="10"), make_inputs()

    def pairs(*text):
        ours, theirs = encoder_states(student, *text), encoder_states(teacher, *text)
        # After 2, 3 and 5 of 5 runs: layers 4, 6 and 10 of 10.
        return [(ours[2], theirs[4], 1), (ours[3], halve(theirs[6]), 2), (ours[5], halve(halve(theirs[10])), 4)]

    assert values_of(distill(student, teacher, states="blocks"), inputs) == pytest.approx(
        expected_states(inputs, pairs), rel=1e-5
    )


def test_a_teacher_that_pools_is_pooled_further():
    student, inputs = make_student(), make_inputs()
    teacher = FunnelBaseModel(tiny_config(blocks="1,1")).double()

    def pairs(*text):
        theirs = encoder_states(teacher, *text)[-1][: 1 + (text[0].shape[1] - 1) // 2]  # without incomplete pairs
        return [(encoder_states(student, *text)[-1], halve(theirs), 4)]

    assert values_of(distill(student, teacher, states="pooled"), inputs) == pytest.approx(
        expected_states(inputs, pairs), rel=1e-5
    )


# --- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_teacher, make_student])  # a BERT; a Funnel with a decoder
@pytest.mark.parametrize("states", STATES)
def test_a_student_that_is_the_teacher_has_no_loss(states, make):
    teacher = make()
    objective = distill(copy.deepcopy(teacher).eval(), teacher, states)
    assert values_of(objective) == pytest.approx(dict.fromkeys(objective.names, 0.0), abs=1e-5)


@pytest.mark.parametrize("truncate_seq", [True, False])
@pytest.mark.parametrize("states", STATES)
def test_padding_does_not_change_the_loss(states, truncate_seq):
    objective = distill(make_student(truncate_seq=truncate_seq), states=states)
    assert_close(objective(**make_inputs(padding=9)), objective(**make_inputs()))


@pytest.mark.parametrize("states", STATES)
def test_micro_batches_add_up(states):
    objective, inputs = distill(states=states), make_inputs()
    parts = [{name: tensor[rows] for name, tensor in inputs.items()} for rows in (slice(0, 2), slice(2, 5))]
    assert_close(sum(objective(**part) for part in parts), objective(**inputs))


def test_a_rank_without_texts_has_no_loss():
    inputs = make_inputs()
    inputs["token_weights"] = torch.zeros_like(inputs["token_weights"])
    assert distill()(**inputs).abs().max() == 0


@pytest.mark.parametrize("states", STATES)
def test_the_loss_falls_on_a_single_batch(states):
    objective, inputs = distill(teacher=make_teacher(d_model=24), states=states), make_inputs()
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        values = objective(**inputs)
        values[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(values.detach())
    assert losses[-1][0] < 0.7 * losses[0][0]
    assert (losses[-1] < losses[0]).all()  # every term


@pytest.mark.parametrize("states", STATES)
def test_all_parameters_that_are_trained_get_a_gradient(states):
    objective = distill(teacher=make_teacher(d_model=24), states=states)
    objective(**make_inputs())[0].backward()
    without = {name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set()
    is_frozen = {name.startswith("model.decoder") for name, p in objective.named_parameters() if not p.requires_grad}
    assert is_frozen == (set() if states == "decoder" else {True})


def test_a_compiled_student_has_the_same_loss(compile_with):
    objective = distill(make_student(blocks="2,1"), make_teacher(blocks="1")).train()
    expected = objective(**make_inputs())
    compile_with("eager")
    compile_regions(objective)
    assert_close(objective(**make_inputs()), expected)


# --- the teacher ------------------------------------------------------------------------------------------------------


def test_the_teacher_is_neither_trained_nor_saved():
    objective = distill()
    assert all(name.startswith("model.") for name in objective.state_dict())
    assert [name for name, _ in objective.named_parameters()] == [f"model.{n}" for n, _ in objective.model.named_parameters()]
    objective(**make_inputs())[0].backward()
    assert all(p.grad is None for p in objective.teacher.parameters())


def test_the_teacher_stays_in_evaluation_mode():
    objective = distill().train()
    assert objective.model.training
    assert not any(module.training for module in objective.teacher.modules())
    torch.testing.assert_close(objective(**make_inputs()), objective(**make_inputs()), rtol=0, atol=0)  # no dropout


def test_the_teacher_moves_with_the_objective():
    objective = distill().to(torch.float32)
    assert {p.dtype for p in objective.teacher.parameters()} == {torch.float32}
    assert {p.device.type for p in objective.to("meta").teacher.parameters()} == {"meta"}


def test_token_ids_are_mapped_for_the_teacher():
    teacher, inputs = make_teacher(), make_inputs()
    order = torch.randperm(99)
    shuffled = copy.deepcopy(teacher)
    shuffled.embeddings.word_embeddings.weight.data[order] = teacher.embeddings.word_embeddings.weight.data
    expected = distill(teacher=teacher)(**inputs)
    assert_close(Distillation(make_student(), shuffled, order)(**inputs), expected)


# --- projections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("states", "count"), [("decoder", 1), ("pooled", 1), ("blocks", 3)])
def test_projections_are_saved_and_loaded(states, count, tmp_path):
    first, second = (distill(teacher=make_teacher(d_model=24), states=states) for _ in range(2))
    assert len(first.projections) == count
    assert first.projections[0].weight.shape == (24, 16)
    for parameter in first.projections.parameters():
        torch.nn.init.normal_(parameter)
    first.save(tmp_path, first.state_dict())
    assert values_of(first) != pytest.approx(values_of(second))
    second.load(tmp_path)
    assert values_of(first) == values_of(second)


def test_without_projections_nothing_is_written(tmp_path):
    objective = distill()
    objective.save(tmp_path, objective.state_dict())
    assert list(tmp_path.iterdir()) == []
    distill().load(tmp_path)


def test_projections_that_do_not_match_are_an_error(tmp_path):
    with pytest.raises(FunnelError, match=f"{PROJECTIONS}: no such file"):
        distill(teacher=make_teacher(d_model=24)).load(tmp_path)
    objective = distill(teacher=make_teacher(d_model=24))
    objective.save(tmp_path, objective.state_dict())
    with pytest.raises(FunnelError, match=r"0\.bias has shape \[24\]"):
        distill(teacher=make_teacher(d_model=32)).load(tmp_path)
    with pytest.raises(FunnelError, match=r"missing 1\.weight"):
        distill(teacher=make_teacher(d_model=24), states="blocks").load(tmp_path)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_unknown_states_are_an_error():
    with pytest.raises(FunnelError, match="unknown states 'all'; choose from decoder, pooled, blocks"):
        distill(states="all")


@pytest.mark.parametrize(
    ("teacher", "states", "message"),
    [
        (FunnelBaseModel(tiny_config(blocks="1,1")), "decoder", "pools and has no decoder"),
        (FunnelModel(tiny_config(blocks="1,1", num_decoder_layers=0)), "decoder", "pools and has no decoder"),
        (FunnelBaseModel(tiny_config(blocks="1,1,1,1")), "pooled", r"\(blocks 1,1,1,1\) pools earlier than the student"),
        (FunnelBaseModel(tiny_config(blocks="1,1,4")), "blocks", "pools earlier than the student"),
        (FunnelBaseModel(tiny_config(blocks="1,1", truncate_seq=False)), "pooled", "truncate_seq differs"),
    ],
)
def test_a_teacher_without_the_states_is_an_error(teacher, states, message):
    with pytest.raises(FunnelError, match=message):
        distill(teacher=teacher, states=states)

"""Task distillation: the loss against numpy, which teachers are accepted, and that the teacher is only read."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ABSOLUTE, padded_batch, tiny_config

from funnel.data.batches import text_batch
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model.heads import FunnelForSequenceClassification, FunnelModel
from funnel.problems.classification import Classification
from funnel.problems.registry import problem_of
from funnel.problems.regression import Regression
from funnel.training.teacher import DistillationLoss, Teacher, TeacherArgs, cls_distance, training_loss

CPU = torch.device("cpu")
WORDS = "a good bad film the very not"
LABELS = {0: "bad", 1: "good", 2: "mixed"}
REGRESSION = {"id2label": {0: "score"}, "problem_type": "regression"}


def make_tokenizer(words=WORDS):
    return FunnelTokenizer.train([words] * 5)


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    size = make_tokenizer().vocab_size
    return FunnelForSequenceClassification(tiny_config(**{"vocab_size": size, "id2label": LABELS, **changes}))


def save(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save(folder)
    return folder


def make_batch(labels):
    ids, mask, types = padded_batch([5, 9, 7])
    return text_batch(ids % 15, mask, types, torch.tensor(labels))


# --- the loss ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(model, batch):
    """Logits and [CLS] states in float64."""
    logits, cls = model.eval()(**batch.inputs, output_cls=True)
    return logits.double().numpy(), cls.double().numpy()


def softmax(x):
    return np.exp(x) / np.exp(x).sum(1, keepdims=True)


def numpy_cls_distance(x, y):
    x, y = (states / np.linalg.norm(states, axis=1, keepdims=True) for states in (x, y))
    return ((x - y) ** 2).sum(1).mean()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_of_classes(weight):
    student, teacher, batch = make_model(0, blocks="1,1"), make_model(1), make_batch([2, 0, 1])
    (logits, cls), (expected, teacher_cls) = outputs(student, batch), outputs(teacher, batch)
    cross_entropy = -np.log(softmax(logits)[range(3), [2, 0, 1]]).mean()
    p, q = softmax(expected / 2), softmax(logits / 2)
    divergence = (p * np.log(p / q)).sum(1).mean()
    by_hand = (1 - weight) * cross_entropy + weight * (4 * divergence + 0.1 * numpy_cls_distance(cls, teacher_cls))
    loss = DistillationLoss(Classification(student.config), Teacher(teacher), weight)(student, batch)
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_the_loss_of_scores_is_in_standardized_units():
    student, teacher = make_model(0, **REGRESSION, label_mean=3.0, label_std=4.0), make_model(1, **REGRESSION, label_std=2.0)
    batch = make_batch([1.5, 7.0, -2.0])
    (scores, cls), (expected, teacher_cls) = outputs(student, batch), outputs(teacher, batch)
    errors = [(((scores - other) / 4) ** 2).mean() for other in (np.array([[1.5], [7.0], [-2.0]]), expected)]
    by_hand = 0.25 * errors[0] + 0.75 * (errors[1] + 0.1 * numpy_cls_distance(cls, teacher_cls))
    loss = DistillationLoss(Regression(student.config), Teacher(teacher), 0.75)(student, batch)
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_states_of_other_widths_are_not_compared():
    student, teacher, batch = make_model(0), make_model(1, d_model=24), make_batch([2, 0, 1])
    p, q = (softmax(outputs(model, batch)[0] / 2) for model in (teacher, student))
    loss = DistillationLoss(Classification(student.config), Teacher(teacher), 1.0)(student, batch)
    assert loss.item() == pytest.approx(4 * (p * np.log(p / q)).sum(1).mean(), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, REGRESSION])
def test_a_student_that_is_the_teacher_has_no_teacher_loss(changes):
    model = make_model(**changes).eval()
    batch = make_batch([0.0, 1.0, 0.0] if changes else [0, 1, 0])
    loss = DistillationLoss(problem_of(type(model).__name__, model.config), Teacher(copy.deepcopy(model)), 1.0)(model, batch)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_micro_batches_add_up():
    student, batch = make_model(0), make_batch([2, 0, 1])
    loss = DistillationLoss(Classification(student.config), Teacher(make_model(1)), 0.5)
    parts = sum(loss(student, micro) * micro.weight for micro in batch.split(2))
    torch.testing.assert_close(parts, loss(student, batch))


def test_only_the_student_gets_gradients():
    student, teacher = make_model(0), Teacher(make_model(1, hidden_dropout=0.5))
    loss = DistillationLoss(Classification(student.config), teacher, 1.0)
    student.train()
    first, second = (loss(student, make_batch([2, 0, 1])) for _ in range(2))
    assert first == second  # the teacher has no dropout
    first.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_cls_states_are_those_that_the_classifier_reads():
    model, batch = make_model().eval(), make_batch([0, 0, 0])
    logits, cls = model(**batch.inputs, output_cls=True)
    torch.testing.assert_close(model.classifier(cls), logits)
    torch.testing.assert_close(model(**batch.inputs), logits)
    assert cls_distance(cls, 3 * cls).item() == pytest.approx(0, abs=1e-6)


# --- loading a teacher ------------------------------------------------------------------------------------------------


def test_a_teacher_with_the_labels_in_another_order_is_permuted(tmp_path):
    teacher, batch = make_model(1, id2label={0: "mixed", 1: "bad", 2: "good"}).eval(), make_batch([0, 0, 0])
    loaded = Teacher.load(save(teacher, tmp_path / "t"), make_model().config, make_tokenizer())
    torch.testing.assert_close(loaded(**batch.inputs)[0], teacher(**batch.inputs)[:, [1, 2, 0]])


def test_a_teacher_with_other_token_ids_is_mapped(tmp_path):
    own, other = make_tokenizer(), FunnelTokenizer.train([WORDS] * 5 + ["very", "not"])  # frequent words have smaller ids
    text = "the film was not very bad"
    ids = [tokenizer([text])["input_ids"] for tokenizer in (own, other)]
    assert ids[0].tolist() != ids[1].tolist()
    teacher = make_model(1).eval()
    loaded = Teacher.load(save(teacher, tmp_path / "t", other), make_model().config, own)
    arguments = torch.ones_like(ids[0]), torch.zeros_like(ids[0])
    torch.testing.assert_close(loaded(ids[0], *arguments)[0], teacher(ids[1], *arguments))


def test_a_run_is_read_from_its_best_checkpoint(tmp_path):
    save(make_model(1), tmp_path / "run/best")
    (tmp_path / "run/run.json").write_text("{}")
    loss = training_loss(TeacherArgs(tmp_path / "run"), Classification(make_model().config), make_tokenizer(), CPU)
    assert isinstance(loss, DistillationLoss)
    assert loss.weight == 0.5


def test_without_a_teacher_the_loss_is_that_of_the_labels():
    model, batch = make_model(**REGRESSION, label_std=2.0), make_batch([1.0, 2.0, 3.0])
    loss = training_loss(TeacherArgs(), Regression(model.config), make_tokenizer(), CPU)
    expected = ((model(**batch.inputs).squeeze(1) - batch.labels) / 2).square().mean()
    assert loss(model, batch) == expected
    with pytest.raises(FunnelError, match="teacher_weight has no effect without a teacher"):
        TeacherArgs(teacher_weight=0.25).check_teacher()


def robertas_tokenizer():
    """One with the same words that puts two separators between the texts of a pair."""
    tokenizer = make_tokenizer()
    tokenizer.separators = 2
    return tokenizer


@pytest.mark.parametrize(
    ("teacher", "student", "message", "parameter"),
    [
        ({"id2label": {0: "bad", 1: "good"}}, {}, "its labels are bad, good, those of the task bad, good, mixed", "teacher"),
        (REGRESSION, {}, "trained for regression, the task is single-label classification", "teacher"),
        ({**ABSOLUTE, "position_embeddings": 64}, {"model_max_length": 65}, "max_length 65: .* for 64 tokens", "max_length"),
    ],
)
def test_a_teacher_of_another_task_is_an_error(teacher, student, message, parameter, tmp_path):
    folder = save(make_model(**teacher), tmp_path / "t")
    with pytest.raises(FunnelError, match=message) as error:
        Teacher.load(folder, make_model(**student).config, make_tokenizer())
    assert error.value.parameter == parameter
    assert "\n" not in str(error.value)


def save_body(folder: Path) -> None:
    model = make_model()
    FunnelModel(model.config).save_pretrained(folder)
    make_tokenizer().save(folder)


def save_with_other_words(folder: Path) -> None:
    save(make_model(vocab_size=200), folder, make_tokenizer("one two three"))


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda folder: None, "teacher: .*t"),
        (save_body, "expected a text classifier, found a FunnelModel"),
        (save_with_other_words, "teacher: .*the teacher's vocabulary lacks"),
    ],
)
def test_a_folder_that_cannot_teach_is_an_error(create, message, tmp_path):
    create(tmp_path / "t")
    with pytest.raises(FunnelError, match=message) as error:
        Teacher.load(tmp_path / "t", make_model().config, make_tokenizer())
    assert error.value.parameter == "teacher"
    assert "\n" not in str(error.value)


def test_pairs_need_the_same_separators(tmp_path):
    folder = save(make_model(), tmp_path / "t")
    config = make_model(text_columns=("first", "second")).config
    with pytest.raises(FunnelError, match="it puts 1 separators between the texts of a pair, the student 2"):
        Teacher.load(folder, config, robertas_tokenizer())

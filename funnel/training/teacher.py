"""Task distillation: a classifier learns from the outputs of a trained classifier, its teacher, in addition to the labels.

The loss is (1 - a) * task loss + a * teacher loss, with the teacher's weight a. The teacher loss is

    classes: T^2 KL(teacher || student), both at temperature T (arXiv 1503.02531, section 2)
    scores:  the squared difference of both scores, in units of the labels' standard deviation

plus, where the models have the same width, a tenth of the squared distance between the [CLS] states that the classifiers read,
normalized to length 1 (PKD, arXiv 1908.09355, equation 7; TinyBERT, arXiv 1909.10351, also trains on hidden states).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnel.data.batches import Batch
from funnel.data.token_map import is_identity, token_map
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, format_list
from funnel.io import existing_folder
from funnel.model.checkpoint import best_checkpoint, load_checkpoint, load_weights, weights_digest
from funnel.model.config import FunnelConfig
from funnel.model.heads import FunnelForSequenceClassification, FunnelPreTrainedModel
from funnel.options import option
from funnel.problems.base import Problem
from funnel.training.loss import TaskLoss

TEMPERATURE = 2.0  # as in DistilBERT (arXiv 1910.01108)
# Weight of the [CLS] states. PKD tried 10 to 1000 for the mean over 768 features, which is 0.013 to 1.3 for their sum.
CLS_WEIGHT = 0.1
DEFAULT_TEACHER_WEIGHT = 0.5
DISTILLABLE = ("classification", "regression")  # problems


@dataclass(frozen=True)
class TeacherArgs:
    """Options for task distillation."""

    teacher: Path | None = option(None, "run or checkpoint folder of a classifier to learn from, in addition to the labels")
    teacher_weight: float = option(
        DEFAULT_TEACHER_WEIGHT, "weight of the teacher's outputs in the loss; that of the labels is 1 - X", bounds="[0, 1]"
    )

    def check_teacher(self) -> None:
        """Raises FunnelError if there is a weight, but no teacher."""
        if self.teacher is None and self.teacher_weight != DEFAULT_TEACHER_WEIGHT:
            raise FunnelError(
                "teacher_weight has no effect without a teacher; set one, or omit teacher_weight", "teacher_weight"
            )


class FrozenModel(nn.Module):
    """A model in evaluation mode and without gradients, for inputs with the token ids of another model.

    Args:
        token_map: the model's id of each of the other's tokens, [V]; None if they are the same.
    """

    token_map: Tensor | None

    def __init__(self, model: FunnelPreTrainedModel, token_map: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("token_map", None if token_map is None or is_identity(token_map) else token_map)
        self.eval().requires_grad_(False)

    def map_ids(self, input_ids: Tensor) -> Tensor:
        """The model's ids of the same tokens."""
        return input_ids if self.token_map is None else self.token_map[input_ids]


class Teacher(FrozenModel):
    """A trained classifier with the student's labels, in the same order."""

    @classmethod
    def load(cls, folder: Path, config: FunnelConfig, tokenizer: FunnelTokenizer) -> "Teacher":
        """Loads a run's best checkpoint, or a checkpoint folder.

        Args:
            config, tokenizer: the student's.

        Raises:
            FunnelError: the folder has no classifier for the student's labels, texts can be longer than the teacher's position
                table, or the tokenizers differ in more than ids.
        """
        try:
            path = best_checkpoint(existing_folder(folder))
            checkpoint = load_checkpoint(path)
            own_tokenizer = FunnelTokenizer.load(path)
            own_tokenizer.check_vocab_size(checkpoint.config.vocab_size, path)
            ids = token_map(tokenizer, own_tokenizer)
        except FunnelError as error:
            raise FunnelError(f"teacher: {error}", "teacher") from None
        if checkpoint.architecture != FunnelForSequenceClassification.__name__:
            raise FunnelError(f"teacher {folder}: expected a text classifier, found a {checkpoint.architecture}", "teacher")
        _check_task(checkpoint.config, config, folder)
        if len(config.text_columns) == 2 and own_tokenizer.separators != tokenizer.separators:
            raise FunnelError(
                f"teacher {folder}: it puts {own_tokenizer.separators} separators between the texts of a pair, the student "
                f"{tokenizer.separators}; choose a teacher with the student's tokenizer",
                "teacher",
            )
        model = FunnelForSequenceClassification(checkpoint.config)
        load_weights(model, checkpoint.weights, str(path))
        _permute_labels(model, config)
        return cls(model, ids)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [b, n_outputs] and [CLS] states [b, d]."""
        ids = self.map_ids(input_ids)
        return cast(tuple[Tensor, Tensor], self.model(ids, attention_mask, token_type_ids, output_cls=True))


def _check_task(teacher: FunnelConfig, student: FunnelConfig, folder: Path) -> None:
    """Raises FunnelError if the teacher cannot be used for the student's task."""
    if teacher.problem_type != student.problem_type:
        kinds = (config.problem_type.replace("_label", "-label").replace("_", " ") for config in (teacher, student))
        raise FunnelError("teacher {}: trained for {}, the task is {}".format(folder, *kinds), "teacher")
    names, expected = teacher.id2label.values(), student.id2label.values()
    if student.problem_type != "regression" and sorted(names) != sorted(expected):
        raise FunnelError(
            f"teacher {folder}: its labels are {format_list(names)}, those of the task {format_list(expected)}; "
            "choose a teacher that was trained on the same labels",
            "teacher",
        )
    limit, length = teacher.max_positions, student.model_max_length
    if limit is not None and length is not None and length > limit:
        raise FunnelError(
            f"max_length {length}: the teacher {folder} has position embeddings for {limit} tokens; expected at most {limit}",
            "max_length",
        )


def _permute_labels(model: FunnelForSequenceClassification, student: FunnelConfig) -> None:
    """Puts the outputs into the order of the student's labels."""
    if student.problem_type == "regression":
        return
    names = list(model.config.id2label.values())
    order = [names.index(name) for name in student.id2label.values()]
    layer = model.classifier.linear_out
    with torch.no_grad():
        layer.weight.copy_(layer.weight[order])
        layer.bias.copy_(layer.bias[order])
    model.config = model.config.replace(id2label=student.id2label)


@dataclass(frozen=True)
class DistillationLoss:
    """Computes the mean loss of a batch with a model and a teacher.

    Attributes:
        problem: has the loss of the labels.
        teacher: on the model's device.
        weight: of the teacher's outputs, a.
    """

    problem: Problem
    teacher: Teacher
    weight: float

    def settings(self) -> dict[str, Any]:
        """As `TaskLoss.settings`."""
        return {"teacher_digest": weights_digest(self.teacher.model)}

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, cls = model(**batch.inputs, output_cls=True)
        expected, teacher_cls = self.teacher(**batch.inputs)
        label_std = self.problem.config.label_std if self.problem.name == "regression" else None
        teacher_loss = teacher_loss_function(logits, expected, label_std)
        if cls.shape == teacher_cls.shape:
            teacher_loss = teacher_loss + CLS_WEIGHT * cls_distance(cls, teacher_cls)
        return (1 - self.weight) * self.problem.loss(logits, batch.labels) + self.weight * teacher_loss


def teacher_loss_function(logits: Tensor, teacher: Tensor, label_std: float | None) -> Tensor:
    """The distance of a model's outputs from the teacher's, [b, n_outputs] each; the mean over examples.

    Args:
        label_std: unit of the differences of scores; None for classes.
    """
    if label_std is not None:
        return ((logits.float() - teacher.float()) / label_std).square().mean()
    log_probs, expected = ((outputs.float() / TEMPERATURE).log_softmax(1) for outputs in (logits, teacher))
    return TEMPERATURE**2 * F.kl_div(log_probs, expected, reduction="batchmean", log_target=True)


def cls_distance(cls: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared distance between states of length 1, [b, d] each."""
    return (F.normalize(cls.float(), dim=1) - F.normalize(teacher.float(), dim=1)).square().sum(1).mean()


def training_loss(
    args: TeacherArgs, problem: Problem, tokenizer: FunnelTokenizer, device: torch.device
) -> TaskLoss | DistillationLoss:
    """Builds the training loss, with a teacher if there is one.

    Args:
        problem: with the config of the model to train.
        device: that of the training.

    Raises:
        FunnelError: the teacher cannot be used.
    """
    problem.to(device)
    if args.teacher is None:
        return TaskLoss(problem)
    if problem.name not in DISTILLABLE:
        raise FunnelError(f"teacher: not available for a {problem.title}, only for {format_list(DISTILLABLE)}", "teacher")
    teacher = Teacher.load(args.teacher, problem.config, tokenizer)
    return DistillationLoss(problem, teacher.to(device), args.teacher_weight)

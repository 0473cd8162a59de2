"""What the training loop, evaluation and inference need to know about a kind of problem.

To add a kind, add a subclass of `Problem` in a file of its own and its name to `PROBLEMS` in registry.py.

Shapes: b rows of a batch, n rows of a dataset, l tokens, k outputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from funnel.data.dataset import Dataset
from funnel.data.encoding import Encoder
from funnel.data.tasks import Task
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, format_list, plural
from funnel.model.config import FunnelConfig
from funnel.model.heads import FunnelPreTrainedModel
from funnel.problems.metrics import LOSS, Metric


class Problem(ABC):
    """A kind of problem with the labels of a model.

    Args:
        config: the model's.

    Attributes:
        name: value of `Task.problem` and of the option `problem`.
        title: for messages, such as "text classifier".
        head: what the output layer is called.
        model_class: the model that is trained.
        problem_type: value of the config's `problem_type`.
        has_classes: whether class weights and label smoothing apply.
        label_smoothing: share of the target that is spread over all classes in training.
        class_weights: [k], factors of the training loss by class; None for 1.
        threshold: decision threshold, found by `tune`; see `FunnelConfig.decision_threshold`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    head: ClassVar[str] = "classifier"
    model_class: ClassVar[type[FunnelPreTrainedModel]]
    problem_type: ClassVar[str] = "single_label_classification"
    has_classes: ClassVar[bool] = True

    def __init__(self, config: FunnelConfig) -> None:
        self.config = config
        self.label_smoothing = 0.0
        self.class_weights: Tensor | None = None
        self.threshold = config.decision_threshold

    @property
    def labels(self) -> list[str]:
        """Names of the outputs."""
        return list(self.config.id2label.values())

    # --- data ---------------------------------------------------------------------------------------------------------

    @classmethod
    def outputs(cls, task: Task) -> Sequence[str]:
        """The names of the model's outputs for a task."""
        assert task.labels is not None
        return list(task.labels.values())

    @classmethod
    @abstractmethod
    def encoder(cls, task: Task) -> Encoder:
        """What turns a task's examples into rows."""

    def count_classes(self, dataset: Dataset) -> np.ndarray:
        """How often each class occurs, [k]."""
        return np.bincount(dataset.labels, minlength=len(self.labels))

    def prepare(self, train_set: Dataset, options: Any) -> None:
        """Sets what the training loss needs.

        Args:
            options: `LossArgs`: `class_weights` and `label_smoothing`.

        Raises:
            FunnelError: an option has no effect on this kind of problem.
        """
        for name in ("class_weights", "label_smoothing"):
            if getattr(options, name) and not self.has_classes:
                raise FunnelError(f"{name} has no effect for a {self.title}; omit it", name)
        self.label_smoothing = options.label_smoothing
        if options.class_weights:
            counts = self.count_classes(train_set)
            weights = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
            self.class_weights = torch.from_numpy(weights).float()

    def compare_classes(self, train_set: Dataset, dev_set: Dataset) -> Iterator[str]:
        """Yields a warning if classes of the training set do not occur in the dev set."""
        if not self.has_classes:
            return
        missing = np.flatnonzero((self.count_classes(train_set) > 0) & (self.count_classes(dev_set) == 0))
        if len(missing):
            names = format_list(self.labels[i] for i in missing)
            yield f"{plural(len(missing), 'class')} without an example in dev: {names}"

    def to(self, device: torch.device) -> "Problem":
        """Moves the class weights to a device; returns self."""
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(device)
        return self

    # --- training -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The training loss: the mean over the rows of a batch.

        It is additive, so that the mean over micro-batches, weighted by their rows, is that of the batch.

        Args:
            outputs: the model's.
            labels: as in `Batch`.
        """

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def collect(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """What evaluation keeps of a batch, [b, ...], float32; `results` below are those of all rows, [n, ...].

        If there are values for every token, tokens are the second dimension, which is padded to that of the longest row.
        """
        return outputs.float()

    def tune(self, results: Tensor, dataset: Dataset) -> None:
        """Chooses the threshold that is best on a labeled dataset, if the problem has one."""
        return

    @abstractmethod
    def mean_loss(self, results: Tensor, dataset: Dataset) -> float:
        """The loss on a labeled dataset, without label smoothing and class weights."""

    @classmethod
    @abstractmethod
    def metric_functions(cls, labels: Sequence[str]) -> Mapping[str, Metric]:
        """Functions of predictions and labels by name.

        Args:
            labels: names of the classes.
        """

    @abstractmethod
    def predict(self, results: Tensor, dataset: Dataset) -> Any:
        """The predictions in the form that the metrics expect."""

    def targets(self, dataset: Dataset) -> Any:
        """The labels in the form that the metrics expect."""
        return dataset.labels

    def score(self, results: Tensor, dataset: Dataset, metrics: Sequence[str]) -> dict[str, float]:
        """Loss and metrics by name.

        Raises:
            FunnelError: a metric is unknown.
        """
        functions = self.metric_functions(self.labels)
        for name in metrics:
            if name != LOSS and name not in functions:
                raise FunnelError(f"unknown metric {name!r}; choose from {format_list([*functions, LOSS])}")
        predictions, targets = self.predict(results, dataset), self.targets(dataset)
        scores = {name: functions[name](predictions, targets) for name in metrics if name != LOSS}
        return {LOSS: self.mean_loss(results, dataset), **scores}

    @abstractmethod
    def analyze(self, results: Tensor, dataset: Dataset, tokenizer: FunnelTokenizer) -> dict[str, Any]:
        """The error analysis, as in `error_analysis`: the content of evaluation.json."""

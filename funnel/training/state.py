"""The state of a training run."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funnel.data.batches import Batch
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, plural
from funnel.model.heads import FunnelPreTrainedModel
from funnel.problems.base import Problem
from funnel.problems.metrics import selection_key
from funnel.training.device import autocast
from funnel.training.distributed import Distributed

STATE_VERSION = 4  # of training_state.pt
LOSS_SMOOTHING = 0.05  # weight of the newest loss in the running mean


@dataclass(frozen=True)
class TrainComponents:
    """The objects that a training step uses.

    Attributes:
        model: the model itself, for evaluation and checkpoints.
        wrapped: the module to call in training steps, wrapped by DDP or FSDP2 if they are used: the model, or in pretraining
            the objective, which contains it.
        scaler: disabled unless `dtype` is "fp16".
        dtype: dtype of matrix products, a key of `DTYPES`.
        loss: computes the loss of a micro-batch with a module: a scalar, or [k] with the loss first and other values to log.
        problem: what is trained; None in pretraining.
        save_more: writes further files into the folder of a checkpoint to resume from; called with the folder and the state
            dict of `module`.
    """

    dist: Distributed
    model: FunnelPreTrainedModel
    wrapped: nn.Module
    tokenizer: FunnelTokenizer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: str
    loss: Callable[[nn.Module, Batch], Tensor]
    problem: Problem | None = None
    save_more: Callable[[Path, dict[str, Tensor]], None] | None = None

    @property
    def module(self) -> nn.Module:
        """What is trained, without DDP: the model, or the objective."""
        return self.wrapped.module if isinstance(self.wrapped, nn.parallel.DistributedDataParallel) else self.wrapped

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a training step's forward pass.

        Without autocast's cache on CUDA, where the step may be captured as a CUDA graph, and in eager steps, too, so that
        both compute the same: the gradient of a weight that is used twice is summed in another dtype if its cast is shared.
        """
        return autocast(self.dist.device, self.dtype, cache=self.dist.device.type != "cuda")


@dataclass
class TrainState:
    """Training progress; with the weights, everything that resuming needs.

    Attributes:
        step: number of completed steps.
        total_steps: number of planned steps; 0 before `plan_steps`.
        schedule_start, warmup: first step and warmup fraction of the learning-rate schedule, which ends with the last step.
        evaluated_step: step of the last evaluation.
        best, last: evaluations on dev: step, loss and metrics by name.
        not_better: number of evaluations since the best one.
        stopped_early: whether the run ended because evaluations did not get better.
        mean_loss: running mean of the training loss, on the device; for a regression, of standardized labels. In pretraining,
            [k]: of the loss and the other values that the objective returns.
        optimizer, scaler: state dicts, filled when the state is saved or loaded.
    """

    step: int = 0
    total_steps: int = 0
    schedule_start: int = 0
    warmup: float = 0.0
    evaluated_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    not_better: int = 0
    stopped_early: bool = False
    mean_loss: Tensor | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether there are no steps left to take."""
        return self.step == self.total_steps or self.stopped_early

    @property
    def is_finished(self) -> bool:
        """Whether all steps and the last evaluation are done."""
        return self.is_done and self.step == self.evaluated_step > 0

    def plan_steps(self, total_steps: int, warmup: float, parameter: str = "epochs") -> None:
        """Starts a new learning-rate schedule at the current step, unless the state already has one for `total_steps`.

        With a saved optimizer state, the new schedule has no warmup.

        Args:
            parameter: the one that determines `total_steps`, for the error message.

        Raises:
            FunnelError: the run has already completed that many steps.
        """
        if total_steps == self.total_steps:
            return
        if total_steps <= self.step:
            raise FunnelError(
                f"{parameter}: {plural(total_steps, 'step')} planned, but the run has already completed {self.step:,}; "
                "increase it",
                parameter,
            )
        self.total_steps, self.schedule_start = total_steps, self.step
        self.stopped_early, self.not_better = False, 0
        self.warmup = 0.0 if self.optimizer else warmup

    def is_due(self, every: int) -> bool:
        """Whether something that happens every `every` steps, and after the last step, is due now."""
        return self.step > 0 and (self.step % every == 0 or self.step == self.total_steps)

    def record_step(self, loss: Tensor) -> None:
        """Counts a step. `loss` stays on the device."""
        self.step += 1
        if self.mean_loss is None:
            self.mean_loss = loss
            return
        mean = torch.where(self.mean_loss.isfinite(), self.mean_loss.lerp(loss, LOSS_SMOOTHING), loss)
        self.mean_loss = torch.where(loss.isfinite(), mean, self.mean_loss)  # fp16 skips steps that are not finite

    def record_evaluation(self, scores: Mapping[str, float], metric: str | None = None, patience: int | None = None) -> bool:
        """Records an evaluation on dev; returns whether it is the best so far by `metric`; a lower loss breaks ties.

        Without a metric, as in pretraining, no evaluation is the best one.

        Args:
            patience: the run ends after this number of evaluations that were not better than the best one.
        """
        self.evaluated_step = self.step
        self.last = {"step": self.step, **scores}
        if metric is None:
            return False
        if self.best and selection_key(scores, metric) <= selection_key(self.best, metric):
            self.not_better += 1
            self.stopped_early = patience is not None and self.not_better >= patience
            return False
        self.best, self.not_better = self.last, 0
        return True

    def restore(self, components: TrainComponents) -> None:
        """Loads the saved state into the optimizer and the scaler; does nothing for a new run."""
        if self.mean_loss is not None:
            self.mean_loss = self.mean_loss.to(components.dist.device)
        if self.optimizer:
            components.dist.load_optimizer_state(components.module, components.optimizer, self.optimizer)
            components.scaler.load_state_dict(self.scaler)
        self.optimizer, self.scaler = {}, {}

    def to_dict(self, optimizer: dict[str, Any], scaler: dict[str, Any]) -> dict[str, Any]:
        """The contents of training_state.pt."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        mean_loss = None if self.mean_loss is None else self.mean_loss.cpu()
        return {**values, "version": STATE_VERSION, "mean_loss": mean_loss, "optimizer": optimizer, "scaler": scaler}

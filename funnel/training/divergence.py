"""Detects non-finite losses and gradients before they damage the weights, and finds the cause."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funnel.data.batches import Batch
from funnel.errors import FunnelError, exit_silently, plural
from funnel.training.device import seed_step
from funnel.training.evaluate import Evaluation, check_finite
from funnel.training.loss import first_value
from funnel.training.optim import LinearWarmupDecay, full_tensor
from funnel.training.state import TrainComponents

MIN_LOSS_SCALE = 2.0**-5  # of fp16: GradScaler starts at 2**16 and halves its scale at each step that overflows


class NonFiniteGuard:
    """Ends a run whose loss or gradient norm is not finite, before the weights are damaged.

    `observe` suppresses the update on the device, without waiting for it: fused optimizers skip a step if `found_inf` is
    1. From the offending step on, all updates are suppressed, so the weights stay as they were before it. `check` waits
    for the device; if a step was not finite, it recomputes that step to find the cause and ends the run.

    With fp16, GradScaler skips such steps while it adjusts its scale; `check` then only ends a run whose scale keeps
    falling.

    Args:
        batches: `batches(start=step)` yields this rank's batches, on its device, from a step on.
        schedule: for the learning rate in the message.
        args: the run's arguments, of which `seed` and `grad_accum` are used.
    """

    def __init__(
        self,
        components: TrainComponents,
        batches: Callable[..., Iterator[Batch]],
        schedule: LinearWarmupDecay,
        args: Any,
    ) -> None:
        self.components, self.batches, self.schedule, self.args = components, batches, schedule, args
        self._suppressed = torch.zeros((), device=components.dist.device)  # updates suppressed so far

    def observe(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Call before `optimizer.step()`, with values that are the same on every rank."""
        if self.components.scaler.is_enabled():
            return
        is_bad = ~(loss.isfinite() & grad_norm.isfinite()) | (self._suppressed > 0)
        self._suppressed += is_bad
        self.components.optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]

    def check(self, step: int) -> None:
        """Raises FunnelError if one of the first `step` steps was not finite. All ranks must call it."""
        scaler = self.components.scaler
        if scaler.is_enabled() and scaler.get_scale() < MIN_LOSS_SCALE:
            self._fail(step - 1, "the fp16 loss scale has collapsed, so gradients overflow at every step")
        suppressed = int(self._suppressed)
        if suppressed:
            bad_step = step - suppressed
            self._fail(bad_step, self._diagnose(bad_step) or "loss and gradients are finite when recomputed")

    def check_evaluation(self, step: int, results: Mapping[str, Evaluation]) -> None:
        """Raises FunnelError if an evaluation's outputs are not finite. All ranks must call it, with all outputs."""
        for split, (values, _) in results.items():
            try:
                check_finite(values, split, self.components.dtype)
            except FunnelError as error:
                if not self.components.dist.is_main:
                    exit_silently(2)
                message = f"evaluation at step {step:,}: {error} in a new run. Earlier checkpoints are intact"
                raise FunnelError(message, error.parameter) from None

    def _diagnose(self, step: int) -> str | None:
        """Recomputes a step; returns the first cause found on any rank."""
        dist, module = self.components.dist, self.components.module
        seed_step(self.args.seed, step, dist.rank)
        batch = next(self.batches(start=step))
        module.zero_grad()
        for micro in batch.split(self.args.grad_accum):
            with self.components.autocast():
                loss, cause = forward_and_find_nonfinite(module, self.components.loss, micro)
            cause = dist.first_result(cause)
            if cause is not None:  # on some rank: no rank may start a backward pass, which communicates under FSDP
                return cause
            (loss * micro.weight).backward()
        return dist.first_result(find_nonfinite_gradient(module))

    def _fail(self, step: int, cause: str) -> None:
        if not self.components.dist.is_main:
            exit_silently(2)
        raise FunnelError(
            f"training diverged at step {step + 1:,} (learning rate {self.schedule.at(step):.2g}): {cause}; "
            "lower the learning rate. The weights were not updated; the last checkpoint is intact"
        )


def forward_and_find_nonfinite(
    model: nn.Module, loss_of: Callable[[nn.Module, Batch], Tensor], batch: Batch
) -> tuple[Tensor, str | None]:
    """Computes the loss of a batch; names the first module, in order of execution, with a non-finite output, if any."""
    nonfinite: list[str] = []  # modules

    def hook(name: str) -> Callable[..., None]:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                nonfinite.append(name)

        return record

    with_parameters = [(name, m) for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_hook(hook(name)) for name, module in with_parameters]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not call the hooks
            loss = first_value(loss_of(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    if nonfinite:
        return loss, f"the first non-finite output is that of {nonfinite[0]}"
    return loss, None if loss.isfinite() else "the logits are finite, the loss is not"


def find_nonfinite_gradient(model: nn.Module) -> str | None:
    """Names the first parameter, in order of the backward pass, with a non-finite gradient, if any."""
    gradients = {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if not bad:
        return None
    # The backward pass runs from the last parameter to the first.
    return f"the first non-finite gradient is that of {bad[-1]} ({plural(len(bad), 'parameter')} affected)"

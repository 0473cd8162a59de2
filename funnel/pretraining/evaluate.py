"""Evaluation of an objective on held-out text."""

from collections.abc import Callable, Iterable

import torch

from funnel.data.batches import Batch
from funnel.errors import StoppedBySignal
from funnel.pretraining.objective import Objective
from funnel.training.state import TrainComponents


@torch.no_grad()
def evaluate_objective(
    components: TrainComponents, objective: Objective, batches: Iterable[Batch], poll: Callable[[], None]
) -> dict[str, float] | None:
    """The objective's values by name, on every rank; None if stopped.

    Args:
        batches: this rank's rows of the held-out batches, on its device; their weights add up to means (`PretrainBatches`).
        poll: called before each batch; raises StoppedBySignal to stop.
    """
    dist, was_training = components.dist, objective.training
    total = torch.zeros(len(objective.names), device=dist.device)
    objective.eval()
    try:
        for batch in batches:
            poll()
            with components.autocast():
                total += components.loss(objective, batch)
    except StoppedBySignal:
        return None
    finally:
        objective.train(was_training)
    return dict(zip(objective.names, dist.mean(total).tolist(), strict=True))

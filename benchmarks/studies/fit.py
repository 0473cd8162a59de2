"""Shared by the studies: trains any classifier with train.py's batches, optimizer, schedule and dtype, in this process."""

from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from funnel.data.dataset import Dataset
from funnel.problems.base import Problem
from funnel.training.device import autocast, choose_dtype, keep_freed_memory, seed_step, set_seed
from funnel.training.evaluate import predict
from funnel.training.optim import LinearWarmupDecay, build_adamw, clip_grad_norm, param_groups

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a run. All others are train.py's defaults."""

    batch_size: int
    epochs: float
    lr: float
    seed: int
    problem: Problem

    @property
    def dtype(self) -> str:
        return choose_dtype(None, CPU, self.problem.config.d_model)


def fit(model: nn.Module, train_set: Dataset, recipe: Recipe) -> None:
    """Trains a model that maps the inputs of a batch to logits."""
    set_seed(recipe.seed)
    keep_freed_memory()
    total_steps = max(1, round(-(-len(train_set) // recipe.batch_size) * recipe.epochs))
    optimizer = build_adamw(param_groups(model, 0.01), recipe.lr)
    schedule = LinearWarmupDecay(optimizer, recipe.lr, range(total_steps), 0.1)
    model.train()
    for step, batch in enumerate(islice(train_set.batches(recipe.batch_size, recipe.seed), total_steps)):
        schedule.set(step)
        seed_step(recipe.seed, step, 0)
        with autocast(CPU, recipe.dtype):
            logits = model(**batch.inputs)
        recipe.problem.loss(logits, batch.labels).backward()
        clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def score(model: nn.Module, dataset: Dataset, metrics: tuple[str, ...], recipe: Recipe) -> dict[str, float]:
    """Evaluates a model."""
    with autocast(CPU, recipe.dtype):
        results = predict(model, recipe.problem, dataset)
    return recipe.problem.score(results, dataset, metrics)

"""Fine-tunes a Funnel-Transformer in any layout of blocks and layers.

    python train.py --blocks 2,2,2,2,2,2,2                     # movie reviews and weights in the package: no downloads
    python train.py --task sst2 --weights funnel-transformer/small --blocks 2,2,2,2,2,2,2
    python train.py --data reviews.csv --text-column review --label-column stars --weights DIR
    torchrun --nproc-per-node 8 train.py ...                   # several GPUs or machines

This file is the complete training recipe. Read it from top to bottom; copy and modify it.
"""

import funnel.threads  # isort: skip  # noqa: F401  (sets OpenMP variables; must precede torch)
import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from funnel.cli.common import run_script
from funnel.data.batches import Batch
from funnel.data.dataset import Dataset
from funnel.data.device_batches import TrainingBatches
from funnel.data.tasks import Task
from funnel.errors import FunnelError
from funnel.options import TINY, option
from funnel.problems.base import Problem
from funnel.problems.registry import PROBLEMS, encode_split
from funnel.problems.task_args import TaskArgs, load_task, split_off_dev
from funnel.training.args import RunArgs, with_task_defaults
from funnel.training.cuda_graphs import step_runner
from funnel.training.device import choose_dtype, keep_freed_memory, peak_memory, seed_step, set_seed
from funnel.training.distributed import Distributed, exit_process, init_distributed
from funnel.training.divergence import NonFiniteGuard
from funnel.training.evaluate import evaluate
from funnel.training.freezing import FreezeArgs, freeze
from funnel.training.loss import LossArgs
from funnel.training.optim import LinearWarmupDecay, build_adamw, clip_grad_norm, param_groups
from funnel.training.progress import Progress, print_banner, print_data
from funnel.training.run_dir import RunDir, describe_data
from funnel.training.signals import GracefulStop
from funnel.training.state import TrainComponents
from funnel.training.teacher import TeacherArgs, training_loss
from funnel.weights.build import LEARNING_RATES, BuiltModel, WeightsArgs, build_task_model


@dataclass(frozen=True)
class TrainArgs(RunArgs, FreezeArgs, TeacherArgs, LossArgs, WeightsArgs, TaskArgs):
    """One flag per field. TaskArgs adds --task, --data and the column names of your own files; WeightsArgs adds --weights,
    --blocks, --init, --keep and --layout-plan; LossArgs adds --label-smoothing and --class-weights, TeacherArgs --teacher,
    FreezeArgs --freeze-layers; RunArgs adds --seed, --out, --resume and others (training/args.py). `load` fills in defaults."""

    epochs: float = option(None, "training epochs, may be fractional (default: the task's)", bounds="(0, 1e6]")
    steps: int | None = option(None, "training steps, instead of epochs", bounds="[1, 1e9]")
    patience: int | None = option(None, "stop after N evaluations without a better one", metavar="N", bounds="[1, inf)")
    lr: float = option(
        None, "peak learning rate (default: the task's; for tiny 2e-4, for random weights 5e-4)", bounds="(0, 1e3]"
    )
    batch_size: int = option(None, "examples per step, across all processes (default: the task's)", bounds="[1, inf)")
    max_length: int = option(None, "truncate texts to this many tokens (default: the task's)", bounds="[1, inf)")
    warmup: float = option(None, "fraction of all steps for learning-rate warmup (default: the task's)", bounds="[0, 1)")
    layer_lr_decay: float = option(
        None, "factor of the learning rate from each layer to the one before (default: the task's)", bounds="(0, 1]"
    )

    def __post_init__(self) -> None:
        TaskArgs.__post_init__(self)
        WeightsArgs.__post_init__(self)
        self.check_run()
        self.check_teacher()
        if self.epochs is not None and self.steps is not None:
            raise FunnelError("steps cannot be combined with epochs; use one of them", "steps")


def load(args: TrainArgs, dist: Distributed, run: RunDir) -> tuple[TrainArgs, Task, Problem, BuiltModel, dict[str, Dataset]]:
    """Loads data and model (on the CPU, from the checkpoint of a resumed run); fills in the task's defaults in `args`."""
    task = load_task(args)
    weights = args.weights or (TINY if task.name == "demo" else "funnel-transformer/small")
    args = with_task_defaults(
        replace(args, weights=weights, lr=args.lr or LEARNING_RATES.get(weights, task.learning_rate)), task
    )
    set_seed(args.seed)  # for randomly initialized weights
    keep_freed_memory()
    bytes_per_weight = 16 if dist.device.type == "cpu" else 4  # on a CPU, gradient and AdamW moments too
    if run.checkpoint is not None:
        built = BuiltModel(run.checkpoint.model, run.checkpoint.tokenizer, [], "the run's last checkpoint")
    else:
        built = build_task_model(args, task, args.max_length, bytes_per_weight)
    args = replace(args, max_length=built.model.config.model_max_length or task.max_length)
    sets = {split: encode_split(task, split, built.tokenizer, args.max_length) for split in task.files}
    if "dev" not in sets:
        sets["train"], sets["dev"] = split_off_dev(sets["train"], args, args.seed)
    built.calibrate(sets["train"])  # LayerNorms of new identity layers; a resumed run has none
    built.standardize_labels(sets["train"])  # for regression
    freeze(built.model, args)
    problem = PROBLEMS[task.problem](built.model.config)
    problem.prepare(sets["train"], args)
    print_data(task, problem, sets)
    return args, task, problem, built, sets


def train_step(batch: Batch, args: TrainArgs, components: TrainComponents, guard: NonFiniteGuard) -> torch.Tensor:
    """Takes one optimizer step; returns the loss (regression: of standardized labels), still on the device."""
    dist, wrapped, optimizer, scaler = components.dist, components.wrapped, components.optimizer, components.scaler
    loss, micro_batches = torch.zeros((), device=dist.device), batch.split(args.grad_accum)
    for i, micro in enumerate(micro_batches):
        with dist.sync_gradients(wrapped, is_last=i == len(micro_batches) - 1):
            with components.autocast():
                micro_loss = components.loss(wrapped, micro) * micro.weight
            scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    loss = dist.mean(loss)
    scaler.unscale_(optimizer)
    norm = clip_grad_norm(components.module, 1.0, None if scaler.is_enabled() else optimizer)
    guard.observe(loss, norm)  # skips the update if it is not finite
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss


def train(args: TrainArgs, dist: Distributed, command: str) -> dict[str, float]:
    """Trains one model; returns the best evaluation on dev."""
    # run folder, data, model, schedule
    run = RunDir.open(args, dist)
    with dist.main_process_first():  # the others find downloads and encoded texts in the cache
        args, task, problem, built, eval_sets = load(args, dist, run)
        loss = training_loss(args, problem, built.tokenizer, dist.device)
    model, tokenizer, train_set = built.model, built.tokenizer, eval_sets.pop("train")
    dtype = choose_dtype(args.dtype, dist.device, model.config.d_model)
    steps_per_epoch = math.ceil(len(train_set) / args.batch_size)
    total_steps = args.steps or max(1, round(steps_per_epoch * args.epochs))
    eval_every = args.eval_every or math.ceil(min(steps_per_epoch, total_steps) / 4)
    derived = {"blocks": model.config.layout, "dtype": dtype, "steps": total_steps, **loss.settings()}
    derived |= describe_data(task, train_set, eval_sets)
    state = run.start(args, derived, command)
    if dist.is_main and run.checkpoint is None:
        built.write_plan(run.folder)

    # optimizer
    model.to(dist.device).train()
    model.set_gradient_checkpointing(args.gradient_checkpointing)
    wrapped = dist.wrap(model, fsdp=args.fsdp, compile=args.compile)
    optimizer = build_adamw(param_groups(model, args.weight_decay, args.layer_lr_decay), args.lr, dist.graph_device)
    schedule = LinearWarmupDecay(optimizer, args.lr, range(state.schedule_start, total_steps), state.warmup)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16")
    components = TrainComponents(dist, model, wrapped, tokenizer, optimizer, scaler, dtype, loss, problem)
    state.restore(components)
    data = partial(TrainingBatches(train_set, dist.device), args.batch_size, args.seed, shard=dist.shard)
    guard = NonFiniteGuard(components, data, schedule, args)
    take_step = step_runner(partial(train_step, args=args, components=components, guard=guard), components, args)
    print_banner(run, components, built.origin, built.note)

    # training loop: log, evaluate and save when due, then take the next step
    batches = data(start=state.step)
    with GracefulStop(dist) as stop, Progress(run, state, model.config.label_std) as progress:
        while True:
            stopping = stop.requested()
            log_due = state.is_due(args.log_every) or state.is_due(eval_every)
            eval_due = state.is_due(eval_every) and state.evaluated_step < state.step and not stopping
            save_due = state.is_due(args.save_every or eval_every) or stopping
            if log_due or save_due:
                guard.check(state.step)  # waits for the device; ends the run if a step was not finite
            if log_due:
                progress.log_train(schedule.lr, peak_memory(dist.device))
            with progress.paused():  # evaluation and saving do not count as training time
                results = evaluate(components, eval_sets, task.metrics, stop.poll) if eval_due else {}
                stopping = stopping or results is None  # a signal interrupted the evaluation
                if results:
                    guard.check_evaluation(state.step, results)  # fp16 may overflow
                    progress.log_evaluation(results)
                    if state.record_evaluation(results["dev"].scores, task.metrics[0], args.patience):
                        run.save_best(components, results["dev"].results, eval_sets["dev"])
                if save_due or stopping or state.is_done:
                    run.save_last(state, components)
            if stopping or state.is_done:
                break
            schedule.set(state.step)
            seed_step(args.seed, state.step, dist.rank)
            batch = next(batches)
            state.record_step(take_step(batch))
            progress.update(batch.n_examples)
    if stopping:
        stop.exit(f"rerun with --resume --out {run.folder} to continue from step {state.step:,}")
    progress.print_summary(take_step.description)
    return state.best


def launch(args: TrainArgs, command: str) -> None:
    """Trains in this process, which may be one of several started by torchrun."""
    with init_distributed(args.device, fsdp=args.fsdp) as dist:
        args = dist.run_on_main_and_broadcast(lambda: args)  # another machine may not have the folder of a run to resume
        train(args, dist, command)


def main(arguments: list[str] | None = None) -> int:
    """Parses a command line (default: sys.argv), trains, and returns the exit status."""
    return run_script(TrainArgs, launch, arguments)


if __name__ == "__main__":
    exit_process(main())

"""Fine-tunes a Funnel-Transformer for text classification or regression, in any layout of blocks and layers.

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
from funnel.data.dataset import Dataset, encode_examples
from funnel.data.device_batches import TrainingBatches
from funnel.data.tasks import DEFAULT_DEV_SHARE, Task, TaskArgs, load_task
from funnel.options import TINY, option
from funnel.training.args import RunArgs
from funnel.training.cuda_graphs import step_runner
from funnel.training.device import choose_dtype, keep_freed_memory, peak_memory, seed_step, set_seed
from funnel.training.distributed import Distributed, exit_process, init_distributed
from funnel.training.divergence import NonFiniteGuard
from funnel.training.evaluate import evaluate
from funnel.training.optim import LinearWarmupDecay, build_adamw, clip_grad_norm, param_groups
from funnel.training.progress import Progress, print_banner, print_data
from funnel.training.run_dir import RunDir, describe_data
from funnel.training.signals import GracefulStop
from funnel.training.state import TrainComponents
from funnel.training.teacher import TeacherArgs, training_loss
from funnel.weights.build import LEARNING_RATES, BuiltModel, WeightsArgs, build_classifier


@dataclass(frozen=True)
class TrainArgs(RunArgs, TeacherArgs, WeightsArgs, TaskArgs):
    """One flag per field. TaskArgs adds --task, --data and the column names of your own files; WeightsArgs adds --weights,
    --blocks, --init, --keep and --layout-plan; TeacherArgs adds --teacher; RunArgs adds --seed, --device, --out, --resume
    and others (training/args.py). `load` fills in the task's defaults (funnel/data/tasks.py)."""

    epochs: float = option(None, "training epochs, may be fractional (default: the task's)", bounds="(0, 1e6]")
    lr: float = option(None, "peak learning rate (default: the task's; for tiny and random weights 5e-4)", bounds="(0, 1e3]")
    batch_size: int = option(None, "examples per step, across all processes (default: the task's)", bounds="[1, inf)")
    max_length: int = option(None, "truncate texts to this many tokens (default: the task's)", bounds="[1, inf)")
    warmup: float = option(0.1, "fraction of all steps used for learning-rate warmup", bounds="[0, 1)")
    layer_lr_decay: float = option(1.0, "factor of the learning rate from each layer to the one before", bounds="(0, 1]")

    def __post_init__(self) -> None:
        TaskArgs.__post_init__(self)
        WeightsArgs.__post_init__(self)
        self.check_run()
        self.check_teacher()


def load(args: TrainArgs, dist: Distributed, run: RunDir) -> tuple[TrainArgs, Task, BuiltModel, Dataset, dict[str, Dataset]]:
    """Loads data and model (on the CPU, from the checkpoint of a resumed run); fills in the task's defaults in `args`."""
    task = load_task(args)
    weights = args.weights or (TINY if task.name == "demo" else "funnel-transformer/small")
    args = replace(args, weights=weights, lr=args.lr or LEARNING_RATES.get(weights, task.learning_rate))
    args = replace(args, epochs=args.epochs or task.epochs, batch_size=args.batch_size or task.batch_size)
    set_seed(args.seed)  # for randomly initialized weights
    keep_freed_memory()
    bytes_per_weight = 16 if dist.device.type == "cpu" else 4  # on a CPU, gradient and AdamW moments too
    if run.checkpoint is not None:
        built = BuiltModel(run.checkpoint.model, run.checkpoint.tokenizer, [], "the run's last checkpoint")
    else:
        built = build_classifier(args, task, args.max_length, bytes_per_weight)
    args = replace(args, max_length=built.model.config.model_max_length or task.max_length)
    encode = partial(encode_examples, label_ids=task.label_ids, tokenizer=built.tokenizer, max_length=args.max_length)
    eval_sets = {split: encode(file) for split, file in task.files.items()}
    train_set = eval_sets.pop("train")
    if not eval_sets:
        train_set, eval_sets["dev"] = train_set.split(args.dev_share or DEFAULT_DEV_SHARE, args.seed)
    built.calibrate(train_set)  # LayerNorms of new identity layers; a resumed run has none
    built.standardize_labels(train_set)  # for regression
    print_data(task, train_set, eval_sets)
    return args, task, built, train_set, eval_sets


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
        args, task, built, train_set, eval_sets = load(args, dist, run)
        loss = training_loss(args, built.model, built.tokenizer, dist.device)
    model, tokenizer = built.model, built.tokenizer
    dtype = choose_dtype(args.dtype, dist.device, model.config.d_model)
    steps_per_epoch = math.ceil(len(train_set) / args.batch_size)
    total_steps = max(1, round(steps_per_epoch * args.epochs))
    eval_every = args.eval_every or math.ceil(steps_per_epoch / 4)
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
    components = TrainComponents(dist, model, wrapped, tokenizer, optimizer, scaler, dtype, loss)
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
                    if state.record_evaluation(results["dev"].scores, task.metrics[0]):
                        run.save_best(components, results["dev"].logits, eval_sets["dev"])
                if save_due or stopping:
                    run.save_last(state, components)
            if stopping or state.step == total_steps:
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

"""Pretrains a Funnel-Transformer on raw text: ELECTRA, masked language modeling, or distillation from another model.

    python pretrain.py --corpus wiki.txt.xz --blocks 4,4,4                          # ELECTRA, a new model
    python pretrain.py --objective mlm --corpus notes.jsonl --weights DIR           # continue on your own text
    python pretrain.py --objective distill --teacher DIR --blocks 2,2,2 --corpus wiki.txt.xz
    torchrun --nproc-per-node 8 pretrain.py ...                                     # several GPUs or machines

A corpus is one or more text files (documents separated by empty lines) or jsonl files, optionally compressed (.gz, .xz). The
result is a run folder that `train.py --weights` accepts. This file is the complete recipe, in the same order as train.py.
"""

import funnel.threads  # isort: skip  # noqa: F401  (sets OpenMP variables; must precede torch)
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from funnel.cli.common import run_script
from funnel.data.batches import Batch
from funnel.errors import FunnelError
from funnel.options import option
from funnel.pretraining.batches import PretrainData, SequenceFormat
from funnel.pretraining.build import ModelArgs, PretrainModel, build_model, build_objective, restore_objective
from funnel.pretraining.corpus import prepare_corpus, train_tokenizer
from funnel.pretraining.evaluate import evaluate_objective
from funnel.pretraining.masking import Masking
from funnel.pretraining.objective import Objective, objective_loss
from funnel.training.args import RunArgs
from funnel.training.cuda_graphs import step_runner
from funnel.training.device import choose_dtype, keep_freed_memory, peak_memory, seed_step, set_seed
from funnel.training.distributed import Distributed, exit_process, init_distributed
from funnel.training.divergence import NonFiniteGuard
from funnel.training.optim import MAX_WARMUP_STEPS, LinearWarmupDecay, build_adamw, clip_grad_norm, param_groups
from funnel.training.progress import Progress, print_banner
from funnel.training.run_dir import RunDir
from funnel.training.signals import GracefulStop
from funnel.training.state import TrainComponents

NEW_LR = 5e-4  # ELECTRA-small's
CONTINUED_LR = 1e-4
# How masked tokens are replaced in ELECTRA's code, and in BERT's and the Funnel authors'.
MASKING = {"electra": {"mask_token": 0.85, "random_token": 0.0}, "bert": {"mask_token": 0.8, "random_token": 0.1}}


@dataclass(frozen=True)
class PretrainArgs(RunArgs, ModelArgs):
    """One flag per field. ModelArgs adds --objective, --weights, --blocks, --teacher and the sizes of a new model
    (pretraining/build.py); RunArgs adds --seed, --device, --out, --resume and others (training/args.py)."""

    corpus: tuple[Path, ...] = option((), "text or jsonl files, also .gz and .xz", metavar="FILE")
    text_column: str = option("text", "field of the texts in jsonl files", metavar="NAME")
    steps: int = option(10_000, "training steps", bounds="[1, 1e9]")
    batch_size: int = option(128, "sequences per step, across all processes", bounds="[1, inf)")
    lr: float = option(None, f"peak learning rate (default: {NEW_LR:g}; with weights {CONTINUED_LR:g})", bounds="(0, 1e3]")
    max_length: int = option(128, "tokens per sequence", bounds="[8, inf)")
    pairs: bool = option(False, "split half of the sequences into two segments with different token types")
    masking: str = option(
        None,
        "electra: 85 %% [MASK]; bert: 80 %% [MASK], 10 %% random; the rest stay (default: bert for mlm, else electra)",
        choices=tuple(MASKING),
    )
    mask_share: float = option(0.15, "share of the tokens to mask", bounds="(0, 0.5]")
    whole_words: bool = option(False, "mask all pieces of a word together")
    warmup: float = option(
        None, f"fraction of all steps for warmup (default: 0.1, at most {MAX_WARMUP_STEPS:,} steps)", bounds="[0, 1)"
    )

    def __post_init__(self) -> None:
        ModelArgs.__post_init__(self)
        self.check_run()
        self.check_model()
        if self.objective == "distill":
            self.reject(("masking", "mask_share", "whole_words"), "with the objective distill")
        if not self.corpus:
            raise FunnelError("corpus: missing; name one or more text files", "corpus")


def load(args: PretrainArgs, run: RunDir) -> tuple[PretrainArgs, PretrainModel, Objective, PretrainData]:
    """Loads corpus and model (on the CPU, from the checkpoint of a resumed run); fills in the default learning rate."""
    lr = args.lr or (NEW_LR if args.source is None else CONTINUED_LR)
    masking = args.masking or ("bert" if args.objective == "mlm" else "electra")
    args = replace(args, lr=lr)
    set_seed(args.seed)  # for randomly initialized weights
    keep_freed_memory()
    if run.checkpoint is not None:
        built = PretrainModel(run.checkpoint.model, run.checkpoint.tokenizer, [], "the run's last checkpoint")
    else:
        built = build_model(args, partial(train_tokenizer, args.corpus, args.text_column))
    masks = Masking(args.mask_share, **MASKING[masking], whole_words=args.whole_words)
    format = SequenceFormat(built.tokenizer, args.max_length, args.pairs, None if args.objective == "distill" else masks)
    objective = build_objective(args, built, format)
    corpus = prepare_corpus(args.corpus, built.tokenizer, args.text_column)
    data = PretrainData.from_corpus(corpus, format, args.batch_size)
    built.calibrate(data.sample().inputs)  # LayerNorms of new identity layers
    print(f"corpus: {data}")
    return args, built, objective, data


def train_step(batch: Batch, args: PretrainArgs, components: TrainComponents, guard: NonFiniteGuard) -> torch.Tensor:
    """Takes one optimizer step; returns the objective's values [k], the loss first, still on the device."""
    dist, wrapped, optimizer, scaler = components.dist, components.wrapped, components.optimizer, components.scaler
    values, micro_batches = torch.zeros((), device=dist.device), batch.split(args.grad_accum)
    for i, micro in enumerate(micro_batches):
        with dist.sync_gradients(wrapped, is_last=i == len(micro_batches) - 1):
            with components.autocast():
                micro_values = components.loss(wrapped, micro)  # sums over tokens, weighted so that they add up to means
            scaler.scale(micro_values[0]).backward()
        values = values + micro_values.detach()
    values = dist.mean(values)
    scaler.unscale_(optimizer)
    norm = clip_grad_norm(components.module, 1.0, None if scaler.is_enabled() else optimizer)
    guard.observe(values[0], norm)  # skips the update if it is not finite
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return values


def train(args: PretrainArgs, dist: Distributed, command: str) -> dict[str, float]:
    """Pretrains one model; returns the last evaluation on held-out text."""
    # run folder, corpus, model
    run = RunDir.open(args, dist)
    with dist.main_process_first():  # the others find the encoded corpus in the cache
        args, built, objective, data = load(args, run)
    restore_objective(objective, run)
    model = built.model
    dtype = choose_dtype(args.dtype, dist.device, model.config.d_model)
    eval_every = args.eval_every or math.ceil(args.steps / 20)
    derived = {"blocks": model.config.layout, "dtype": dtype, "steps": args.steps, **data.settings(), **objective.settings()}
    state = run.start(args, derived, command)
    if dist.is_main and run.checkpoint is None:
        built.write_plan(run.folder)

    # optimizer
    objective.to(dist.device).train()
    objective.set_gradient_checkpointing(args.gradient_checkpointing)
    wrapped = dist.wrap(objective, fsdp=args.fsdp, compile=args.compile)
    optimizer = build_adamw(param_groups(objective, args.weight_decay), args.lr, dist.graph_device)
    schedule = LinearWarmupDecay(optimizer, args.lr, range(state.schedule_start, args.steps), state.warmup)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16")
    components = TrainComponents(
        dist, model, wrapped, built.tokenizer, optimizer, scaler, dtype, loss=objective_loss, save_more=objective.save
    )
    state.restore(components)
    batches_from = partial(data.batches(data.train_set, dist.device), args.batch_size, args.seed, shard=dist.shard)
    dev_batches = data.batches(data.dev_set, dist.device).evaluation(shard=dist.shard)
    guard = NonFiniteGuard(components, batches_from, schedule, args)
    take_step = step_runner(partial(train_step, args=args, components=components, guard=guard), components, args)
    print_banner(run, components, built.origin)

    # training loop: log, evaluate and save when due, then take the next step
    batches = batches_from(start=state.step)
    with GracefulStop(dist) as stop, Progress(run, state, names=objective.names) as progress:
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
                scores = evaluate_objective(components, objective, dev_batches, stop.poll) if eval_due else {}
                stopping = stopping or scores is None  # a signal interrupted the evaluation
                if scores:
                    progress.log_scores("dev", scores)
                    state.record_evaluation(scores)
                if save_due or stopping:
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
    return state.last


def launch(args: PretrainArgs, command: str) -> None:
    """Trains in this process, which may be one of several started by torchrun."""
    with init_distributed(args.device, fsdp=args.fsdp) as dist:
        args = dist.run_on_main_and_broadcast(lambda: args)  # another machine may not have the folder of a run to resume
        train(args, dist, command)


def main(arguments: list[str] | None = None) -> int:
    """Parses a command line (default: sys.argv), trains, and returns the exit status."""
    return run_script(PretrainArgs, launch, arguments)


if __name__ == "__main__":
    exit_process(main())

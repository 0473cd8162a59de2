"""Fine-tunes a Funnel-Transformer on a text classification task, in any layout of blocks and layers.

    python train.py --blocks 2,2,2,2,2,2,2                     # the built-in demo task: no downloads
    python train.py --task sst2 --weights funnel-transformer/small --blocks 2,2,2,2,2,2,2
    python train.py --data reviews.csv --text-column review --label-column stars --weights DIR
    torchrun --nproc-per-node 8 train.py …                     # the same training on several GPUs or machines

This file is the recipe, top to bottom: copy it and change it. What it calls is in the package `funnel`.
"""

import argparse
import itertools
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from funnel.cli.common import ArgumentParser, run_command
from funnel.data.dataset import Batch, encode
from funnel.data.tasks import CUSTOM, TASKS, Task, load_task
from funnel.errors import FunnelError, StoppedBySignal, format_list
from funnel.inference import Classifier, open_text_file, warn_truncated, write_predictions, write_submission
from funnel.model.checkpoint import load_weights
from funnel.model.config import INITS, KEEPS, parse_blocks
from funnel.model.dropout import share_of_batch
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training import error_analysis
from funnel.training import optim as training
from funnel.training.distributed import Distributed, GracefulStop, end
from funnel.training.run_dir import RunDir, TrainState, unused_folder
from funnel.weights import surgery
from funnel.weights.build import build_classifier

PATIENCE = 5  # steps in a row that may be skipped because a number is not finite


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    what = parser.add_argument_group("what to train")
    what.add_argument("--task", help=f"one of {', '.join(TASKS)} (default: demo, or your own where --data is a file)")
    what.add_argument("--data", type=Path, help="folder with the task's files as its authors publish them (default: they are "
                      "downloaded), or a .tsv, .csv or .jsonl file of your own")  # fmt: skip
    what.add_argument("--weights", help="checkpoint folder (any format that convert_weights.py reads), hub id, or none "
                      "(default: none for the demo task, funnel-transformer/small for the others)")  # fmt: skip
    what.add_argument("--blocks", help="layers in each block, as in 2,2,2,2 or 6,3x2,3x2 (default: as in the weights)")
    what.add_argument("--init", choices=INITS, help="what layers that the weights do not have start as "
                      "(default: identity)")  # fmt: skip
    what.add_argument("--keep", choices=KEEPS, help="which layers stay where the weights have more than --blocks "
                      "(default: spread)")  # fmt: skip
    what.add_argument("--layout-plan", type=Path, help="JSON file that says where each layer comes from, instead of --init "
                      "(every run writes its own as layout_plan.json; python -m funnel layout shows one)")  # fmt: skip
    own = parser.add_argument_group("your own data (--data FILE)")
    own.add_argument("--dev", type=Path, help="file to evaluate on (default: a part of --data, drawn by --seed)")
    own.add_argument("--dev-share", type=float, help="that part, of every class (default: 0.1)")
    own.add_argument("--text-column", help="(default: text or sentence)")
    own.add_argument("--text-pair-column", help="second texts (default: there are none)")
    own.add_argument("--label-column", help="(default: label)")
    own.add_argument("--problem", choices=("classification", "regression"), help="(default: what the labels look like)")
    after = parser.add_argument_group("after training")
    after.add_argument("--predict", type=Path, metavar="FILE", help="file of texts: the best checkpoint's predictions go into "
                       "the run's folder")  # fmt: skip
    after.add_argument("--glue-submission", type=Path, metavar="DIR", help="folder for the answers to the task's test files, "
                       "as the GLUE server takes them")  # fmt: skip
    how = parser.add_argument_group("how to train (the task's defaults: the paper's; learning rates: the authors' advice)")
    how.add_argument("--epochs", type=float, help="may be a fraction (default: the task's)")
    how.add_argument("--lr", type=float, help="peak learning rate (default: the task's)")
    how.add_argument("--batch-size", type=int, help="texts a step (default: the task's)")
    how.add_argument("--max-length", type=int, help="tokens a text at most (default: the task's)")
    how.add_argument("--warmup", type=float, default=0.1, help="share of all steps (default: %(default)s, the paper's)")
    how.add_argument("--weight-decay", type=float, default=0.01, help="(default: %(default)s, the paper's)")
    how.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    where = parser.add_argument_group("where and with what")
    where.add_argument("--device", choices=("cpu", "cuda", "mps"), help="(default: the fastest that is there)")
    where.add_argument("--dtype", choices=tuple(training.DTYPES), help="of matrix products (default: bf16 where the "
                       "device computes in it, else fp32)")  # fmt: skip
    where.add_argument("--accumulate", type=int, default=1, metavar="N", help="cut each batch into N parts, one after the "
                       "other: less memory, the same gradient")  # fmt: skip
    where.add_argument("--gradient-checkpointing", action="store_true", help="keep layers' inputs only and compute the rest "
                       "twice: less memory, more time")  # fmt: skip
    where.add_argument("--compile", action="store_true", help="use torch.compile: minutes before the first step, then faster "
                       "steps on a GPU")  # fmt: skip
    where.add_argument("--shard", action="store_true", help="under torchrun: every process keeps a part of each weight, for "
                       "models too large for one device (FSDP2)")  # fmt: skip
    where.add_argument("--out", type=Path, help="the run's folder (default: runs/TASK-BLOCKS-seedN, numbered if taken)")
    where.add_argument("--resume", action="store_true", help="go on with the run in --out from its last checkpoint")
    where.add_argument("--eval-every", type=int, help="steps between evaluations (default: 4 an epoch)")
    where.add_argument("--save-every", type=int, help="steps between checkpoints to go on from (default: at evaluations)")
    where.add_argument("--keep-checkpoints", type=int, default=2, metavar="N", help="the newest N of those are kept "
                       "(default: %(default)s)")  # fmt: skip
    where.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    args = parser.parse_args(arguments)
    args.command = ["python", "train.py", *arguments] if arguments is not None else sys.orig_argv
    if arguments is None and "TORCHELASTIC_RUN_ID" in os.environ:
        args.command = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], *args.command[-len(sys.argv) :]]
    return args


def train(args: argparse.Namespace, processes: Distributed) -> dict[str, float]:
    """Trains one model and returns the metrics of its best evaluation on dev."""
    # What was asked for; weights, data, model.
    device = processes.device
    with processes.main_process_first():
        check(args, processes.size)
        task = load_task(
            args.task, args.data, args.dev, args.text_column, args.text_pair_column, args.label_column, args.problem
        )
        complete(args, task)
        columns, way_out = (args.text_column, args.text_pair_column), "name it with"
        if task.name == CUSTOM:  # then they are the columns of the file to train on
            columns, way_out = (None, None), "rename one, or predict after training with python -m funnel predict, which has"
        to_predict = args.predict and open_text_file(args.predict, task.columns, *columns, "--predict", way_out)
        for file in [*([to_predict] if to_predict else []), *(task.tests.values() if args.glue_submission else [])]:
            file.check()  # before training, not after it
        training.set_seed(args.seed)
        training.keep_freed_memory()
        built = build_classifier(
            args.weights,
            None if task.labels is None else list(task.labels.values()),
            args.blocks,
            args.init,
            args.keep,
            args.layout_plan,
            task.files["train"].iter_texts(),
            bytes_per_weight=16 if device.type == "cpu" else 4,  # with its gradient and AdamW's two moments
        )
        model, tokenizer, plan, origin = built
        sets = {name: encode(file, task.label_ids, tokenizer, args.max_length) for name, file in task.files.items()}
        cuts = {name if len(sets) > 1 else "train and dev": part.cut for name, part in sets.items() if part.cut.texts}
        contents = {name: dataset.digest for name, dataset in sets.items()}
        train_set = sets.pop("train")
        if not sets:
            train_set, sets["dev"] = train_set.split(args.dev_share, args.seed)
        built.fit(train_set)
    config = model.config
    dtype = training.choose_dtype(args.dtype, device, config.d_model)
    steps_per_epoch = -(-len(train_set) // args.batch_size)
    total_steps = max(1, round(steps_per_epoch * args.epochs))
    eval_every = args.eval_every or -(-steps_per_epoch // 4)
    save_every = args.save_every or eval_every

    # The run's folder, and where the run stands.
    settings = {name: getattr(args, name) for name in (
        "init", "keep", "warmup", "weight_decay", "seed", "accumulate", "compile", "weights", "epochs", "lr", "batch_size",
        "max_length", "dev_share", "eval_every")}  # fmt: skip
    settings |= {name: getattr(args, name) and str(getattr(args, name)) for name in ("data", "layout_plan")}
    settings |= {
        "task": task.name, "columns": list(task.columns), "labels": task.labels and list(task.labels.values()),
        "blocks": config.layout, "dtype": dtype, "steps": total_steps,
        "train_texts": len(train_set), "dev_texts": len(sets["dev"]),
        "mean_tokens": round(float(train_set.lengths.mean()), 1),
        "contents": contents}  # fmt: skip
    run = RunDir(processes.run_on_main_and_broadcast(lambda: open_run(args, settings, plan)), args.keep_checkpoints)
    found = processes.run_on_main_and_broadcast(run.load) if args.resume else None
    if args.resume and processes.is_main:
        run.forget_after(TrainState() if found is None else found[1])

    # Model, AdamW, linear warm-up and decay (paper, section A.3).
    state = TrainState()
    if found is not None:
        weights, state = found
        if fresh := load_weights(model, weights, f"--resume: {run.folder}"):
            raise FunnelError(f"--resume: {run.folder}: its classifier is another one ({fresh[0]}); give another --out")
    model.to(device).train()
    model.set_gradient_checkpointing(args.gradient_checkpointing)
    forward = processes.wrap(model, args.shard, args.compile)
    optimizer = torch.optim.AdamW(training.param_groups(model, args.weight_decay), lr=args.lr, eps=1e-6, fused=True)
    schedule = training.linear_warmup_decay(total_steps, args.warmup)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    if found is not None:
        processes.load_optimizer(optimizer, state.optimizer)
        scaler.load_state_dict(state.scaler)

    parameters = sum(p.numel() for p in model.parameters())
    warnings = [f"--max-length {args.max_length}: {name}: {lost}" for name, lost in cuts.items()]
    if task.labels is not None and len(absent := np.setdiff1d(train_set.labels, sets["dev"].labels)):
        warnings.append(f"{len(absent)} classes have no text in dev: {format_list(config.id2label[i] for i in absent)}")
    evaluated = ", ".join(f"{len(dataset):,} in {split}" for split, dataset in sets.items())
    resumed = "no checkpoint yet: begins at step 0" if found is None else f"resumed at step {state.step:,}"
    where = f"{device.type}" + (f" in {processes.size} processes" if processes.size > 1 else "")
    print(f"{task.title}: {len(train_set):,} texts to train on, {evaluated}\n"
          + "".join(f"warning: {warning}\n" for warning in warnings) +
          f"model: blocks {config.layout}, width {config.d_model}, {parameters:,} parameters, from {origin}\n"
          f"training: {total_steps:,} steps of {args.batch_size}, lr {args.lr:g}, {dtype} on {where}, into {run.folder}"
          + (f"\n{resumed}" if args.resume else ""), flush=True)  # fmt: skip

    def evaluate() -> str | None:
        """Measures the model on every set, keeps it if it is the best so far, and returns a warning if there is one."""
        warning, on_dev = None, None
        for split, dataset in sets.items():
            share = processes.rank, processes.size
            logits = training.predict(model, dataset, device, dtype, share=share, check=signals.check_here)
            logits = processes.sum(logits)
            scores, predictions = training.measure(logits, dataset, task.metrics)
            if processes.is_main:
                run.log(step=state.step, split=split, **scores)
            bar.write(describe({"step": state.step, **scores}) + (f" ({split})" if split != "dev" else ""))
            if split == "dev":
                last, on_dev = {"step": state.step, **scores}, logits
                warning = training.one_class_warning(predictions, dataset.labels, config)
        if training.is_better(last[task.metrics[0]], state.best.get(task.metrics[0])):
            state.best = last
            save("best", on_dev)
        state.last, state.evaluated = last, state.step
        return warning

    def save(name: str, on_dev: torch.Tensor | None = None) -> None:
        """Writes a checkpoint; "last" has all that a run needs to go on, "best" what its logits on dev get wrong."""
        weights = processes.whole(model.state_dict())
        if name == "last":
            state.optimizer, state.scaler = processes.whole(optimizer.state_dict()), scaler.state_dict()
        if processes.is_main:
            architecture = FunnelForSequenceClassification.__name__
            found = None if on_dev is None else error_analysis.analyze_errors(on_dev, sets["dev"], config, tokenizer)
            run.save(name, config, weights, architecture, tokenizer, state if name == "last" else None, found)

    def skip(said: str, batch: Batch, step_loss: float) -> None:
        """Counts a step that changes nothing, because a number is not finite, and says where that began."""
        state.skipped += 1
        if scaler.get_scale() > 1:  # fp16 finds its scale by such steps
            return
        state.in_a_row += 1
        with training.autocast(device, dtype):
            said = f"step {state.step + 1:,}: {said}: not finite {training.find_nonfinite(model, batch, step_loss)}"
        bar.write(f"{said}; the step is skipped")
        if state.in_a_row == PATIENCE:
            if not processes.is_main:  # it is told once
                raise SystemExit(2)
            raise FunnelError(
                f"training diverged: {PATIENCE} steps in a row were skipped; {said}; lower --lr "
                f"(checkpoints are in {run.folder})"
            )

    def is_due(every: int) -> bool:
        return state.step % every == 0 or state.step == total_steps

    warning = None
    bar = tqdm(total=total_steps, initial=state.step, unit="step", disable=None if processes.is_main else True,
               dynamic_ncols=True)  # fmt: skip
    try:
        with GracefulStop(processes) as signals:
            if state.evaluated < state.step and is_due(eval_every):  # it was stopped before that
                warning = evaluate()
                save("last")
            started, seen = time.perf_counter(), 0
            batches = train_set.batches(args.batch_size, args.seed, start=state.step)
            for index in itertools.islice(batches, total_steps - state.step):
                training.seed_step(args.seed, state.step, processes.rank)
                lr = args.lr * schedule(state.step)
                training.set_lr(optimizer, lr)
                width = int(train_set.lengths[index].max())
                loss = torch.zeros((), device=device)
                for part in np.array_split(index, min(args.accumulate, len(index))):
                    rows, first, weight = processes.share(part)
                    batch = train_set.batch(rows, width).to(device)
                    with share_of_batch(first, len(part)):
                        with training.autocast(device, dtype):
                            logits = forward(batch.input_ids, batch.attention_mask, batch.token_type_ids)
                        part_loss = training.loss_function(logits, batch.labels) * (weight * len(part) / len(index))
                        scaler.scale(part_loss * processes.size).backward()  # gradients are averaged over processes
                    loss += part_loss.detach()
                scaler.unscale_(optimizer)
                norm = training.clip_gradients(model)
                step_loss = float(processes.sum(loss))

                if math.isfinite(step_loss) and math.isfinite(norm):
                    scaler.step(optimizer)
                    state.in_a_row = 0
                    state.loss = step_loss if state.loss is None else state.loss + 0.05 * (step_loss - state.loss)
                else:
                    skip(f"loss {step_loss:g}, gradient {norm:g}, lr {lr:g}", batch, step_loss)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)

                state.step, seen = state.step + 1, seen + len(index)
                bar.update()
                if processes.is_main and (state.step % 20 == 0 or is_due(eval_every)):
                    rate = seen / (time.perf_counter() - started)
                    run.log(step=state.step, split="train", loss=state.loss, lr=lr, skipped=state.skipped,
                            examples_per_second=rate, memory_mib=training.peak_memory(device))  # fmt: skip
                    skipped = f", {state.skipped} skipped" if state.skipped else ""
                    mean_loss = math.nan if state.loss is None else state.loss
                    bar.set_postfix_str(f"loss {mean_loss:.3f}, {rate:.0f} texts/s{skipped}", refresh=False)
                signals.check()
                paused = time.perf_counter()
                if is_due(eval_every):
                    warning = evaluate()
                if is_due(save_every):
                    save("last")
                started += time.perf_counter() - paused  # the clock is of training
    except StoppedBySignal as stop:
        save("last")
        if not processes.is_main:
            raise SystemExit(128 + stop.signum) from None
        message = f"the run is saved at step {state.step:,}; the same command with --resume --out {run.folder} goes on"
        raise StoppedBySignal(stop.signum, message) from None
    finally:
        bar.close()

    if not seen:
        print("nothing left to do: the run was at its last step")
    minutes = (time.perf_counter() - started) / 60
    print(f"\nlast on dev: {describe(state.last)}\nbest on dev: {describe(state.best)}")
    speed = f"{minutes:.1f} minutes of training, {seen / minutes / 60:.0f} texts a second"
    print(f"{speed}; checkpoints and metrics.jsonl in {run.folder}")
    if state.skipped:
        print(f"{state.skipped:,} steps were skipped because a number was not finite")
    if warning:
        print(warning)
    if processes.is_main and (to_predict is not None or args.glue_submission is not None):
        classifier = Classifier.load(run.folder, args.device, args.dtype)
        if to_predict is not None:
            path = run.folder / f"predictions-{to_predict.path.name}"
            print(f"{write_predictions(classifier.of_file(to_predict), path):,} predictions in {path}")
        if args.glue_submission is not None:
            print(f"answers in {', '.join(map(str, write_submission(classifier, task, args.glue_submission)))}")
        warn_truncated(classifier)
    return state.best


def open_run(args: argparse.Namespace, settings: dict[str, Any], plan: list[surgery.LayerPlan]) -> Path:
    """Makes the run's folder, or checks the one to go on with."""
    name = f"{settings['task']}-{settings['blocks']}-seed{args.seed}"
    run = RunDir(args.out or unused_folder(Path("runs") / name))
    if args.resume:
        run.check(settings)
    else:
        run.start(settings, shlex.join(args.command))
        surgery.write_plan(run.folder / "layout_plan.json", plan)
    return run.folder


def check(args: argparse.Namespace, size: int) -> None:
    """Stops at an argument that cannot be, before anything is read; `size` is the number of processes."""
    most = {"epochs": 1e6, "lr": 1e3}
    for flag in (*most, "batch_size", "max_length", "eval_every", "save_every", "accumulate", "keep_checkpoints"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < most.get(flag, math.inf):
            bound = f" and below {most[flag]:g}" if flag in most else ""
            raise FunnelError(f"--{flag.replace('_', '-')} {value}: it takes a number above 0{bound}")
    if not 0 <= args.warmup < 1:
        raise FunnelError(f"--warmup {args.warmup}: it takes a share of all steps, from 0 to below 1")
    if not 0 <= args.weight_decay < float("inf"):
        raise FunnelError(f"--weight-decay {args.weight_decay}: it takes a number from 0 up")
    if not 0 <= args.seed < 2**32:
        raise FunnelError(f"--seed {args.seed}: it takes a whole number from 0 to 2**32 - 1")
    if args.blocks is not None:
        parse_blocks(args.blocks)
    if args.layout_plan is not None and (args.init or args.keep):
        raise FunnelError(f"--{'init' if args.init else 'keep'}: --layout-plan says it of every layer; give one of them")
    if args.dev is not None and args.dev_share is not None:
        raise FunnelError("--dev-share: --dev is what to evaluate on; give one of them")
    if args.resume and args.out is None:
        raise FunnelError("--resume: name the run's folder with --out")
    if args.shard and args.dtype == "fp16":
        raise FunnelError("--shard: takes --dtype bf16 or fp32, not fp16")
    if args.shard and size == 1:
        raise FunnelError("--shard: spreads weights over several processes; start them with torchrun")


def complete(args: argparse.Namespace, task: Task) -> None:
    """Puts defaults where nothing was asked for, and stops at what the task has no use for."""
    is_own = task.name == CUSTOM
    if args.dev_share is not None and not is_own:
        raise FunnelError(f"--dev-share: {task.title} has texts to evaluate on; it belongs to a file of your own")
    for flag, column in {"--text-column": args.text_column, "--text-pair-column": args.text_pair_column}.items():
        if column is not None and not is_own and args.predict is None:
            raise FunnelError(f"{flag}: belongs to a file of your own; name it with --data FILE, or --predict FILE")
    if args.glue_submission is not None:
        there = next(path for path in (args.glue_submission, *args.glue_submission.absolute().parents) if os.path.exists(path))
        if not os.path.isdir(there) or not os.access(there, os.W_OK):
            raise FunnelError(f"--glue-submission {args.glue_submission}: {there} is no folder that can be written")
        for file in task.tests.values():
            if not file.path.exists():
                raise FunnelError(f"--glue-submission: {file.path} is missing; the server wants answers to it")
        if not task.tests:
            raise FunnelError(f"--glue-submission: {task.title} is no task of GLUE")
    defaults = {
        "epochs": task.epochs, "lr": task.learning_rate, "batch_size": task.batch_size, "max_length": task.max_length,
        "weights": "none" if task.name == "demo" else "funnel-transformer/small",
        "init": "identity", "keep": "spread", "dev_share": 0.1}  # fmt: skip
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def describe(scores: dict[str, float]) -> str:
    """An evaluation in a line."""
    return f"step {scores['step']:,}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items() if k != "step")


def main(arguments: list[str] | None = None) -> int:
    """Trains as the command does, with its arguments (default: the command line's). Gives the exit status."""
    args = parse_arguments(arguments)

    def run() -> None:
        with Distributed.start(args.device) as processes:
            train(args, processes)

    return run_command(
        "train.py", run, on_interrupt="a run that has begun goes on with --resume --out FOLDER", debug=args.debug
    )


if __name__ == "__main__":
    end(main())

"""Fine-tunes a Funnel-Transformer on a text classification task, in any layout of blocks and layers.

    python train.py --blocks 2,2,2,2,2,2,2                     # the built-in demo task: no downloads
    python train.py --task sst2 --data DIR --weights funnel-transformer/small --blocks 2,2,2,2,2,2,2

This file is the recipe, top to bottom: copy it and change it. What it calls is in the package `funnel`.
"""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from funnel import layout, training
from funnel.checkpoint import load_weights
from funnel.config import FunnelConfig, parse_layout
from funnel.convert import fetch, read_source
from funnel.cost import check_memory
from funnel.data import Dataset
from funnel.errors import FunnelError, exit_status
from funnel.heads import FunnelForSequenceClassification
from funnel.tasks import TASKS, Task, get_task
from funnel.tokenizer import FunnelTokenizer

# What --weights none starts from, before the layout is changed: small enough to learn the demo task on a CPU.
SMALL = FunnelConfig(block_sizes=(2, 2, 2), num_decoder_layers=0, d_model=128, n_head=4, d_head=32, d_inner=512)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to train")
    what.add_argument("--task", default="demo", help=f"one of {', '.join(TASKS)} (default: %(default)s)")
    what.add_argument("--data", type=Path, help="folder with train.tsv and dev.tsv")
    what.add_argument("--weights", help="checkpoint folder (any format that convert_weights.py reads), hub id, or none "
                      "(default: none for the demo task, funnel-transformer/small for the others)")  # fmt: skip
    what.add_argument("--blocks", help="layers in each block, as in 2,2,2,2 or 6,3x2,3x2 (default: as in the weights)")
    what.add_argument("--init", choices=layout.INITS, default="identity", help="what layers that the weights do not have "
                      "start as (default: %(default)s)")  # fmt: skip
    what.add_argument("--layout-plan", type=Path, help="JSON file that says where each layer comes from, instead of --init "
                      "(every run writes its own as layout_plan.json; python -m funnel layout shows one)")  # fmt: skip
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
    where.add_argument("--out", type=Path, help="the run's folder (default: runs/TASK-BLOCKS-seedN, numbered if taken)")
    where.add_argument("--resume", action="store_true", help="go on with the run in --out from its last checkpoint")
    where.add_argument("--eval-every", type=int, help="steps between evaluations (default: 4 an epoch)")
    return parser.parse_args(arguments)


def train(args: argparse.Namespace) -> dict[str, float]:
    """Trains one model and returns the metrics of its best evaluation on dev."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise FunnelError("train.py was started in several processes, which it cannot use yet; start it without torchrun")
    if args.resume and args.out is None:
        raise FunnelError("--resume: name the run's folder with --out")
    # Settings: what the user asked for, else the task's defaults.
    task = get_task(args.task)
    epochs = positive("--epochs", args.epochs, task.epochs, below=1e6)
    peak_lr = positive("--lr", args.lr, task.learning_rate, below=1e3)
    eval_every = None if args.eval_every is None else int(positive("--eval-every", args.eval_every, 0))
    batch_size = int(positive("--batch-size", args.batch_size, task.batch_size))
    max_length = int(positive("--max-length", args.max_length, task.max_length))
    accumulate = int(positive("--accumulate", args.accumulate, 1))
    blocks = None if args.blocks is None else parse_layout(args.blocks)
    if not 0 <= args.warmup < 1:
        raise FunnelError(f"--warmup {args.warmup}: it takes a share of all steps, from 0 to below 1")
    if not 0 <= args.weight_decay < float("inf"):
        raise FunnelError(f"--weight-decay {args.weight_decay}: it takes a number from 0 up")
    if not 0 <= args.seed < 2**32:
        raise FunnelError(f"--seed {args.seed}: it takes a whole number from 0 to 2**32 - 1")
    device = training.choose_device(args.device)
    training.set_seed(args.seed)
    training.reuse_memory()

    # Data, weights, model.
    train_examples, dev_examples = task.load(args.data)
    weights_name = args.weights if args.weights is not None else ("none" if task.name == "demo" else "funnel-transformer/small")
    bytes_per_weight = 16 if device.type == "cpu" else 4  # with its gradient and AdamW's two moments
    model, tokenizer, plan, origin = start_model(
        weights_name, task, blocks, args.init, train_examples.texts, args.layout_plan, bytes_per_weight
    )
    train_set = Dataset(train_examples, tokenizer, max_length)
    dev_set = Dataset(dev_examples, tokenizer, max_length)
    some = train_set.batch(np.arange(min(64, len(train_set))))
    layout.fit_norms(model, plan, some.input_ids, some.attention_mask, some.token_type_ids)
    model.to(device).train()
    model.set_gradient_checkpointing(args.gradient_checkpointing)
    forward = torch.compile(model, dynamic=True) if args.compile else model
    config = model.config
    dtype = training.choose_dtype(args.dtype, device, config.d_model)

    # Optimizer and schedule: AdamW, linear warm-up and decay (paper, section A.3).
    steps_per_epoch = -(-len(train_set) // batch_size)
    total_steps = max(1, round(steps_per_epoch * epochs))
    groups = training.parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, eps=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.linear_schedule(total_steps, args.warmup))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")

    # The run's folder.
    out = args.out or training.free_folder(Path("runs") / f"{task.name}-{config.layout}-seed{args.seed}")
    settings = {name: getattr(args, name) for name in ("init", "warmup", "weight_decay", "seed", "accumulate", "compile")}
    settings |= {"layout_plan": args.layout_plan and str(args.layout_plan)}
    settings |= {"task": task.name, "data": args.data and str(args.data), "weights": weights_name, "blocks": config.layout}
    settings |= {"train_texts": len(train_set), "dev_texts": len(dev_set), "steps": total_steps}
    settings |= {"epochs": epochs, "lr": peak_lr, "batch_size": batch_size, "max_length": max_length, "dtype": dtype}
    run = training.Run(out, settings, shlex.join(sys.orig_argv), args.resume)
    step, best, last, running = 0, {}, {}, None
    if not args.resume:
        layout.write_plan(out / "layout_plan.json", plan)
    else:
        state = run.load_state(model, device)
        try:
            optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise FunnelError(f"--resume: {out}/last is another run's ({error}); start the run again") from None
        schedule.load_state_dict(state["schedule"])
        scaler.load_state_dict(state["scaler"])
        training.set_random_state(state["random"])
        step, best, last, running = state["step"], state["best"], state["last"], state["running"]
        run.forget_after(step)
    eval_every = eval_every or -(-steps_per_epoch // 4)

    parameters = sum(p.numel() for p in model.parameters())
    print(f"{task.name}: {len(train_set):,} texts to train on, {len(dev_set):,} in dev ({train_set.cut + dev_set.cut} cut "
          f"at {max_length} tokens)\nmodel: blocks {config.layout}, width {config.d_model}, {parameters:,} parameters, "
          f"from {origin}\ntraining: {total_steps:,} steps of {batch_size}, lr {peak_lr:g}, {dtype} on {device}, "
          f"into {out}", flush=True)  # fmt: skip

    started, seen, warning = time.perf_counter(), 0, None
    bar = tqdm(total=total_steps, initial=step, unit="step", disable=None, dynamic_ncols=True)
    while step < total_steps:
        epoch, offset = divmod(step, steps_per_epoch)
        for index in train_set.training_batches(batch_size, args.seed, epoch)[offset:]:
            loss = torch.zeros((), device=device)
            for part in np.array_split(index, min(accumulate, len(index))):
                batch = train_set.batch(part).to(device)
                with training.autocast(device, dtype):
                    logits = forward(batch.input_ids, batch.attention_mask, batch.token_type_ids)
                part_loss = training.loss_function(logits, batch.labels) * (len(part) / len(index))
                scaler.scale(part_loss).backward()
                loss += part_loss.detach()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            lr = schedule.get_last_lr()[0]
            schedule.step()

            step, seen = step + 1, seen + len(index)
            running = loss if running is None else running.lerp(loss, 0.05)
            bar.update()
            is_evaluated = step % eval_every == 0 or step == total_steps
            if step % 20 == 0 or is_evaluated:
                mean_loss = training.check_loss(float(running), step, peak_lr)
                rate = seen / (time.perf_counter() - started)
                run.log(step=step, split="train", loss=mean_loss, lr=lr, examples_per_second=rate)
                bar.set_postfix_str(f"loss {mean_loss:.3f}, {rate:.0f} texts/s", refresh=False)
            if is_evaluated:
                scores, predictions = training.evaluate(model, dev_set, task.metrics, device, dtype)
                run.log(step=step, split="dev", **scores)
                last = {"step": step, **scores}
                bar.write(describe(last))
                warning = training.one_class_warning(predictions, dev_set.labels, config)
                if not best or last[task.metrics[0]] > best[task.metrics[0]]:
                    best = last
                    run.save("best", model, tokenizer)
                state = {"step": step, "best": best, "last": last, "running": running, "optimizer": optimizer.state_dict()}
                state |= {"schedule": schedule.state_dict(), "scaler": scaler.state_dict()}
                run.save("last", model, tokenizer, state | {"random": training.random_state()})
            if step == total_steps:
                break
    bar.close()

    if not seen:
        print("nothing left to do: the run was at its last step")
    minutes = (time.perf_counter() - started) / 60
    print(f"\nlast on dev: {describe(last)}\nbest on dev: {describe(best)}")
    print(f"{minutes:.1f} minutes, {seen / minutes / 60:.0f} texts a second; checkpoints and metrics.jsonl in {out}")
    if warning:
        print(warning)
    return best


def describe(scores: dict[str, float]) -> str:
    """An evaluation in a line."""
    return f"step {scores['step']:,}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items() if k != "step")


def start_model(
    weights: str,
    task: Task,
    blocks: tuple[tuple[int, ...], tuple[int, ...]] | None,
    init: str,
    texts: list[str],
    plan_file: Path | None = None,
    bytes_per_weight: int = 4,
) -> tuple[FunnelForSequenceClassification, FunnelTokenizer, list[layout.LayerPlan], str]:
    """A classifier of the wanted layout, its tokenizer, the plan of its layers, and a word on what it starts from."""
    if weights == "none":
        tokenizer = FunnelTokenizer.train(texts)
        start = SMALL.replace(vocab_size=tokenizer.vocab_size)
        old_weights, origin = FunnelForSequenceClassification(start).state_dict(), "random weights"
        # Published models draw word embeddings with a deviation of 1 and train for a million steps. Adam moves a weight
        # by about the learning rate a step, so in a thousand steps only small embeddings get anywhere.
        old_weights["embeddings.word_embeddings.weight"] *= 0.02
    else:
        source = read_source(fetch(weights))
        tokenizer = FunnelTokenizer.load(source.folder).fitting(source.config.vocab_size, source.folder)
        start, old_weights, origin = source.config, source.weights, weights
    sizes, repeats = blocks or (start.block_sizes, start.repeats)
    config = start.replace(
        block_sizes=sizes,
        block_repeats=repeats,
        num_decoder_layers=0,
        id2label=dict(enumerate(task.labels.values())),
    )
    plan = layout.read_plan(plan_file, start, config) if plan_file else layout.make_plan(start, config, init)
    check_memory(config, bytes_per_weight)
    model = FunnelForSequenceClassification(config)
    fresh = load_weights(model, layout.apply_plan(old_weights, plan, model.state_dict()), weights)
    added = sum(row.start != "keep" for row in plan)
    origin += f" (blocks {start.layout}; {len(plan) - added} layers kept, {added} new: {plan_file or init})"
    return model, tokenizer, plan, origin + (", new classifier" if fresh else "")


def positive(flag: str, value: float | None, default: float, below: float = float("inf")) -> float:
    """An argument's value or its default; FunnelError if it is not above 0 and below a bound."""
    value = default if value is None else value
    if not 0 < value < below:
        raise FunnelError(f"{flag} {value}: it takes a number above 0" + (f" and below {below:g}" if below < 1e9 else ""))
    return value


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    stopped = "--resume with --out FOLDER goes on from the run's last checkpoint"
    return exit_status("train.py", lambda: train(args), stopped)


if __name__ == "__main__":
    sys.exit(main())

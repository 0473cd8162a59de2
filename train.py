"""Fine-tunes a Funnel-Transformer on a text classification task, in any layout of blocks and layers.

    python train.py --blocks 2,2,2,2,2,2,2                     # the built-in demo task: no downloads
    python train.py --task sst2 --weights funnel-transformer/small --blocks 2,2,2,2,2,2,2
    python train.py --data reviews.csv --text-column review --label-column stars --weights DIR

This file is the recipe, top to bottom: copy it and change it. What it calls is in the package `funnel`.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from funnel import layout, training
from funnel.checkpoint import is_folder, load_weights
from funnel.config import FunnelConfig, parse_layout
from funnel.convert import fetch, read_source
from funnel.cost import check_memory
from funnel.data import encode
from funnel.errors import FunnelError, exit_status
from funnel.heads import FunnelForSequenceClassification
from funnel.prediction import Classifier, write_predictions, write_submission
from funnel.reading import ExampleFile, check_format, column_names, format_of
from funnel.tasks import TASKS, Task, get_task, locate, own_task
from funnel.tokenizer import FunnelTokenizer

# What --weights none starts from, before the layout is changed: small enough to learn the demo task on a CPU.
SMALL = FunnelConfig(block_sizes=(2, 2, 2), num_decoder_layers=0, d_model=128, n_head=4, d_head=32, d_inner=512)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to train")
    what.add_argument("--task", help=f"one of {', '.join(TASKS)} (default: demo, or your own where --data is a file)")
    what.add_argument("--data", type=Path, help="folder with the task's files as its authors publish them (default: they are "
                      "downloaded), or a .tsv, .csv or .jsonl file of your own")  # fmt: skip
    what.add_argument("--weights", help="checkpoint folder (any format that convert_weights.py reads), hub id, or none "
                      "(default: none for the demo task, funnel-transformer/small for the others)")  # fmt: skip
    what.add_argument("--blocks", help="layers in each block, as in 2,2,2,2 or 6,3x2,3x2 (default: as in the weights)")
    what.add_argument("--init", choices=layout.INITS, default="identity", help="what layers that the weights do not have "
                      "start as (default: %(default)s)")  # fmt: skip
    what.add_argument("--keep", choices=layout.KEEPS, default="spread", help="which layers stay where the weights have more "
                      "than --blocks (default: %(default)s)")  # fmt: skip
    what.add_argument("--layout-plan", type=Path, help="JSON file that says where each layer comes from, instead of --init "
                      "(every run writes its own as layout_plan.json; python -m funnel layout shows one)")  # fmt: skip
    own = parser.add_argument_group("your own data (--data FILE)")
    own.add_argument("--dev", type=Path, help="file to evaluate on (default: a part of --data, drawn by --seed)")
    own.add_argument("--dev-share", type=float, default=0.1, help="that part, of every class (default: %(default)s)")
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
    task = find_task(args)
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
    to_predict = None if args.predict is None else texts_to_predict(args, task)
    if args.glue_submission is not None:
        for file in task.tests.values():
            if not file.path.exists():
                raise FunnelError(f"--glue-submission: {file.path} is missing; the server wants answers to it")
        if not task.tests:
            raise FunnelError(f"--glue-submission: {task.title} is no task of GLUE")
    device = training.choose_device(args.device)
    training.set_seed(args.seed)
    training.reuse_memory()

    # Data, weights, model.
    train_file = task.files["train"]
    weights_name = args.weights if args.weights is not None else ("none" if task.name == "demo" else "funnel-transformer/small")
    bytes_per_weight = 16 if device.type == "cpu" else 4  # with its gradient and AdamW's two moments
    model, tokenizer, plan, origin = start_model(
        weights_name, task, blocks, args.init, train_file.texts_of_rows(), args.keep, args.layout_plan, bytes_per_weight
    )
    sets = {split: encode(file, task.label_ids, tokenizer, max_length) for split, file in task.files.items()}
    train_set = sets.pop("train")
    if not sets:
        train_set, sets["dev"] = train_set.split(args.dev_share, args.seed)
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
    settings = {
        name: getattr(args, name) for name in ("init", "keep", "warmup", "weight_decay", "seed", "accumulate", "compile")
    }
    settings |= {"layout_plan": args.layout_plan and str(args.layout_plan)}
    settings |= {"task": task.name, "data": args.data and str(args.data), "weights": weights_name, "blocks": config.layout}
    settings |= {"train_texts": len(train_set), "dev_texts": len(sets["dev"]), "steps": total_steps}
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
    cut = f"\nwarning: --max-length {max_length}: {train_set.cut}" if train_set.cut.texts else ""
    evaluated = ", ".join(f"{len(dataset):,} in {split}" for split, dataset in sets.items())
    print(f"{task.title}: {len(train_set):,} texts to train on, {evaluated}{cut}\n"
          f"model: blocks {config.layout}, width {config.d_model}, {parameters:,} parameters, from {origin}\n"
          f"training: {total_steps:,} steps of {batch_size}, lr {peak_lr:g}, {dtype} on {device}, into {out}",
          flush=True)  # fmt: skip

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
                for split, dataset in sets.items():
                    scores, predictions = training.evaluate(model, dataset, task.metrics, device, dtype)
                    run.log(step=step, split=split, **scores)
                    bar.write(describe({"step": step, **scores}) + (f" ({split})" if split != "dev" else ""))
                    if split == "dev":
                        last = {"step": step, **scores}
                        warning = training.one_class_warning(predictions, dataset.labels, config)
                if training.is_better(last[task.metrics[0]], best.get(task.metrics[0])):
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
    if to_predict is not None or args.glue_submission is not None:
        classifier = Classifier.load(out, args.device, args.dtype)
        if to_predict is not None:
            path = out / f"predictions-{to_predict.path.name}"
            print(f"{write_predictions(classifier.of_file(to_predict), path):,} predictions in {path}")
        if args.glue_submission is not None:
            print(f"answers in {', '.join(map(str, write_submission(classifier, task, args.glue_submission)))}")
    return best


def find_task(args: argparse.Namespace) -> Task:
    """The task that the arguments ask for, with its files."""
    is_own = args.data is not None and bool(format_of(args.data)) and not is_folder(args.data)
    if is_own and args.task:
        raise FunnelError(f"--task {args.task}: takes a folder for --data; for a file of your own leave --task out")
    if not is_own:
        for flag, value in {"--dev": args.dev, "--label-column": args.label_column, "--problem": args.problem}.items():
            if value is not None:
                raise FunnelError(f"{flag}: belongs to a file of your own; name it with --data FILE")
        return locate(get_task(args.task or "demo"), args.data)
    task, said = own_task(args.data, args.dev, args.text_column, args.text_pair_column, args.label_column, args.problem)
    print(f"{args.data}: {said}")
    return task


def texts_to_predict(args: argparse.Namespace, task: Task) -> ExampleFile:
    """The file of --predict, with the columns that the arguments or the task name."""
    check_format("--predict", args.predict)
    texts = task.columns if args.text_column is None else (args.text_column,)
    texts = (texts[0], args.text_pair_column) if args.text_pair_column is not None else texts
    if missing := [column for column in texts if column not in column_names(args.predict)]:
        raise FunnelError(f"--predict {args.predict}: no column {missing[0]!r}; name the texts with --text-column")
    return ExampleFile(args.predict, texts)


def describe(scores: dict[str, float]) -> str:
    """An evaluation in a line."""
    return f"step {scores['step']:,}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items() if k != "step")


def start_model(
    weights: str,
    task: Task,
    blocks: tuple[tuple[int, ...], tuple[int, ...]] | None,
    init: str,
    texts: Iterable[str],
    keep: str = "spread",
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
        id2label=dict(enumerate(["score"] if task.labels is None else task.labels.values())),
        problem_type="regression" if task.labels is None else "single_label_classification",
    )
    plan = layout.read_plan(plan_file, start, config) if plan_file else layout.make_plan(start, config, init, keep)
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

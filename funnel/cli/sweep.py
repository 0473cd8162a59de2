"""`funnel sweep`: one training run for each combination of layouts, initializations, learning rates, folds and seeds."""

import argparse
import itertools
import math
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from funnel.cli.common import ArgumentParser, parse_options
from funnel.errors import FunnelError, StoppedBySignal, format_list, plural
from funnel.io import RUN_FILE

SET_BY_SWEEP = ("--seed", "--fold", "--resume", "--out", "--lr", "--blocks")
NEW, STARTED, FINISHED = "new", "started", "finished"  # states of a run
FORWARDED_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
CONTINUE = "rerun the same command to continue"


class PlannedRun(NamedTuple):
    """A run of the sweep: its folder, and the training script's arguments without it."""

    folder: Path
    arguments: list[str]


@dataclass(frozen=True)
class SweepArgs:
    """What to train.

    Attributes:
        out: folder of the runs.
        blocks, inits, learning_rates: values to combine; None for the training script's default.
        n_seeds: number of seeds, from 0.
        n_folds: number of folds of a cross-validation; None without one.
        train_arguments: further arguments of the training script.
    """

    out: Path
    blocks: Sequence[str] | None = None
    inits: Sequence[str] | None = None
    learning_rates: Sequence[str] | None = None
    n_seeds: int = 1
    n_folds: int | None = None
    train_arguments: Sequence[str] = ()


def add_sweep(subparsers: "argparse._SubParsersAction[ArgumentParser]") -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "sweep",
        help="train every combination of layouts, learning rates, folds and seeds, then report",
        allow_abbrev=False,  # --seed must not be read as --seeds
        description="Trains every combination, one after the other, each in its own folder in --out, and writes a report.\n"
        "Rerun the same command to continue an interrupted sweep: finished runs are skipped, unfinished ones resumed.\n"
        "Unknown arguments are passed on to the training script.",
    )
    parser.add_argument("--blocks", action="append", help="layout; repeat the flag for several (default: as in the weights)")
    parser.add_argument(
        "--init", type=_split, metavar="INITS", help="comma-separated initializations of new layers (default: the script's)"
    )
    parser.add_argument(
        "--lr", type=_split, metavar="RATES", help="comma-separated learning rates, such as 1e-5,2e-5 (default: the task's)"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train with seeds 0 to N-1 (default: %(default)s)")
    parser.add_argument("--folds", type=int, metavar="N", help="cross-validation on your own data: train N times, each time "
                        "with another Nth of the data to evaluate on")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), metavar="DIR", help="folder for the runs "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--script", type=Path, default=Path("train.py"), metavar="FILE", help="training script "
                        "(default: ./%(default)s)")  # fmt: skip
    parser.set_defaults(work=sweep, take_extra=_take_train_arguments, on_interrupt=CONTINUE, train_arguments=[])


def _split(text: str) -> list[str]:
    return text.split(",")


def _take_train_arguments(args: argparse.Namespace, extra: list[str]) -> bool:
    args.train_arguments = extra
    return True


def sweep(args: argparse.Namespace) -> None:
    """Trains the runs that are not finished, then writes the report. A failed run does not stop the others.

    Raises:
        FunnelError: an argument is invalid, or a run failed.
        SystemExit: the script's arguments are invalid.
        StoppedBySignal: after a signal, once the current run has saved a checkpoint.
    """
    from funnel.analysis.report import check_can_report
    from funnel.cli.report import write_report

    if not args.script.is_file():
        raise FunnelError(f"--script {args.script}: no such file; run in a checkout, or pass the path of your script")
    if args.out.exists() and not args.out.is_dir():
        raise FunnelError(f"--out {args.out}: expected a folder for the runs, found a file")
    chosen = SweepArgs(args.out, args.blocks, args.init, args.lr, args.seeds, args.folds, args.train_arguments)
    runs = plan_runs(chosen)
    check_can_report()
    check_runs(runs, args.script)
    states = [run_state(run, args.script) for run in runs]
    print(f"{plural(len(runs), 'run')} in {args.out}, {states.count(FINISHED)} of them finished", flush=True)
    failed = []
    for number, (run, state) in enumerate(zip(runs, states, strict=True), 1):
        if state == FINISHED:
            continue
        print(f"\n[{number}/{len(runs)}] {shlex.join([args.script.name, *run.arguments])}", flush=True)
        resume = ["--resume"] if state == STARTED else []
        status = run_training(args.script, [*run.arguments, "--out", str(run.folder), *resume])
        if status:
            failed.append(run.folder)
            print(f"[{number}/{len(runs)}] failed with exit status {status}", flush=True)
    if trained := [run.folder for run in runs if run.folder not in failed]:
        print()
        write_report(trained, args.out / "report.html")
    if failed:
        names = format_list(folder.name for folder in failed)
        count = f"{len(failed)} of {plural(len(runs), 'run')}"
        raise FunnelError(f"{count} failed: {names}; see the messages above; rerun to retry them")


def plan_runs(args: SweepArgs) -> list[PlannedRun]:
    """The runs of a sweep, ordered by seed, then by fold, so that all settings run with one seed before the next.

    Raises:
        FunnelError: an argument is invalid.
    """
    from funnel.model.config import parse_blocks

    _check(args)
    choices: list[list[tuple[str, ...]]] = [  # of each flag: the arguments to choose from
        [(name, value) for value in _distinct(values, key)] if values else [()]
        for name, values, key in (
            ("--blocks", args.blocks, parse_blocks),
            ("--init", args.inits, str),
            ("--lr", args.learning_rates, _parse_rate),
        )
    ]
    folds = [("--fold", f"{k}/{args.n_folds}") for k in range(1, args.n_folds + 1)] if args.n_folds else [()]
    runs = []
    for seed, fold, chosen in itertools.product(range(args.n_seeds), folds, list(itertools.product(*choices))):
        pairs = [pair for pair in (*chosen, fold) if pair]
        values = [value.replace(",", "-") for _, value in pairs]
        if fold:
            values[-1] = f"fold{fold[1].replace('/', 'of')}"
        name = "_".join([*values, f"seed{seed}"])
        flags = [argument for pair in pairs for argument in pair]
        runs.append(PlannedRun(args.out / name, [*flags, "--seed", str(seed), *args.train_arguments]))
    return runs


def _check(args: SweepArgs) -> None:
    from funnel.weights.surgery import INITS

    if args.n_seeds < 1:
        raise FunnelError(f"invalid --seeds {args.n_seeds}: expected at least 1")
    if args.n_folds is not None and args.n_folds < 2:
        raise FunnelError(f"invalid --folds {args.n_folds}: expected at least 2")
    for init in args.inits or ():
        if init not in INITS:
            raise FunnelError(f"invalid --init {init!r}: choose from {format_list(INITS)}")
    for argument in args.train_arguments:
        if argument.split("=")[0] in SET_BY_SWEEP:
            raise FunnelError(f"{argument.split('=')[0]} is set by the sweep; remove it")


def _distinct(texts: Sequence[str], parse: Callable[[str], Hashable]) -> list[str]:
    """Drops texts with the value of an earlier one: 0.0002 after 2e-4, 2x1 after 2."""
    distinct: dict[Hashable, str] = {}
    for text in texts:
        distinct.setdefault(parse(text), text)
    return list(distinct.values())


def _parse_rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise FunnelError(f"invalid --lr {text!r}: expected positive numbers such as 1e-5,2e-5")
    return rate


def check_runs(runs: Sequence[PlannedRun], script: Path) -> None:
    """Parses the arguments of all runs, so that no run fails on them after hours of training.

    Imports the script for its `TrainArgs`; a script without this class or a `__main__` guard checks its arguments itself.

    Raises:
        FunnelError, SystemExit: the arguments are invalid.
    """
    source = script.read_text(encoding="utf-8")
    if "class TrainArgs" not in source or "__main__" not in source:
        return
    sys.path.insert(0, str(script.parent.resolve()))  # as when the script is run
    options = runpy.run_path(str(script))["TrainArgs"]
    for run in runs:
        parse_options(options, [*run.arguments, "--out", str(run.folder)], script.name)


def run_state(run: PlannedRun, script: Path) -> str:
    """NEW, STARTED or FINISHED.

    Raises:
        FunnelError: the folder has a run with different arguments.
    """
    from funnel.analysis.runs import read_run
    from funnel.io import read_json

    record = run.folder / RUN_FILE
    if not record.is_file():
        return NEW
    command = shlex.split(str(read_json(record).get("command", "")))
    expected = [*run.arguments, "--out", str(run.folder)]
    program, arguments = command[: -len(expected)], command[-len(expected) :]
    if arguments != expected or not program or Path(program[-1]).name != script.name:
        raise FunnelError(f"{run.folder}: has a run with different arguments ({shlex.join(command)}); choose another --out")
    try:
        return FINISHED if read_run(run.folder).is_finished else STARTED
    except FunnelError:  # stopped before its first evaluation
        return STARTED


def run_training(script: Path, arguments: Sequence[str]) -> int:
    """Runs the training script and returns its exit status.

    Raises:
        StoppedBySignal: a signal arrived. It was forwarded to the script, which has saved its state and exited.
    """
    # In a new session, because a terminal sends Ctrl-C to every process in its foreground process group.
    process = subprocess.Popen([sys.executable, str(script), *arguments], start_new_session=True)
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    handlers = {number: signal.signal(number, forward) for number in FORWARDED_SIGNALS}
    try:
        status = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        raise StoppedBySignal(received[0], CONTINUE)
    return status

"""Many runs from one command: `python -m funnel sweep` trains every combination of layouts, learning rates and seeds.

Each is `train.py` in a process of its own, in a folder of its own. What is done is skipped, what was stopped goes on.
"""

import itertools
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from funnel.analysis import report
from funnel.errors import FunnelError, StoppedBySignal
from funnel.io import read_json
from funnel.model.config import INITS, parse_blocks

TRAIN = Path(__file__).parent.parent.parent / "train.py"


class Planned(NamedTuple):
    """A run to be: its folder, and what train.py is given beside it."""

    folder: Path
    arguments: list[str]


def plan(
    out: Path, blocks: Sequence[str] | None, inits: str | None, rates: str | None, seeds: int, more: Sequence[str]
) -> list[Planned]:
    """The runs of a sweep, seed after seed, so that one that is cut short has all settings.

    Args:
        out: folder of the runs.
        blocks: layouts; None for that of the weights.
        inits, rates: values with commas between them; None for train.py's default.
        seeds: how many.
        more: further arguments of train.py.

    Raises:
        FunnelError: a layout, an init or a learning rate is none.
    """
    if seeds < 1:
        raise FunnelError(f"--seeds {seeds}: it takes a number from 1 up")
    for text in blocks or ():
        parse_blocks(text)
    for text in inits.split(",") if inits else ():
        if text not in INITS:
            raise FunnelError(f"--init {text!r}: there are {', '.join(INITS)}")
    distinct: dict[float, str] = {}  # 2e-4 and 0.0002 are one run
    for text in rates.split(",") if rates else ():
        try:
            distinct.setdefault(float(text), text)
        except ValueError:
            raise FunnelError(f"--lr {text!r}: is no number; give them as in 1e-5,2e-5") from None
    for flag in ("--seed", "--resume", "--out", "--lr", "--blocks"):
        if any(argument.split("=")[0] == flag for argument in more):
            raise FunnelError(f"{flag}: is set by the sweep itself")
    choices: list[list[tuple[str, ...]]] = [  # nothing, or a flag and its value
        [(flag, value) for value in dict.fromkeys(values)] if values else [()]
        for flag, values in (
            ("--blocks", blocks),
            ("--init", inits.split(",") if inits else None),
            ("--lr", list(distinct.values())),
        )
    ]
    planned = []
    for seed, rest in itertools.product(range(seeds), list(itertools.product(*choices))):
        name = "_".join([pair[1].replace(",", "-") for pair in rest if pair] + [f"seed{seed}"])
        arguments = [part for pair in rest for part in pair] + ["--seed", str(seed), *more]
        planned.append(Planned(out / name, arguments))
    return planned


def state(run: Planned) -> str:
    """ "done", "begun" or "new".

    Raises:
        FunnelError: the folder has a run with other arguments.
    """
    record = run.folder / "run.json"
    if not record.is_file():
        return "new"
    given = shlex.split(str(read_json(record).get("command", "")))
    wanted = [*run.arguments, "--out", str(run.folder)]
    if given[-len(wanted) :] != wanted or (len(given) > len(wanted) and not given[-len(wanted) - 1].endswith("train.py")):
        raise FunnelError(
            f"{run.folder}: has a run with other arguments ({shlex.join(given)[-300:]}); give the sweep another --out"
        )
    try:
        is_done = report.read(run.folder).is_done
    except FunnelError:  # stopped before its first evaluation
        is_done = False
    return "done" if is_done else "begun"


def sweep_command(
    out: Path, blocks: Sequence[str] | None, inits: str | None, rates: str | None, seeds: int, more: Sequence[str]
) -> None:
    """`python -m funnel sweep`; arguments as in `plan`.

    A run that fails does not keep the others from theirs.

    Raises:
        FunnelError: a run failed, or the arguments cannot be.
        StoppedBySignal: after a signal; the run that was going has saved a checkpoint.
    """
    if not TRAIN.is_file():
        raise FunnelError(f"sweep: {TRAIN} is not there; it needs the project's folder (pip install -e .)")
    runs = plan(out, blocks, inits, rates, seeds, more)
    states = [state(run) for run in runs]
    print(f"{len(runs)} runs in {out}, {states.count('done')} of them done", flush=True)
    failed = []
    for number, (run, now) in enumerate(zip(runs, states, strict=True), 1):
        if now == "done":
            continue
        print(f"\n[{number}/{len(runs)}] {shlex.join(['train.py', *run.arguments])}", flush=True)
        code = _run([*run.arguments, "--out", str(run.folder), *(["--resume"] if now == "begun" else [])])
        if code:
            failed.append(run.folder)
            print(f"[{number}/{len(runs)}] failed with status {code}", flush=True)
    done = [run.folder for run in runs if run.folder not in failed]
    if done:
        print()
        report.report_command(done, out / "report.html")
    if failed:
        raise FunnelError(
            f"sweep: {len(failed)} of {len(runs)} runs failed: {', '.join(f.name for f in failed)[:300]}; what they said "
            "stands above; the same command tries them again"
        )


def _run(arguments: list[str]) -> int:
    """train.py's exit status. GracefulStop that reach the sweep go on to it; when it has saved, they end the sweep.

    It gets a session of its own, else a terminal's Ctrl-C would reach it twice.
    """
    process = subprocess.Popen([sys.executable, str(TRAIN), *arguments], start_new_session=True)
    got: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        got.append(number)
        process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    former = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        code = process.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if got:
        raise StoppedBySignal(got[0], "the same command goes on")
    return code

"""Run folders: settings, log and checkpoints; how a run resumes.

run.json          the command, its arguments, and the settings that follow from them and the data
layout_plan.json  where each layer came from
metrics.jsonl     one line per `log_every` steps, one per evaluation
best/             the checkpoint of the best evaluation, with its error analysis (evaluation.json); not in pretraining
last/             the newest checkpoint, with the state that resuming needs; last-1/, last-2/, ... are older ones.
                  A finished run keeps only last/, by default without the optimizer's state. Pretraining adds what the
                  objective has besides the model: generator/, or projections.safetensors.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funnel.data.dataset import Dataset
from funnel.data.tasks import CUSTOM, Task
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, error_reason, plural
from funnel.io import (
    LOG_FILE,
    RUN_FILE,
    atomic_write,
    folder_versions,
    os_errors,
    read_json,
    verify_checksums,
    write_checksums,
    write_json,
)
from funnel.model.checkpoint import WEIGHTS, Checkpoint, load_checkpoint, load_weights, save_checkpoint
from funnel.model.heads import MODELS
from funnel.options import RANDOM, option_types
from funnel.problems.error_analysis import EVALUATION_FILE
from funnel.training.distributed import Distributed
from funnel.training.optim import MAX_WARMUP_STEPS
from funnel.training.state import STATE_VERSION, TrainComponents, TrainState
from funnel.training.tracking import TrackedRun, Tracker, check_trackers, close_all, log_to, open_trackers

VERSION = 3  # of run.json
STATE = "training_state.pt"
# Never restored from run.json: they describe this process.
PER_PROCESS = frozenset(("out", "resume", "debug", "fsdp"))
# Arguments that may change on resume: they do not affect the result, or settings derived from the data cover their effect.
MAY_CHANGE = PER_PROCESS | frozenset(
    "epochs steps device gradient_checkpointing no_cuda_graphs log_every save_every keep_checkpoints keep_optimizer "
    "tensorboard wandb "
    "data corpus teacher dev dev_share text_column text_pair_column label_column problem".split()
)
# Arguments that the settings in run.json omit.
NOT_SETTINGS = MAY_CHANGE - {"epochs", "steps", "data", "corpus", "teacher", "dev_share"}


class LastCheckpoint(NamedTuple):
    """A checkpoint to resume from.

    Attributes:
        model: of the class that the run trains.
    """

    folder: Path
    model: Any
    tokenizer: FunnelTokenizer
    state: TrainState


class RunDir:
    """A run folder. Only rank 0 writes.

    Args:
        folder: created by `start`, or that of an existing run.
        keep: number of `last` checkpoints to keep.
        keep_optimizer: whether the last checkpoint of a finished run has the optimizer's state.

    Attributes:
        settings: those in run.json.
        checkpoint: the one that the run resumes from; None for a new run, or if there is none yet.
        resume_note: one line about how the run was resumed; "" for a new run.
        trackers: receive each line of metrics.jsonl. Only those of rank 0 are used.
    """

    def __init__(self, folder: Path, keep: int = 2, keep_optimizer: bool = False, dist: Distributed | None = None) -> None:
        self.folder, self.keep, self.keep_optimizer = folder, keep, keep_optimizer
        self.dist = dist or Distributed(torch.device("cpu"))
        self.is_main = self.dist.is_main
        self.settings: dict[str, Any] = {}
        self.checkpoint: LastCheckpoint | None = None
        self.resume_note = ""
        self.trackers: list[Tracker] = []
        self._saved = (-1, -1)  # step and evaluation of the newest checkpoint

    @classmethod
    def open(cls, args: Any, dist: Distributed) -> "RunDir":
        """Checks that the folder can hold a new run, or reads the newest checkpoint of the run to resume. Writes nothing.

        Args:
            args: the arguments of train.py or pretrain.py; `out`, `resume`, `keep_checkpoints` and `keep_optimizer` are used.

        Raises:
            FunnelError: the folder cannot be written or is not empty, all checkpoints are damaged, or a package that a tracker
                needs is not installed.
        """
        run = cls(args.out or Path("runs"), args.keep_checkpoints, args.keep_optimizer, dist)

        def open_on_main() -> tuple[Checkpoint, FunnelTokenizer, TrainState, Path] | None:
            check_writable(run.folder, is_new=args.out is not None and not args.resume)
            check_trackers(args)
            return run.load_last() if args.resume else None

        loaded = dist.run_on_main_and_broadcast(open_on_main)
        if loaded is not None:
            (config, weights, architecture), tokenizer, state, folder = loaded
            if architecture not in MODELS:
                raise FunnelError(f"resume: {folder} has the unknown architecture {architecture!r}", "resume")
            model = MODELS[architecture](config).eval()
            if new := load_weights(model, weights, str(folder)):
                raise FunnelError(f"resume: the checkpoint in {folder} lacks weights ({new[0]})", "resume")
            run.checkpoint = LastCheckpoint(folder, model, tokenizer, state)
            run._saved = (state.step, state.evaluated_step)
        return run

    def start(self, args: Any, derived: Mapping[str, Any], command: str) -> TrainState:
        """Creates the folder of a new run, or checks and updates that of the run to resume; returns the state to start from.

        Args:
            args: the arguments of train.py or pretrain.py, with all defaults filled in.
            derived: settings that follow from the arguments and the data. Those of a resumed run must not have changed,
                except for the number of steps.
            command: recorded in run.json; `funnel sweep` compares it.

        Raises:
            FunnelError: the data has changed, the run has already completed more steps, or a tracker cannot be started.
        """
        values = {name: v for name, v in dataclasses.asdict(args).items() if name not in NOT_SETTINGS}
        self.settings = {**{name: _to_json(v) for name, v in values.items()}, **derived}
        state = self.checkpoint.state if self.checkpoint else TrainState()
        old_steps = state.total_steps
        warmup = min(0.1, MAX_WARMUP_STEPS / derived["steps"]) if args.warmup is None else args.warmup
        duration = "steps" if args.steps is not None else "epochs"  # the argument that determines the number of steps

        def start_on_main() -> Path:
            if args.resume:
                record = read_record(self.folder)
                self._check_settings(record["settings"], derived)
                state.plan_steps(derived["steps"], warmup, duration)  # here too, so that only rank 0 reports an error
                if record["settings"]["steps"] != derived["steps"]:
                    record["settings"].update({duration: getattr(args, duration), "steps": derived["steps"]})
                    record["arguments"][duration] = getattr(args, duration)
                    record["settings"].pop("stopped_at", None)
                    write_json(self.folder / RUN_FILE, record)
                kept, repeated = self.truncate_log(state)
                self.trackers += open_trackers(args, TrackedRun(self.folder, self.settings, kept, repeated))
                return self.folder
            if args.out is not None:
                check_writable(args.out, is_new=True)  # check again: another run may have used it meanwhile
            name = f"{derived.get('task') or args.objective}-{derived['blocks']}-seed{args.seed}"
            folder = args.out or create_unused_folder(self.folder / name)
            arguments = absolute_paths(args)
            arguments |= {name: v for name, v in derived.items() if name in ("task", "blocks", "dtype") and v != CUSTOM}
            record = {"version": VERSION, "command": command, "settings": self.settings, "arguments": arguments}
            write_json(folder / RUN_FILE, record)
            self.trackers += open_trackers(args, TrackedRun(folder, self.settings))
            return folder

        self.folder = self.dist.run_on_main_and_broadcast(start_on_main)
        has_optimizer = bool(state.optimizer)
        state.plan_steps(derived["steps"], warmup, duration)
        if args.resume:
            self.resume_note = describe_resumption(state, old_steps, has_optimizer, duration)
        return state

    def _check_settings(self, old: Mapping[str, Any], derived: Mapping[str, Any]) -> None:
        """Raises FunnelError if the run was started with other derived settings."""
        changed = [name for name, value in derived.items() if name != "steps" and old.get(name) != value]
        if changed == ["teacher_digest"]:
            raise FunnelError("teacher: its weights have changed since the run was started; start a new run", "teacher")
        if changed and set(changed) <= {"digests", "train_examples", "dev_examples", "mean_tokens"}:
            raise FunnelError(
                f"the data has changed since the run was started; start a new one, optionally with weights {self.folder}",
                "weights",
            )
        if changed:
            name = changed[0]
            raise FunnelError(
                f"the run was started with {name} {old.get(name)!r}, not {derived[name]!r}; "
                f"start a new one, optionally with weights {self.folder}",
                "weights",
            )

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def load_last(self) -> tuple[Checkpoint, FunnelTokenizer, TrainState, Path] | None:
        """The newest intact checkpoint; None before the first one. Warns about damaged ones.

        Raises:
            FunnelError: all checkpoints are damaged.
        """
        folders = folder_versions(self.folder / "last")
        for number, folder in enumerate(folders, 1):
            try:
                checkpoint = load_checkpoint(folder)  # verifies the weights' checksum
                verify_checksums(folder, skip=WEIGHTS)
                return checkpoint, FunnelTokenizer.load(folder), _read_state(folder / STATE), folder
            except FunnelError as error:
                if number == len(folders):
                    newer = f" ({plural(number - 1, 'newer checkpoint')} damaged, too)" if number > 1 else ""
                    raise FunnelError(f"resume: {error}{newer}; start a new run", "resume") from None
                print(f"warning: {error}\nwarning: resuming from an older checkpoint, {folders[number]}", file=sys.stderr)
        return None

    def save_last(self, state: TrainState, components: TrainComponents) -> None:
        """Saves a checkpoint to resume from, unless this state is already saved. All ranks must call it.

        A finished run keeps only this checkpoint, without the optimizer's state unless `keep_optimizer` is set.
        """
        if state.step == 0:
            return  # there is no optimizer state to save yet
        if self._saved != (state.step, state.evaluated_step):
            dist, optimizer = components.dist, {}
            all_weights = dist.model_state(components.module)
            weights = all_weights  # of the model, or of an objective, of which the model is a part
            if components.save_more is not None:
                weights = {n.removeprefix("model."): tensor for n, tensor in all_weights.items() if n.startswith("model.")}
            if self.keep_optimizer or not state.is_finished:
                optimizer = dist.optimizer_state(components.module, components.optimizer)
            values = state.to_dict(optimizer, components.scaler.state_dict() if optimizer else {})

            def write_state(folder: Path) -> None:
                with (folder / STATE).open("wb") as file:
                    torch.save(values, file)
                if components.save_more is not None:
                    components.save_more(folder, all_weights)

            if self.is_main:
                self._save("last", components, weights, write_state)
            self._saved = (state.step, state.evaluated_step)
        if self.is_main and state.is_finished:
            if state.stopped_early:
                record = read_json(self.folder / RUN_FILE)
                record["settings"]["stopped_at"] = state.step
                write_json(self.folder / RUN_FILE, record)
            for older in folder_versions(self.folder / "last")[1:]:
                shutil.rmtree(older, ignore_errors=True)

    def save_best(self, components: TrainComponents, results: Tensor, dataset: Dataset) -> None:
        """Saves the checkpoint of the best evaluation with its error analysis. All ranks must call it.

        Args:
            results: of the evaluation's dataset, as in `Evaluation`.
        """
        weights, problem = components.dist.model_state(components.model), components.problem
        assert problem is not None, "pretraining has no best checkpoint"
        components.model.config = components.model.config.replace(decision_threshold=problem.threshold)
        if self.is_main:
            evaluation = problem.analyze(results, dataset, components.tokenizer)
            self._save("best", components, weights, lambda folder: write_json(folder / EVALUATION_FILE, evaluation))

    def _save(
        self, name: str, components: TrainComponents, weights: dict[str, Tensor], write_more: Callable[[Path], None]
    ) -> None:
        def write_files(folder: Path) -> None:
            components.tokenizer.save(folder)
            write_more(folder)
            write_checksums(folder)

        architecture = type(components.model).__name__.removeprefix("FSDP")  # fully_shard changes the class
        checkpoint = Checkpoint(components.model.config, weights, architecture)
        save_checkpoint(self.folder / name, checkpoint, write_files, self.keep if name == "last" else 1)

    def size(self) -> int:
        """The size of the folder in bytes."""
        with os_errors(self.folder):
            return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    # --- log ----------------------------------------------------------------------------------------------------------

    def log(self, **values: Any) -> None:
        """Appends a line to metrics.jsonl on rank 0; values that are not finite become null. Passes it to the trackers."""
        if not self.is_main:
            return
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        path = self.folder / LOG_FILE
        with os_errors(path, "write"), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        log_to(self.trackers, values)

    def close(self, failed: bool) -> None:
        """Closes the trackers.

        Args:
            failed: whether an error ended the training.
        """
        close_all(self.trackers, failed)

    def truncate_log(self, state: TrainState) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Drops the lines of metrics.jsonl that a run resumed from `state` will write again.

        Returns:
            The lines that were kept, and those that were dropped.
        """
        path = self.folder / LOG_FILE
        if not path.is_file():
            return [], []
        with os_errors(path):
            lines = [line for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if (line := _parse(text))]
        kept, dropped = ([line for line in lines if _precedes(line, state) == keep] for keep in (True, False))
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        return kept, dropped


def check_writable(folder: Path, is_new: bool) -> None:
    """Raises FunnelError if files cannot be created in a folder or, if it does not exist, in its nearest existing parent.

    Args:
        is_new: whether the folder must be empty or not exist, too.
    """
    with os_errors(folder, "write"):
        if is_new and folder.exists():
            if not folder.is_dir():
                raise FunnelError(f"out {folder}: expected a folder, found a file", "out")
            if any(not path.name.startswith(".") for path in folder.iterdir()):
                raise FunnelError(f"out {folder}: not empty; choose another folder, or resume the run in it", "out")
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing, prefix="."):
            pass


def read_record(folder: Path) -> dict[str, Any]:
    """Reads the run.json of a run to resume.

    Raises:
        FunnelError: there is none, it is damaged, or it was written by another version.
    """
    path = folder / RUN_FILE
    with os_errors(path):
        exists = path.exists()
    if not exists:
        raise FunnelError(f"resume: no run in {folder}: expected its run.json; check the run folder", "resume")
    record = read_json(path)
    if record.get("version") != VERSION:
        raise FunnelError(
            "the run was started by an incompatible version of this program; "
            f"start a new one, optionally with weights {folder}",
            "weights",
        )
    settings, arguments = record.get("settings"), record.get("arguments")
    if not isinstance(settings, dict) or not isinstance(arguments, dict) or "steps" not in settings:
        raise FunnelError(f"resume: {path} is damaged: it lacks settings or arguments; start a new run", "resume")
    return record


def read_arguments(folder: Path, options: type) -> dict[str, Any]:
    """The arguments of the run in a folder, except those in `PER_PROCESS`.

    Args:
        options: their dataclass. Its defaults are used for arguments that run.json lacks.

    Raises:
        FunnelError: as `read_record`, or an argument has the wrong type.
    """
    arguments: dict[str, Any] = {}
    stored, kinds = read_record(folder)["arguments"], option_types(options)
    if "objective" in stored.keys() ^ kinds.keys():
        script = "pretrain.py" if "objective" in stored else "train.py"
        raise FunnelError(f"resume: the run in {folder} was started by {script}; resume it with that script", "resume")
    for name, kind in kinds.items():
        value = stored.get(name)
        if value is None or name in PER_PROCESS:
            continue
        expected: Any = {Path: str, float: int | float, tuple[Path, ...]: list}.get(kind, kind)
        if not isinstance(value, expected):
            raise FunnelError(f"resume: {folder / 'run.json'}: invalid {name} {value!r}; start a new run", "resume")
        if kind == tuple[Path, ...]:
            value = tuple(Path(str(item)) for item in value)
        arguments[name] = Path(value) if kind is Path else value
    return arguments


def absolute_paths(args: Any) -> dict[str, Any]:
    """Arguments for run.json, valid in any working directory."""
    values = {name: value for name, value in dataclasses.asdict(args).items() if name not in PER_PROCESS}
    for name, value in values.items():
        is_folder = name in ("weights", "teacher") and isinstance(value, str) and value != RANDOM and os.path.isdir(value)
        if isinstance(value, Path) or is_folder:  # a name that is not a folder is a hub id
            values[name] = os.path.abspath(value)
        elif isinstance(value, tuple):
            values[name] = [os.path.abspath(path) for path in value]
    return values


def _to_json(value: Any) -> Any:
    """Paths as strings."""
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def describe_resumption(state: TrainState, old_steps: int, has_optimizer: bool, duration: str) -> str:
    """One line about where a run continues, and with what schedule.

    Args:
        old_steps: number of steps of the checkpoint's schedule.
        has_optimizer: whether the checkpoint has the optimizer's state.
        duration: the argument that makes the run longer.
    """
    if state.step == 0:
        return "no checkpoint to resume from: starting at step 0"
    if state.is_finished:
        return f"nothing left to do: the run has finished ({plural(state.step, 'step')}); to train longer, increase {duration}"
    note = f"resumed at step {state.step:,}"
    if state.total_steps == old_steps:
        return note
    start = "the saved optimizer state, no warmup" if has_optimizer else "a new optimizer state and a new warmup"
    return f"{note}: a new schedule for {plural(state.total_steps - state.step, 'more step')}, with {start}"


def describe_data(task: Task, train_set: Dataset, eval_sets: Mapping[str, Dataset]) -> dict[str, Any]:
    """The settings of a run that are derived from its data."""
    return {
        "task": task.name,
        "columns": list(task.text_columns),
        "labels": task.label_names,
        "metrics": list(task.metrics),
        "train_examples": len(train_set),
        "dev_examples": len(eval_sets["dev"]),
        "mean_tokens": round(float(train_set.lengths.mean()), 1),
        "digests": {"train": train_set.digest, **{split: dataset.digest for split, dataset in eval_sets.items()}},
    }


def create_unused_folder(folder: Path) -> Path:
    """Creates the folder or, if it exists, the first unused one of NAME-2, NAME-3, …; safe for concurrent runs."""
    for number in itertools.count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with os_errors(candidate, "write"), contextlib.suppress(FileExistsError):
            candidate.mkdir(parents=True)
            break
    return candidate


def _read_state(path: Path) -> TrainState:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise FunnelError(f"{path}: damaged ({error_reason(error)})") from None
    expected = {f.name for f in dataclasses.fields(TrainState)} | {"version"}
    if not isinstance(values, dict) or values.keys() != expected or values.pop("version") != STATE_VERSION:
        raise FunnelError(f"{path}: not a training state of this version")
    return TrainState(**values)


def _parse(text: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None if it is truncated."""
    try:
        line = json.loads(text)
        return line if line["step"] >= 0 and isinstance(line["split"], str) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _precedes(line: Mapping[str, Any], state: TrainState) -> bool:
    """Whether a line of metrics.jsonl was written before `state`."""
    return bool(line["step"] <= (state.step if line["split"] == "train" else state.evaluated_step))

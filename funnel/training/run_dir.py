"""Run folders: settings, log and checkpoints; how a run resumes.

run.json          the command and the settings
layout_plan.json  where each layer came from
metrics.jsonl     one line per `log_every` steps, one per evaluation
best/             the checkpoint of the best evaluation, with its error analysis (evaluation.json)
last/             the newest checkpoint, with the state that resuming needs; last-1/, last-2/, ... are older ones
"""

import contextlib
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funnel.data.dataset import Dataset
from funnel.data.tasks import Task
from funnel.errors import FunnelError, error_reason, plural
from funnel.io import (
    atomic_write,
    folder_versions,
    os_errors,
    read_json,
    verify_checksums,
    write_checksums,
    write_json,
)
from funnel.model.checkpoint import CONFIG, TOKENIZER, Checkpoint, load_checkpoint, load_weights, save_checkpoint
from funnel.training.distributed import Distributed
from funnel.training.error_analysis import EVALUATION_FILE
from funnel.training.state import STATE_VERSION, TrainComponents, TrainState

VERSION = 2  # of run.json
STATE = "training_state.pt"
# Arguments that may change on resume: they do not affect the result, or the derived settings cover their effect.
MAY_CHANGE = frozenset(
    "out resume debug device fsdp gradient_checkpointing log_every save_every keep_checkpoints "
    "dev text_column text_pair_column label_column problem".split()
)


class RunDir:
    """A run folder. Only rank 0 writes.

    Args:
        folder: created by `start`, or that of an existing run.
        keep: number of `last` checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int = 2, is_main: bool = True) -> None:
        self.folder, self.keep, self.is_main = folder, keep, is_main
        self.settings: dict[str, Any] = {}
        self.is_resumed = False
        self._saved = (-1, -1)  # step and evaluation of the newest checkpoint

    @classmethod
    def open(cls, args: Any, derived: Mapping[str, Any], command: str, dist: Distributed) -> "RunDir":
        """Creates the folder of a new run, or checks that of the run to resume.

        Args:
            args: the command line as a dataclass; has `out`, `resume` and `keep_checkpoints`.
            derived: settings that follow from the arguments: the task's, sizes, digests. A resumed run must have the same
                arguments (except those in `MAY_CHANGE`) and derived settings.
            command: recorded in run.json; `funnel sweep` compares it.
        """
        options = {name: value for name, value in dataclasses.asdict(args).items() if name not in MAY_CHANGE}
        options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        settings = {**options, **derived}

        def open_on_main() -> Path:
            name = f"{settings['task']}-{settings['blocks']}-seed{settings['seed']}"
            run = cls(args.out or create_unused_folder(Path("runs") / name))
            run.check_settings(settings) if args.resume else run.start(settings, command)
            return run.folder

        run = cls(dist.run_on_main_and_broadcast(open_on_main), args.keep_checkpoints, dist.is_main)
        run.settings, run.is_resumed = settings, args.resume
        return run

    def start(self, settings: Mapping[str, Any], command: str) -> None:
        """Creates the folder and its run.json.

        Raises:
            FunnelError: the folder is not empty or cannot be written.
        """
        folder = self.folder
        with os_errors(folder, "write"):
            if folder.exists() and not folder.is_dir():
                raise FunnelError(f"out {folder}: expected a folder, found a file", "out")
            if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
                raise FunnelError(f"out {folder}: not empty; choose another folder, or resume the run in it", "out")
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", {"version": VERSION, "command": command, "settings": dict(settings)})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raises FunnelError if the folder contains no run, or one that was started with different settings."""
        record = self.folder / "run.json"
        values = read_json(record) if record.exists() else {}
        if not isinstance(values.get("settings"), dict):
            raise FunnelError(f"resume: no run in {self.folder}", "resume")
        if values.get("version") != VERSION:
            raise FunnelError(
                f"resume: the run in {self.folder} was started by an incompatible version of this program; "
                f"start a new run, optionally with {self.folder} as the weights",
                "resume",
            )
        old = values["settings"]
        changed = [name for name, value in settings.items() if old.get(name) != value]
        if changed == ["digests"]:
            raise FunnelError(f"resume: the data has changed since {self.folder} was started; start a new run", "resume")
        if changed:
            name = changed[0]
            raise FunnelError(
                f"resume: {self.folder} was started with {name} {old.get(name)!r}, not {settings[name]!r}; "
                "repeat the original arguments, or start a new run",
                "resume",
            )

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def resume(self, model: nn.Module, dist: Distributed) -> TrainState:
        """Loads the newest intact checkpoint into `model` and returns its state; step 0 if there is none yet.

        Drops the lines of metrics.jsonl that will be written again.

        Raises:
            FunnelError: all checkpoints are damaged.
        """
        loaded = dist.run_on_main_and_broadcast(self.load_last)
        state = TrainState()
        if loaded is not None:
            weights, state = loaded
            if new := load_weights(model, weights, str(self.folder)):
                raise FunnelError(f"resume: the classifier in {self.folder} has different outputs ({new[0]})", "resume")
            self._saved = (state.step, state.evaluated_step)
        if self.is_main:
            self.truncate_log(state)
        return state

    def load_last(self) -> tuple[dict[str, Tensor], TrainState] | None:
        """Weights and state of the newest intact checkpoint; None before the first one. Warns of damaged ones."""
        folders = folder_versions(self.folder / "last")
        for number, folder in enumerate(folders, 1):
            try:
                weights = load_checkpoint(folder).weights  # verifies their checksum
                verify_checksums(folder, [CONFIG, TOKENIZER, STATE])
                return weights, _read_state(folder / STATE)
            except FunnelError as error:
                if number == len(folders):
                    newer = f" ({plural(number - 1, 'newer checkpoint')} damaged, too)" if number > 1 else ""
                    raise FunnelError(f"resume: {error}{newer}; start a new run", "resume") from None
                print(f"warning: {error}\nwarning: resuming from an older checkpoint, {folders[number]}", file=sys.stderr)
        return None

    def save_last(self, state: TrainState, components: TrainComponents) -> None:
        """Saves a checkpoint to resume from, unless this state is already saved. All ranks must call it."""
        if state.step == 0 or self._saved == (state.step, state.evaluated_step):
            return  # before the first step there is no optimizer state to save
        dist = components.dist
        weights = dist.model_state(components.model)
        optimizer = dist.optimizer_state(components.model, components.optimizer)
        values = state.to_dict(optimizer, components.scaler.state_dict())

        def write_state(folder: Path) -> None:
            with (folder / STATE).open("wb") as file:
                torch.save(values, file)

        if self.is_main:
            self._save("last", components, weights, write_state)
        self._saved = (state.step, state.evaluated_step)

    def save_best(self, components: TrainComponents, evaluation: Mapping[str, Any]) -> None:
        """Saves the checkpoint of the best evaluation with its error analysis. All ranks must call it."""
        weights = components.dist.model_state(components.model)
        if self.is_main:
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

    # --- log ----------------------------------------------------------------------------------------------------------

    def log(self, **values: Any) -> None:
        """Appends a line to metrics.jsonl on rank 0; values that are not finite become null."""
        if not self.is_main:
            return
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        path = self.folder / "metrics.jsonl"
        with os_errors(path, "write"), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def truncate_log(self, state: TrainState) -> None:
        """Drops the lines of metrics.jsonl that a run resumed from `state` will write again."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return
        with os_errors(path):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        with atomic_write(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines if _precedes(line, state)), encoding="utf-8")


def describe_data(task: Task, train_set: Dataset, eval_sets: Mapping[str, Dataset]) -> dict[str, Any]:
    """The settings of a run that are derived from its data."""
    return {
        "task": task.name,
        "columns": list(task.text_columns),
        "labels": task.label_names,
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


def _precedes(line: str, state: TrainState) -> bool:
    """Whether a line of metrics.jsonl was written before `state`; False for a truncated line."""
    try:
        values = json.loads(line)
        return bool(values["step"] <= (state.step if values["split"] == "train" else state.evaluated_step))
    except (ValueError, KeyError, TypeError, RecursionError):
        return False

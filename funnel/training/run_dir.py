"""A run's folder: its record, its log, its checkpoints, and how a run goes on from them.

run.json          the command and the settings
layout_plan.json  where every layer came from
metrics.jsonl     a line every 20 steps, one an evaluation
best/             the checkpoint of the best evaluation, with what it got wrong (evaluation.json)
last/             the newest one, with what training needs to go on; last-1/, last-2/ … the ones before it
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, error_reason
from funnel.io import folder_versions, read_json, verify_checksums, write_checksums, write_json
from funnel.model import checkpoint
from funnel.model.config import FunnelConfig
from funnel.training import error_analysis

STATE = "training_state.pt"


@dataclass
class TrainState:
    """Where a run stands: with the weights, all that it needs to go on.

    Attributes:
        step: steps done.
        evaluated: step of the last evaluation.
        best, last: evaluations on dev: the step and metrics by name.
        loss: running mean of the training loss.
        skipped, in_a_row: steps that were left out because a number was not finite; those at the end of them.
        optimizer, scaler: what PyTorch's classes give for saving.
    """

    step: int = 0
    evaluated: int = 0
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    loss: float | None = None
    skipped: int = 0
    in_a_row: int = 0
    optimizer: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def unused_folder(folder: Path) -> Path:
    """The folder itself, or its name with the first number from 2 up that is not taken."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


class RunDir:
    """A run's folder.

    Args:
        folder: where it is.
        kept: checkpoints to go on from that are kept.
    """

    def __init__(self, folder: Path, kept: int = 2) -> None:
        self.folder, self.kept = folder, kept

    def start(self, settings: Mapping[str, Any], command: str) -> None:
        """Makes the folder and its record.

        Args:
            settings: what the run was asked for.
            command: the exact command, for people.

        Raises:
            FunnelError: the folder holds another run or other files, or cannot be written.
        """
        folder = self.folder
        try:
            if folder.exists() and not folder.is_dir():
                raise FunnelError(f"--out {folder}: is a file; name a folder")
            if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
                raise FunnelError(f"--out {folder}: holds another run or other files; name another folder, or --resume it")
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "run.json", {"command": command, "settings": dict(settings)})
        except OSError as error:
            raise FunnelError(f"--out {folder}: cannot be written ({error_reason(error)})") from None

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises FunnelError if the folder holds no run, or one that was started with other settings."""
        record = self.folder / "run.json"
        found = read_json(record).get("settings") if record.exists() else None
        if not isinstance(found, dict):
            raise FunnelError(f"--resume: {self.folder} holds no run; name its folder with --out")
        if changed := [k for k, v in settings.items() if found.get(k) != v]:
            if changed == ["contents"]:
                raise FunnelError(f"--resume: the data is not what {self.folder} was started with; give another --out")
            raise FunnelError(
                f"--resume: {self.folder} was started with {changed[0]} {found.get(changed[0])!r}, "
                f"not {settings[changed[0]]!r}; give the same arguments, or another --out"
            )

    def load(self) -> tuple[dict[str, Tensor], TrainState] | None:
        """The weights and the state of the newest checkpoint that is whole; None before the first one.

        A damaged checkpoint is passed over, which is told on standard error.

        Raises:
            FunnelError: there are checkpoints, but all of them are damaged.
        """
        folders = folder_versions(self.folder / "last")
        for number, folder in enumerate(folders, 1):
            try:
                verify_checksums(folder)
                return checkpoint.load(folder).weights, _read_state(folder / STATE)
            except FunnelError as error:
                if number == len(folders):
                    more = "" if number == 1 else f", and so are the {number - 1} newer ones"
                    raise FunnelError(f"--resume: {error}{more}; start the run again with another --out") from None
                print(f"--resume: {error}\n--resume: goes on from the checkpoint before it, {folders[number]}", file=sys.stderr)
        return None

    def forget_after(self, state: TrainState) -> None:
        """Drops the lines of metrics.jsonl that a run which goes on from a state will write again.

        Raises:
            FunnelError: the log cannot be written; it is as it was then.
        """
        log = self.folder / "metrics.jsonl"
        part = log.with_name(".metrics.jsonl.part")
        try:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
            part.write_text("".join(f"{line}\n" for line in lines if _is_before(line, state)), encoding="utf-8")
            part.replace(log)
        except OSError as error:
            raise FunnelError(f"{log}: cannot be written ({error_reason(error)})") from None

    def log(self, **values: Any) -> None:
        """Appends a line to metrics.jsonl. A measure that is not finite becomes null there.

        Raises:
            FunnelError: it cannot be written.
        """
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise FunnelError(f"{self.folder}/metrics.jsonl: cannot be written ({error_reason(error)})") from None

    def save(
        self,
        name: str,
        config: FunnelConfig,
        weights: Mapping[str, Tensor],
        architecture: str,
        tokenizer: FunnelTokenizer,
        state: TrainState | None = None,
        evaluation: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a checkpoint folder, with the training state where one is given; then former ones are kept, too.

        Args:
            evaluation: what `error_analysis.analyze_errors` found.

        Raises:
            FunnelError: it cannot be written; the one before it is as it was.
        """

        def extra(folder: Path) -> None:
            tokenizer.save(folder)
            if evaluation is not None:
                write_json(folder / error_analysis.FILE, dict(evaluation))
            if state is not None:
                with (folder / STATE).open("wb") as file:
                    torch.save({f.name: getattr(state, f.name) for f in dataclasses.fields(state)}, file)
            write_checksums(folder)

        kept = 1 if state is None else self.kept
        checkpoint.save(self.folder / name, config, weights, architecture, extra, kept)


def _read_state(path: Path) -> TrainState:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise FunnelError(f"{path}: damaged ({error_reason(error)})") from None
    expected = {f.name for f in dataclasses.fields(TrainState)}
    if not isinstance(values, dict) or values.keys() != expected:
        raise FunnelError(f"{path}: is no training state of this version")
    return TrainState(**values)


def _is_before(line: str, state: TrainState) -> bool:
    """Whether a line of metrics.jsonl was written before a state; false for a line that was cut off."""
    try:
        values = json.loads(line)
        return bool(values["step"] <= (state.step if values["split"] == "train" else state.evaluated))
    except (ValueError, KeyError, TypeError, RecursionError):
        return False

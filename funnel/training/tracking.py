"""Experiment trackers: TensorBoard, Weights & Biases, or any other object with the methods of `Tracker`.

metrics.jsonl is the record of a run; each tracker receives a copy of its lines, on rank 0. A tracker that fails during training
is dropped with a warning, and the run continues.
"""

import contextlib
import importlib
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from funnel.errors import FunnelError, error_reason, requires_extra
from funnel.io import os_errors
from funnel.options import option

EVENT_FILES = "events.out.tfevents.*"  # TensorBoard's
WANDB_ID = Path("wandb/run-id.txt")  # in the run folder: the id under which W&B knows the run
NO_SETTINGS = ("labels", "columns", "digests")  # of run.json; they describe the data


class Tracker(Protocol):
    """Receives what a run logs. Add your own to `RunDir.trackers`."""

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Called for each line of metrics.jsonl.

        Args:
            split: "train", or the evaluated dataset, such as "dev".
            values: finite values by name: loss, learning rate and speed, or loss and metrics.
        """

    def close(self, failed: bool) -> None:
        """Called once after the last line.

        Args:
            failed: whether an error ended the training.
        """


@dataclass(frozen=True)
class TrackingArgs:
    """The options for trackers. The name of each is that of the extra it needs."""

    tensorboard: bool = option(False, "also write TensorBoard's event file to the run folder")
    wandb: bool = option(False, "also log to Weights & Biases, as configured by its WANDB_... environment variables")


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker needs to know about a run.

    Attributes:
        settings: those in run.json.
        kept: the lines of metrics.jsonl that precede the checkpoint from which the run resumes.
        repeated: the later lines, which the run will log again.
    """

    folder: Path
    settings: Mapping[str, Any]
    kept: Sequence[Mapping[str, Any]] = ()
    repeated: Sequence[Mapping[str, Any]] = ()


class TensorBoard:
    """Writes TensorBoard's event file in the run folder.

    The file of a resumed run is rewritten from metrics.jsonl, with the original times, so it has no duplicates and no points
    after the checkpoint, and it is complete even if the run was started without this tracker.
    """

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        times = read_times(run.folder)
        with os_errors(run.folder, "write"):
            for path in run.folder.glob(EVENT_FILES):
                path.unlink()
            self.writer = SummaryWriter(str(run.folder))
        settings = {k: v for k, v in run.settings.items() if isinstance(v, bool | int | float | str)}
        metrics = {f"dev/{name}": None for name in run.settings.get("metrics", ["loss"])}
        for summary in hparams(settings, metrics):  # add_hparams would create a second run in a subfolder
            self.writer._get_file_writer().add_summary(summary)
        for line in run.kept:
            for tag, value in tagged_values(line).items():
                self.writer.add_scalar(tag, value, line["step"], times.get((tag, line["step"])))

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{split}/{name}", value, step)

    def close(self, failed: bool) -> None:
        self.writer.close()


def read_times(folder: Path) -> dict[tuple[str, int], float]:
    """When each point of the event files in a folder was logged, by tag and step; empty if they cannot be read."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any(folder.glob(EVENT_FILES)):
        return {}
    with contextlib.suppress(Exception):  # a damaged file can raise anything
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        return {(tag, e.step): e.wall_time for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    return {}


class WandB:
    """Logs to Weights & Biases. A resumed run continues under its id.

    Points that W&B has received cannot be deleted. Those from before the interruption are not logged again, because the resumed
    run repeats the same computation.

    Raises:
        FunnelError: W&B does not accept the run.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        path = run.folder / WANDB_ID
        with os_errors(path, "write"):
            is_new = not path.is_file()
            run_id = os.environ.get("WANDB_RUN_ID") or (secrets.token_hex(4) if is_new else path.read_text(encoding="utf-8"))
        defaults = {"WANDB_DIR": ("dir", str(run.folder)), "WANDB_NAME": ("name", run.folder.name)}
        chosen: dict[str, Any] = dict(argument for variable, argument in defaults.items() if variable not in os.environ)
        config = {name: value for name, value in run.settings.items() if name not in NO_SETTINGS}
        try:
            self.run: Any = wandb.init(id=run_id, resume="allow", config=config, **chosen)
        except Exception as error:
            raise FunnelError(
                f"wandb: the run could not be started ({error_reason(error)}); log in with `wandb login`, or set "
                f"WANDB_MODE=offline; then resume the run in {run.folder}",
                "wandb",
            ) from None
        with os_errors(path, "write"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(run_id, encoding="utf-8")
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")  # W&B's own step can only increase
        self._logged = set() if is_new else {(line["step"], line["split"]) for line in run.repeated}
        for line in run.kept if is_new else ():
            self.run.log({"step": line["step"], **tagged_values(line)})

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        if (step, split) not in self._logged:
            self.run.log({"step": step, **{f"{split}/{name}": value for name, value in values.items()}})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}  # by option
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check_trackers(args: TrackingArgs) -> None:
    """Raises FunnelError if a package that the chosen trackers need is not installed."""
    for name, module in MODULES.items():
        if getattr(args, name):
            with requires_extra(name, name, name):
                importlib.import_module(module)


def open_trackers(args: TrackingArgs, run: TrackedRun) -> list[Tracker]:
    """The chosen trackers."""
    return [tracker(run) for name, tracker in TRACKERS.items() if getattr(args, name)]


def log_to(trackers: list[Tracker], line: Mapping[str, Any]) -> None:
    """Passes a line of metrics.jsonl to trackers; drops those that fail, with a warning."""
    for tracker in list(trackers):
        try:
            tracker.log(line["step"], line["split"], finite_values(line))
        except Exception as error:
            trackers.remove(tracker)
            print(
                f"warning: {type(tracker).__name__} failed and is no longer used ({error_reason(error)}); training continues, "
                "and metrics.jsonl is complete",
                file=sys.stderr,
            )


def close_all(trackers: list[Tracker], failed: bool) -> None:
    """Closes trackers; a failure is only a warning."""
    while trackers:
        tracker = trackers.pop()
        try:
            tracker.close(failed)
        except Exception as error:
            print(f"warning: {type(tracker).__name__} could not be closed ({error_reason(error)})", file=sys.stderr)


def finite_values(line: Mapping[str, Any]) -> dict[str, float]:
    """The values of a line of metrics.jsonl, in which null stands for a value that is missing or not finite."""
    return {name: value for name, value in line.items() if name not in ("step", "split") and value is not None}


def tagged_values(line: Mapping[str, Any]) -> dict[str, float]:
    """The values of a line by tag, such as "train/loss"."""
    return {f"{line['split']}/{name}": value for name, value in finite_values(line).items()}

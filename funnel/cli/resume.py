"""The arguments of train.py or pretrain.py when they resume a run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funnel.cli.common import flag
from funnel.data.tasks import get_task
from funnel.errors import FunnelError
from funnel.io import RUN_FILE
from funnel.model.config import parse_blocks
from funnel.training.run_dir import MAY_CHANGE, read_arguments


def resumed_arguments(options: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the run in `given["out"]`, updated with those given.

    Args:
        options: the dataclass of the arguments.
        given: the flags of the command line.

    Raises:
        FunnelError: there is no run, or a given argument differs from the run's and is not in `MAY_CHANGE`.
    """
    folder = given["out"]
    if os.environ.get("RANK", "0") != "0" and not (Path(folder) / RUN_FILE).is_file():
        return dict(given)  # a rank on another machine, which gets its arguments from rank 0
    stored = read_arguments(folder, options)
    for name, value in given.items():
        old = stored.get(name, getattr(options, name))
        if name not in MAY_CHANGE and _canonical(name, value) != _canonical(name, old):
            raise FunnelError(
                f"{flag(name)} {value}: {folder} was started with {'the default' if old is None else old}; "
                f"omit {flag(name)} to resume it, or start a new run from its weights with --weights {folder}"
            )
    return {**stored, **given}


def _canonical(name: str, value: Any) -> Any:
    """A value of an argument that is equal for equivalent values."""
    if value is None:
        return None
    if name in ("weights", "teacher") or isinstance(value, Path):
        return os.path.realpath(value)  # a hub id is resolved, too, which does no harm
    if name == "blocks":
        return parse_blocks(value)
    return get_task(value).name if name == "task" else value

"""Dataclass fields with help text: the command line generates its flags from them (`funnel.cli.common`)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from funnel.errors import FunnelError


def option(default: Any, help: str, *, choices: Sequence[str] | None = None, metavar: str | None = None) -> Any:
    """A dataclass field with a default, a help text and, optionally, a closed set of values."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar})


def check_option(options: Any, name: str, is_valid: Callable[[Any], bool], expected: str) -> None:
    """Raises FunnelError if a field is set (not None) and invalid; the message ends in "expected ..."."""
    value = getattr(options, name)
    if value is not None and not is_valid(value):
        raise FunnelError(f"invalid {name} {value}: expected {expected}", name)

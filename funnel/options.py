"""Dataclass fields with help text and bounds; `funnel.cli.common` generates flags from them."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

from funnel.errors import FunnelError

RANDOM = "none"  # the value of `weights` for random weights
TINY = "tiny"  # the value of `weights` for the small pretrained model in the package


def option(
    default: Any, help: str, *, bounds: str | None = None, choices: Sequence[str] | None = None, metavar: str | None = None
) -> Any:
    """A dataclass field with help text.

    Args:
        bounds: an interval such as "(0, 1]" or "[1, inf)" for a number.
        choices: the values allowed for a string.
    """
    metadata = {"help": help, "bounds": bounds, "choices": choices, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


def option_types(options: type) -> dict[str, type]:
    """The type of each field of a dataclass, without None."""
    kinds = typing.get_type_hints(options)
    for name, kind in kinds.items():
        if isinstance(kind, types.UnionType):  # X | None
            kinds[name] = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    return kinds


def check_options(options: Any) -> None:
    """Checks the fields of a dataclass that are not None against their bounds and choices.

    Raises:
        FunnelError: the first invalid field.
    """
    for field in dataclasses.fields(options):
        value, bounds, choices = getattr(options, field.name), field.metadata["bounds"], field.metadata["choices"]
        if value is None:
            continue
        if choices and value not in choices:
            raise FunnelError(f"invalid {field.name} {value!r}: choose from {', '.join(choices)}", field.name)
        if bounds and not _contains(bounds, value):
            kind = "an integer" if isinstance(value, int) else "a number"
            raise FunnelError(f"invalid {field.name} {value}: expected {kind} in {bounds}", field.name)


def _contains(bounds: str, value: float) -> bool:
    low, high = (float(bound) for bound in bounds[1:-1].split(","))
    above = value >= low if bounds[0] == "[" else value > low
    below = value <= high if bounds[-1] == "]" else value < high
    return above and below

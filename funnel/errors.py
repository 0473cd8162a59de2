"""Exceptions that commands report on one line instead of with a traceback, and helpers for messages."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NoReturn

MAX_MESSAGE_LENGTH = 1000  # characters; a longer message is shortened in the middle
MAX_WAIT = 10  # seconds for another rank to print an error


class FunnelError(ValueError):
    """Invalid input: one line that says what is wrong, where, and what to do about it.

    Args:
        message: should contain the name of `parameter`, if given.
        parameter: the function parameter or dataclass field that has the invalid value. The command line replaces its
            name in the message with the flag.
    """

    def __init__(self, message: str, parameter: str | None = None) -> None:
        if len(message) > MAX_MESSAGE_LENGTH:
            message = f"{message[: MAX_MESSAGE_LENGTH // 2]} … {message[-MAX_MESSAGE_LENGTH // 2 :]}"
        super().__init__(message)
        self.parameter = parameter


class StoppedBySignal(Exception):
    """A signal ended the command after it had saved its state.

    Args:
        signum: the signal's number.
        message: how to continue.
    """

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.signum = signum


def error_reason(error: BaseException) -> str:
    """An error's message on one line of at most 200 characters, to be quoted in another message."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def format_list(names: Iterable[str], limit: int = 20) -> str:
    """Joins names with commas; beyond `limit`, the rest is counted: "a, b, c and 5 more"."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def plural(count: int, noun: str) -> str:
    """ "1 text", "1,200 texts"; a noun in -s or -x gets "es"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{'es' if noun.endswith(('s', 'x')) else 's'}"


def shorten(text: str, length: int) -> str:
    """The text on one line, cut to a number of characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


@contextlib.contextmanager
def requires_extra(extra: str, purpose: str, parameter: str | None = None) -> Iterator[None]:
    """Raises FunnelError instead of the ImportError of a package that belongs to an extra of pyproject.toml.

    Args:
        purpose: what needs it, at the start of the message.
    """
    try:
        yield
    except ImportError as error:
        install = f"run pip install 'funnel-transformer[{extra}]'"
        raise FunnelError(f"{purpose} needs the extra {extra} ({error_reason(error)}); {install}", parameter) from None


def exit_silently(status: int) -> NoReturn:
    """Ends a rank whose error another rank prints.

    torchrun ends all ranks as soon as one has failed, so this one waits for that; else the other might not get to print.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(MAX_WAIT)
    raise SystemExit(status)

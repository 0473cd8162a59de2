"""What ends a command: a mistake in what was given, a signal; and with which exit status."""

import argparse
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

LONGEST = 1000  # letters of a message


class FunnelError(ValueError):
    """Something that the user gave is wrong: the message names the thing, the place and the way out, in one line.

    A message that quotes something long is shortened in its middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= LONGEST else f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}")


class Stopped(Exception):
    """A run was stopped by a signal, and has saved what it had.

    Args:
        number: of the signal.
        message: what to say.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with the docstring of the command as it is, and a mistake told in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; --help lists what it takes\n")


def one_line(error: BaseException) -> str:
    """An error's message on one line, for the inside of another one."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def listed(names: Iterable[str], most: int = 20) -> str:
    """ "a, b, c and 5 more": names with commas between them, the first ones where they are many."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def exit_status(program: str, run: Callable[[], object], stopped: str, debug: bool = False) -> int:
    """Runs a command and returns its exit status.

    0 when it is done; 2 after a FunnelError or an error of the system (told in one line); 128 + the signal's number after a
    signal: 130 after Ctrl-C, 143 after SIGTERM, 141 where the reader of standard output is gone.

    Args:
        program: the command's name, before messages.
        stopped: what to say after Ctrl-C.
        debug: let errors through, with their traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale without a text's letters does not stop the command
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(
                f"{program}: warning: {' '.join(str(message).split())}", file=sys.stderr
            )
            run()
        sys.stdout.flush()
    except (FunnelError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            _discard_output()
            return 128 + signal.SIGPIPE
        if debug:
            raise
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        _discard_output()
        return 2
    except Stopped as stop:
        print(f"{program}: stopped; {str(stop) or stopped}", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print(f"{program}: stopped; {stopped}", file=sys.stderr)
        return 128 + signal.SIGINT
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _discard_output() -> None:
    """Has what standard output cannot take dropped, so that the interpreter's end does not fail on it again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

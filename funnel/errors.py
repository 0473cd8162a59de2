"""The one exception type that a user's mistake raises, and how commands end on it."""

import sys
from collections.abc import Callable


class FunnelError(ValueError):
    """Something that the user gave is wrong: the message names the thing, the place and the way out, in one line."""


def one_line(error: BaseException) -> str:
    """An error's message on one line, for the inside of another one."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def exit_status(program: str, run: Callable[[], object], stopped: str) -> int:
    """Runs a command and returns its exit status: 0, 2 after a FunnelError (told in one line), 130 after Ctrl-C.

    Args:
        program: the command's name, before messages.
        stopped: what to say after Ctrl-C.
    """
    try:
        run()
    except FunnelError as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: stopped; {stopped}", file=sys.stderr)
        return 130
    return 0

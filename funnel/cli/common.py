"""Shared by all commands: parsers generated from dataclasses, one-line error messages, exit statuses."""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import shlex
import signal
import sys
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from funnel.errors import FunnelError, StoppedBySignal, exit_silently

Options = TypeVar("Options")


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with the description printed as written and errors on one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def flag(name: str) -> str:
    """The flag of a field or parameter: "batch_size" -> "--batch-size"."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Adds one flag for each field that a dataclass defines with `funnel.options.option`, inherited ones included."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # X | None
            kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
        help_text = field.metadata["help"]
        if kind is bool:
            parser.add_argument(flag(field.name), action="store_true", help=help_text)
            continue
        if field.default is not None:
            help_text += " (default: %(default)s)"
        metavar = field.metadata["metavar"] or {int: "N", float: "X", Path: "PATH"}.get(kind)
        values = {"choices": field.metadata["choices"], "metavar": metavar}
        parser.add_argument(flag(field.name), type=kind, default=field.default, help=help_text, **values)


def run_script(options: type[Options], work: Callable[[Options, str], object], arguments: Sequence[str] | None) -> int:
    """Parses a script's command line into a dataclass, calls `work` with it and the command, returns the exit status.

    The help text is the docstring of the module that defines `work`.

    Args:
        options: a dataclass of options with the fields `debug` and whatever `work` needs.
        arguments: default: those of the process.
    """
    program = Path(sys.argv[0]).name if arguments is None else work.__module__ + ".py"
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = command_line(program, given, is_process=arguments is None)
    debug = "--debug" in given
    description = sys.modules[work.__module__].__doc__

    def run() -> None:
        if os.environ.get("RANK", "0") == "0":
            work(parse_options(options, given, program, description), command)
            return
        try:
            with contextlib.redirect_stderr(None):  # rank 0 prints the message
                args = parse_options(options, given, program, description)
        except (FunnelError, SystemExit) as error:
            if isinstance(error, SystemExit) and not error.code:  # after --help
                raise
            exit_silently(2)
        work(args, command)

    return run_command(program, run, debug=debug)


def command_line(program: str, arguments: Sequence[str], is_process: bool) -> str:
    """The command line that reruns this process; in torchrun's workers, that of torchrun."""
    if not is_process:
        return shlex.join(["python", program, *arguments])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return shlex.join(["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], sys.argv[0], *arguments])
    return shlex.join(sys.orig_argv)


def parse_options(
    options: type[Options], arguments: Sequence[str], program: str | None = None, description: str | None = None
) -> Options:
    """Parses a command line into a dataclass.

    Raises:
        FunnelError: from the dataclass's `__post_init__`.
        SystemExit: a flag is unknown or has a value of the wrong type, or after --help.
    """
    parser = ArgumentParser(prog=program, description=description, allow_abbrev=False)
    add_options(parser, options)
    return options(**vars(parser.parse_args(arguments)))


def run_command(program: str, run: Callable[[], object], *, on_interrupt: str = "", debug: bool = False) -> int:
    """Runs a command and returns its exit status.

    0: success. 1: another process of a distributed run failed. 2: a FunnelError or OSError, printed on one line.
    128 + n: stopped by signal n (130 after Ctrl-C, 143 after SIGTERM, 141 if the reader of standard output has exited).

    Args:
        program: the command's name, printed before messages.
        on_interrupt: what to print after Ctrl-C.
        debug: let errors propagate, with their traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the locale may not support all characters
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
        print(f"{program}: error: {_with_flag(error)}", file=sys.stderr)
        _discard_output()
        return 2
    except StoppedBySignal as stop:
        print(f"{program}: stopped; {str(stop) or on_interrupt}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print(f"{program}: stopped{on_interrupt and f'; {on_interrupt}'}", file=sys.stderr)
        return 128 + signal.SIGINT
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _with_flag(error: Exception) -> str:
    """An error's message on one line, the name of its parameter replaced with the flag."""
    message = " ".join(str(error).split())
    if not isinstance(error, FunnelError) or error.parameter is None:
        return message
    name = error.parameter
    renamed, count = re.subn(rf"(?<![\w-]){name}(?!\w)", flag(name), message, count=1)
    return renamed if count else f"{flag(name)}: {message}"


def _discard_output() -> None:
    """Discards output that cannot be written, so that the interpreter does not fail at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

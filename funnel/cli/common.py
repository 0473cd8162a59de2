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
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import funnel.threads  # noqa: F401  (sets OpenMP's environment variables before a command imports torch)
from funnel.errors import FunnelError, StoppedBySignal, exit_silently
from funnel.io import LOG_FILE, RUN_FILE
from funnel.options import option_types

Options = TypeVar("Options")


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with the description printed as written and errors on one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


class StoreTuple(argparse.Action):
    """Stores the values of a flag as a tuple; those of a repeated flag are added."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *values))


def flag(name: str) -> str:
    """The flag of a field or parameter: "batch_size" -> "--batch-size"."""
    return "--" + name.replace("_", "-")


@contextlib.contextmanager
def positional(name: str) -> Iterator[None]:
    """Removes a parameter from errors, so that no flag is named: the command has a positional argument for it."""
    try:
        yield
    except FunnelError as error:
        raise FunnelError(str(error), None if error.parameter == name else error.parameter) from None


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Adds one flag for each field that a dataclass defines with `funnel.options.option`, inherited ones included.

    Defaults stay in the dataclass, so the result contains only the flags that were given.
    """
    kinds = option_types(options)
    for field in dataclasses.fields(options):
        kind, help_text = kinds[field.name], field.metadata["help"]
        if kind is bool:
            parser.add_argument(flag(field.name), action="store_true", help=help_text)
            continue
        if field.default not in (None, ()):
            help_text += f" (default: {field.default})"
        metavar = field.metadata["metavar"] or {int: "N", float: "X", Path: "PATH"}.get(kind)
        if typing.get_origin(kind) is tuple:  # tuple[X, ...]: one or more values
            item = typing.get_args(kind)[0]
            parser.add_argument(flag(field.name), type=item, nargs="+", action=StoreTuple, metavar=metavar, help=help_text)
            continue
        parser.add_argument(flag(field.name), type=kind, choices=field.metadata["choices"], metavar=metavar, help=help_text)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that `check_output` suggests."""
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")


def check_output(path: Path, parameter: str, inputs: Sequence[Path] = (), overwrite: bool = False) -> None:
    """Checks a file to be written, before any work is done.

    Args:
        parameter: the one that contains the path, for the error message.
        inputs: files that must not be replaced, even with `overwrite`.
        overwrite: whether an existing file may be replaced.

    Raises:
        FunnelError: the path is one of the inputs, exists without `overwrite`, is not a regular file, or its folder is not
            writable.
    """
    real = Path(os.path.realpath(path))  # resolves "missing/..", too
    if not os.path.exists(real):
        existing = next(folder for folder in real.parents if os.path.exists(folder))
        if not os.path.isdir(existing) or not os.access(existing, os.W_OK):
            raise FunnelError(f"{parameter} {path}: {existing} is not a writable folder; choose another one", parameter)
        return
    if any(os.path.exists(file) and os.path.samefile(real, file) for file in inputs):
        raise FunnelError(f"{parameter} {path}: this command reads the file; choose another name", parameter)
    if not os.path.isfile(real):
        kind = "a folder" if os.path.isdir(real) else "a pipe or device"
        raise FunnelError(f"{parameter} {path}: expected a file to write, found {kind}", parameter)
    if not overwrite:
        raise FunnelError(f"{parameter} {path}: already exists; choose another name, or add --overwrite", parameter)


def files_of_run(folder: Path) -> list[Path]:
    """The files of a run or checkpoint folder that no output may replace."""
    names = (
        RUN_FILE,
        LOG_FILE,
        "layout_plan.json",
        "config.json",
        "tokenizer.json",
        "checksums.json",
        "evaluation.json",
    )
    return [*(folder / name for name in names), *folder.glob("best/*"), *folder.glob("last*/*")]


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Pads cells to columns: the first one left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        aligned = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


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
    """Parses a command line into a dataclass. With --resume, the run in --out has the arguments that are not given.

    Raises:
        FunnelError: from the dataclass's `__post_init__`, or the run cannot be resumed with these arguments.
        SystemExit: a flag is unknown or has a value of the wrong type, or after --help.
    """
    parser = ArgumentParser(prog=program, description=description, allow_abbrev=False,
                            argument_default=argparse.SUPPRESS)  # fmt: skip
    add_options(parser, options)
    given = vars(parser.parse_args(arguments))
    if {"resume", "out"} <= given.keys():
        from funnel.cli.resume import resumed_arguments  # imports torch

        given = resumed_arguments(options, given)
    return options(**given)


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
    renamed, count = re.subn(rf"(?<![\w./'-]){name}(?![\w/]|\.\w)", flag(name), message, count=1)
    return renamed if count else f"{flag(name)}: {message}"


def _discard_output() -> None:
    """Discards output that cannot be written, so that the interpreter does not fail at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

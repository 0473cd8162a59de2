"""The `funnel` command: subcommands, argument errors, exit statuses."""

import re
import subprocess
import sys
import warnings

import pytest
from conftest import ROOT

from funnel.cli.common import run_command
from funnel.cli.main import main
from funnel.errors import FunnelError

COMMANDS = ["layout", "sweep", "predict", "submit", "explain", "report", "convert"]


def run_funnel(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "funnel", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_lists_all_commands(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert re.findall(r"^funnel (\w+)", output, re.MULTILINE) == COMMANDS
    assert re.findall(r"^    (\w+)  ", output, re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("arguments", [("--help",), *((command, "--help") for command in COMMANDS), ("predict", "--oops")])
def test_help_and_argument_errors_do_not_import_torch(arguments):
    script = f"""
import sys
from funnel.cli.main import main
try:
    main({list(arguments)!r})
except SystemExit as end:
    assert not {{"torch", "numpy", "tokenizers", "matplotlib"}} & sys.modules.keys(), "heavy import"
    sys.exit(end.code)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("layout", "--colour"), "unrecognized arguments: --colour"),
        (("predict",), "required: RUN;"),
        ((), "required: COMMAND"),
        (("unknown",), "invalid choice: 'unknown'"),
        (("convert", "here"), "required: OUT"),
    ],
)
def test_invalid_arguments_print_one_line_and_exit_with_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_only_debug_shows_a_traceback(capsys):
    assert main(["layout", "--blocks", "x"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(FunnelError, match="'x'"):
        main(["--debug", "layout", "--blocks", "x"])


@pytest.mark.slow
def test_full_disk_is_reported_on_one_line():
    full = subprocess.run(
        f"{sys.executable} -m funnel layout > /dev/full", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert full.returncode == 2
    assert full.stderr == "funnel: error: [Errno 28] No space left on device\n"


@pytest.mark.slow
def test_closed_stdout_exits_silently():
    """As when `head` closes the pipe."""
    command = [sys.executable, "-m", "funnel", "layout"]
    script = f"import os, subprocess; r, w = os.pipe(); os.close(r); print(subprocess.run({command}, stdout=w).returncode)"
    closed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (closed.stdout, closed.stderr) == ("141\n", "")


def test_module_runs_the_command():
    done = run_funnel("layout", "--oops")
    assert done.returncode == 2
    assert done.stderr == "funnel: error: unrecognized arguments: --oops; see --help\n"


def test_warnings_are_printed_on_one_line(capsys):
    assert run_command("x", lambda: warnings.warn("something\nodd", stacklevel=2)) == 0
    assert capsys.readouterr().err == "x: warning: something odd\n"

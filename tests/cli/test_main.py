"""The `funnel` command: subcommands, argument errors, exit statuses."""

import os
import re
import subprocess
import sys
import warnings

import pytest
from conftest import ROOT

import convert_weights
import train
from funnel.cli.common import check_output, run_command
from funnel.cli.main import main
from funnel.errors import FunnelError

COMMANDS = ["layout", "sweep", "predict", "evaluate", "submit", "explain", "serve", "report", "card", "convert"]


def run_funnel(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "funnel", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_lists_all_commands(capsys):
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert re.findall(r"^funnel (\w+)", output, re.MULTILINE) == COMMANDS
    assert re.findall(r"^    (\w+)  ", output, re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("arguments", [("--help",), *((command, "--help") for command in COMMANDS), ("predict", "--oops")])
def test_help_and_argument_errors_do_not_import_torch(arguments):
    script = f"""
import sys
from funnel.cli.main import main
status = main({list(arguments)!r})
assert not {{"torch", "numpy", "tokenizers", "matplotlib"}} & sys.modules.keys(), "heavy import"
sys.exit(status)
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
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_only_debug_shows_a_traceback(capsys):
    assert main(["layout", "--blocks", "x"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(FunnelError, match="'x'"):
        main(["--debug", "layout", "--blocks", "x"])
    with pytest.raises(FunnelError, match="'x'"):
        main(["layout", "--debug", "--blocks", "x"])


@pytest.mark.parametrize("run", [main, train.main, convert_weights.main])
def test_usage_errors_and_help_return_the_exit_status(run, capsys):
    assert run(["--oops"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert run(["--help"]) == 0


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_an_existing_output_is_replaced_only_with_overwrite(tmp_path):
    path = tmp_path / "out.csv"
    check_output(path, "out")
    path.write_text("mine")
    with pytest.raises(FunnelError, match="already exists; choose another name, or add --overwrite"):
        check_output(path, "out")
    check_output(path, "out", overwrite=True)


@pytest.mark.parametrize("name", ["in.csv", "missing/../in.csv", "link.csv", "hard.csv"])
def test_an_input_is_never_replaced(name, tmp_path):
    source = tmp_path / "in.csv"
    source.touch()
    (tmp_path / "link.csv").symlink_to(source)
    (tmp_path / "hard.csv").hardlink_to(source)
    with pytest.raises(FunnelError, match="this command reads the file"):
        check_output(tmp_path / name, "out", [tmp_path / "other.csv", source], overwrite=True)


@pytest.mark.parametrize(("name", "message"), [(".", "found a folder"), ("pipe", "found a pipe or device"),
                                               ("file/out.csv", "file is not a writable folder")])  # fmt: skip
def test_an_output_must_be_a_regular_file_in_a_folder(name, message, tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FunnelError, match=message):
        check_output(tmp_path / name, "out", overwrite=True)


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


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("invalid problem 'x': choose from …", "invalid --problem 'x': choose from …"),
        ("/data/problem/problem.csv: pass problem=regression", "/data/problem/problem.csv: pass --problem=regression"),
        ("problem/x.csv: set problem", "problem/x.csv: set --problem"),
        ("no label 'problem' in x", "--problem: no label 'problem' in x"),
    ],
)
def test_the_flag_replaces_the_parameter_and_not_a_part_of_a_path(message, printed, capsys):
    def fail() -> None:
        raise FunnelError(message, "problem")

    assert run_command("train.py", fail) == 2
    assert capsys.readouterr().err == f"train.py: error: {printed}\n"

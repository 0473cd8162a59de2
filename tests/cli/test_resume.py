"""The arguments of train.py when it resumes a run: those of the run, unless a flag that may change is given."""

import json

import pytest

from funnel.cli.common import parse_options
from funnel.errors import FunnelError
from train import TrainArgs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of a run in runs/a, whose arguments differ from the defaults."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "weights").mkdir()
    arguments = {"data": str(tmp_path / "x.csv"), "weights": str(tmp_path / "weights"), "blocks": "2,2", "lr": 1e-3}
    arguments |= {"epochs": 2, "batch_size": 8, "compile": True, "eval_every": None, "log_every": 5}
    record = {"version": 3, "command": "x", "settings": {"steps": 12}, "arguments": arguments}
    (tmp_path / "runs/a/run.json").write_text(json.dumps(record))
    return tmp_path


def resume(*arguments):
    return parse_options(TrainArgs, ["--resume", "--out", "runs/a", *arguments])


def test_all_arguments_come_from_the_run(folder):
    args = resume()
    assert (args.data, args.weights, args.blocks) == (folder / "x.csv", str(folder / "weights"), "2,2")
    assert (args.lr, args.epochs, args.batch_size, args.compile, args.seed) == (1e-3, 2, 8, True, 0)


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (("--epochs", "4"), "epochs", 4),
        (("--log-every", "1"), "log_every", 1),
        (("--device", "cpu"), "device", "cpu"),
        (("--text-column", "review"), "text_column", "review"),
    ],
)
def test_some_flags_may_change(arguments, field, value, folder):
    assert getattr(resume(*arguments), field) == value


@pytest.mark.parametrize(
    "arguments",
    [
        ("--lr", "0.001"),
        ("--weights", "weights"),
        ("--weights", "runs/../weights"),
        ("--blocks", "2x1,2"),
        ("--data", "elsewhere/y.csv"),
        ("--seed", "0"),
        ("--compile",),
    ],
)
def test_equivalent_values_are_accepted(arguments, folder):
    assert resume(*arguments).lr == 1e-3


@pytest.mark.parametrize(
    ("arguments", "old"),
    [
        (("--lr", "0.002"), "0.001"),
        (("--blocks", "2,2,2"), "2,2"),
        (("--weights", "runs"), "weights"),
        (("--eval-every", "7"), "the default"),
        (("--layout-plan", "plan.json"), "the default"),
    ],
)
def test_other_values_are_an_error_that_says_what_to_do(arguments, old, folder):
    with pytest.raises(FunnelError) as error:
        resume(*arguments)
    name, new = arguments
    message = str(error.value)
    assert message.startswith(f"{name} {new}: runs/a was started with ")
    assert old in message
    assert f"omit {name}" in message
    assert "--weights runs/a" in message
    assert "\n" not in message


def test_a_folder_without_a_run_is_an_error(folder):
    with pytest.raises(FunnelError, match="no run in weights"):
        parse_options(TrainArgs, ["--resume", "--out", "weights"])


def test_a_rank_that_has_no_run_folder_waits_for_the_arguments_of_rank_0(folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert parse_options(TrainArgs, ["--resume", "--out", "elsewhere"]).lr is None

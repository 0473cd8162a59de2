"""`funnel sweep`: plans every combination once, skips finished runs, resumes unfinished ones."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

import train
from funnel.analysis.onnx_report import load_dev_set
from funnel.analysis.runs import read_run
from funnel.cli import sweep
from funnel.cli.main import main
from funnel.cli.sweep import FINISHED, NEW, STARTED, PlannedRun, SweepArgs, check_runs, plan_runs, run_state
from funnel.errors import FunnelError
from funnel.weights.load import read_source, resolve

TRAIN = ("--script", str(ROOT / "train.py"))
QUICK = (*TRAIN, "--data", "train.tsv", "--weights", "none", "--batch-size", "8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a small data set."""
    rows = "".join(f"{word} film {i}\t{label}\n" for i in range(40) for word, label in (("good", 1), ("bad", 0)))
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- planning ---------------------------------------------------------------------------------------------------------


def test_plans_every_combination_once_ordered_by_seed(tmp_path):
    args = SweepArgs(tmp_path, ["2,2", "1"], ["identity", "copy"], ["1e-5", "2e-5"], 2, None, ["--epochs", "1"])
    runs = plan_runs(args)
    assert len({run.folder for run in runs}) == len({tuple(run.arguments) for run in runs}) == 16
    assert runs[0].folder.name == "2-2_identity_1e-5_seed0"
    assert runs[0].arguments == ["--blocks", "2,2", "--init", "identity", "--lr", "1e-5", "--seed", "0", "--epochs", "1"]
    assert [run.folder.name[-1] for run in runs] == ["0"] * 8 + ["1"] * 8


def test_plans_every_combination_once_per_fold(tmp_path):
    runs = plan_runs(SweepArgs(tmp_path, blocks=["2,2", "1"], n_seeds=2, n_folds=3, train_arguments=["--data", "x.csv"]))
    names = [run.folder.name for run in runs]
    assert names[:3] == ["2-2_fold1of3_seed0", "1_fold1of3_seed0", "2-2_fold2of3_seed0"]
    assert len(set(names)) == 2 * 2 * 3
    assert runs[2].arguments == ["--blocks", "2,2", "--fold", "2/3", "--seed", "0", "--data", "x.csv"]


def test_plans_equal_values_once(tmp_path):
    assert len(plan_runs(SweepArgs(tmp_path, learning_rates=["2e-4", "0.0002", "1e-4"]))) == 2
    assert len(plan_runs(SweepArgs(tmp_path, blocks=["2,2", "2,2", "2x1,2", "2_2"]))) == 1


def test_plans_one_run_with_default_settings(tmp_path):
    assert plan_runs(SweepArgs(tmp_path)) == [PlannedRun(tmp_path / "seed0", ["--seed", "0"])]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blocks": ["2,x"]}, "2,x"),
        ({"inits": ["identity", "other"]}, "invalid --init 'other'"),
        ({"learning_rates": ["1e-5", "fast"]}, "invalid --lr 'fast'"),
        ({"learning_rates": ["1e-5", "nan"]}, "invalid --lr 'nan'"),
        ({"learning_rates": ["0"]}, "invalid --lr '0'"),
        ({"n_seeds": 0}, "invalid --seeds 0"),
        ({"n_folds": 1}, "invalid --folds 1"),
        ({"train_arguments": ["--fold", "1/2"]}, "--fold is set by the sweep"),
        ({"train_arguments": ["--seed", "3"]}, "--seed is set by the sweep"),
        ({"train_arguments": ["--out=x"]}, "--out is set by the sweep"),
    ],
)
def test_invalid_arguments_are_rejected_before_training(values, message, tmp_path):
    with pytest.raises(FunnelError, match=message):
        plan_runs(SweepArgs(tmp_path, **values))


def test_seed_is_not_an_abbreviation_of_seeds(folder, capsys):
    (folder / "train.py").write_text("raise SystemExit(1)")
    assert main(["sweep", "--seed", "3", "--out", "s"]) == 2
    assert "--seed is set by the sweep" in capsys.readouterr().err


def test_a_missing_script_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep"]) == 2
    assert "--script train.py: no such file" in capsys.readouterr().err
    assert main(["sweep", "--script", "my/train.py"]) == 2
    assert "--script my/train.py: no such file" in capsys.readouterr().err


def test_the_extra_of_the_report_is_required_before_the_first_run(folder, monkeypatch, capsys):
    monkeypatch.setattr("funnel.cli.sweep.run_training", None)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["sweep", "--out", "s", *QUICK]) == 2
    assert "the report needs the extra report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lr", "1e-4,5000"), "--lr 5000.0: expected a number in"),
        (("--epoch", "3"), "unrecognized arguments: --epoch 3"),
        (("--epochs", "-1"), "invalid --epochs -1.0"),
        (("--warmup", "fast"), "invalid float value: 'fast'"),
        (("--out", "train.tsv"), "--out train.tsv: expected a folder for the runs, found a file"),
        (("--folds", "3", "--dev-share", "0.2"), "--fold cannot be combined with a dev file or share"),
    ],
)
def test_the_scripts_arguments_are_checked_before_the_first_run(arguments, message, folder, monkeypatch, capsys):
    monkeypatch.setattr("funnel.cli.sweep.run_training", None)
    assert main(["sweep", "--out", "s", *QUICK, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_other_scripts_check_their_arguments_themselves(tmp_path):
    for content in ("raise AssertionError", "class TrainArgs:\n    pass\nraise AssertionError"):  # no __main__ guard
        (tmp_path / "train.py").write_text(content)
        check_runs([PlannedRun(tmp_path, ["--anything"])], tmp_path / "train.py")


# --- state of a run ---------------------------------------------------------------------------------------------------


def record(run: PlannedRun, command: list[str]) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "run.json").write_text(json.dumps({"version": 2, "command": " ".join(command), "settings": {}}))


def test_state_of_a_run(tmp_path, monkeypatch):
    run = PlannedRun(tmp_path / "run", ["--seed", "0", "--epochs", "1"])
    command = ["python", "/some/train.py", *run.arguments, "--out", str(run.folder)]
    assert run_state(run, ROOT / "train.py") == NEW
    record(run, command)
    assert run_state(run, ROOT / "train.py") == STARTED  # not evaluated yet
    for is_finished, expected in ((True, FINISHED), (False, STARTED)):
        monkeypatch.setattr("funnel.analysis.runs.read_run", lambda _, it=is_finished: type("Run", (), {"is_finished": it}))
        assert run_state(run, ROOT / "train.py") == expected


@pytest.mark.parametrize(
    "command",
    [
        ["python", "train.py", "--seed", "1", "--epochs", "1", "--out", "{}"],
        ["python", "train.py", "--lr", "1", "--seed", "0", "--epochs", "1", "--out", "{}"],
        ["python", "other.py", "--seed", "0", "--epochs", "1", "--out", "{}"],
        ["--seed", "0", "--epochs", "1", "--out", "{}"],
        [],
    ],
)
def test_a_folder_with_another_run_is_an_error(command, tmp_path):
    run = PlannedRun(tmp_path / "run", ["--seed", "0", "--epochs", "1"])
    record(run, [argument.format(run.folder) for argument in command])
    with pytest.raises(FunnelError, match="has a run with different arguments"):
        run_state(run, ROOT / "train.py")


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_finished_runs_are_skipped_and_new_seeds_are_added(folder, capfd):
    pytest.importorskip("jinja2", reason="needs the extra report")
    arguments = ["sweep", "--out", "s", "--blocks", "1,1", "--blocks", "1", *QUICK, "--epochs", "0.5"]
    assert main(arguments) == 0
    output = capfd.readouterr().out
    assert "2 runs in s, 0 of them finished" in output
    assert "| train.tsv | 1,1 | identity |" in output
    logs = {path: path.stat().st_mtime_ns for path in (folder / "s").rglob("metrics.jsonl")}
    assert len(logs) == 2
    assert main([*arguments, "--seeds", "2"]) == 0
    assert "4 runs in s, 2 of them finished" in capfd.readouterr().out
    assert logs == {path: path.stat().st_mtime_ns for path in logs}
    assert main([*arguments[:-1], "0.6"]) == 2
    assert "different arguments" in capfd.readouterr().err


@pytest.mark.slow
def test_cross_validation_evaluates_each_example_once_and_reports_mean_and_deviation(folder, monkeypatch, capsys):
    pytest.importorskip("jinja2", reason="needs the extra report")
    monkeypatch.setattr(sweep, "run_training", lambda script, arguments: train.main(list(arguments)))
    quick = ["--data", "train.tsv", "--weights", "none", "--steps", "3", "--max-length", "8", "--device", "cpu"]
    assert main(["sweep", "--folds", "3", "--blocks", "1", "--out", "s", *TRAIN, *quick]) == 0
    runs = [read_run(folder / f"s/1_fold{k}of3_seed0") for k in (1, 2, 3)]
    assert sum(run.settings["dev_examples"] for run in runs) == 80
    assert all(run.settings["dev_examples"] + run.settings["train_examples"] == 80 for run in runs)
    dev_sets = [load_dev_set(read_source(resolve(str(run.folder)))).dataset for run in runs]  # read again, from run.json
    assert len(np.unique(np.concatenate([dataset.hashes for dataset in dev_sets]))) == 80
    final = [100 * run.final["accuracy"] for run in runs]
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| train.tsv |"))
    assert f"| 3 folds | accuracy {np.mean(final):.1f} ± {np.std(final, ddof=1):.1f} |" in row
    assert main(["report", "s"]) == 0
    assert row in capsys.readouterr().out


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others(folder, capfd):
    pytest.importorskip("jinja2", reason="needs the extra report")
    (folder / "s").mkdir()
    (folder / "s/1_seed0").write_text("a file where the run's folder should be")
    assert main(["sweep", "--out", "s", "--blocks", "1", "--blocks", "1,1", *QUICK, "--epochs", "0.2"]) == 2
    captured = capfd.readouterr()
    assert "1 of 2 runs failed: 1_seed0" in captured.err
    assert "wrote" in captured.out


@pytest.mark.slow
def test_an_interrupted_sweep_saves_its_run_and_continues(folder):
    pytest.importorskip("jinja2", reason="needs the extra report")
    command = [sys.executable, "-m", "funnel", "sweep", "--out", "s", "--blocks", "1,1", *QUICK, "--epochs", "20"]
    command += ["--eval-every", "20", "--save-every", "1000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    log = folder / "s/1-1_seed0/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and '"dev"' in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, error
    assert "Traceback" not in error
    assert "rerun the same command to continue" in error
    assert (folder / "s/1-1_seed0/last/training_state.pt").is_file()
    n_lines = len(log.read_text().splitlines())
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) > n_lines
    assert len({(line["step"], line["split"]) for line in lines}) == len(lines)

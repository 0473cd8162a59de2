"""Many runs from one command: every combination once, done ones skipped, stopped ones resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from funnel.cli import sweep
from funnel.cli.main import main
from funnel.errors import FunnelError

QUICK = ("--data", "train.tsv", "--weights", "none", "--batch-size", "8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rows = "".join(f"{word} film {i}\t{label}\n" for i in range(40) for word, label in (("good", 1), ("bad", 0)))
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_combination_once_seed_after_seed(tmp_path):
    runs = sweep.plan(tmp_path, ["2,2", "1"], "identity,copy", "1e-5,2e-5", 2, ["--epochs", "1"])
    assert len({run.folder for run in runs}) == len({tuple(run.arguments) for run in runs}) == 16
    assert runs[0].folder.name == "2-2_identity_1e-5_seed0"
    assert runs[0].arguments == ["--blocks", "2,2", "--init", "identity", "--lr", "1e-5", "--seed", "0", "--epochs", "1"]
    assert [run.folder.name[-1] for run in runs] == ["0"] * 8 + ["1"] * 8
    assert len(sweep.plan(tmp_path, None, None, "2e-4,0.0002,1e-4", 1, [])) == 2
    assert sweep.plan(tmp_path, None, None, None, 1, []) == [(tmp_path / "seed0", ["--seed", "0"])]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["2,x"], None, None, 1, []), "'x' is no block"),
        ((None, "identity,other", None, 1, []), "'other'"),
        ((None, None, "1e-5,fast", 1, []), "'fast'"),
        ((None, None, None, 0, []), "--seeds 0"),
        ((None, None, None, 1, ["--seed", "3"]), "--seed: is set"),
        ((None, None, None, 1, ["--out=x"]), "--out: is set"),
    ],
)
def test_mistakes_are_found_before_anything_runs(arguments, words, tmp_path):
    with pytest.raises(FunnelError, match=words):
        sweep.plan(tmp_path, *arguments)


def test_done_runs_are_skipped_and_others_get_a_folder_of_their_own(folder, capfd):
    pytest.importorskip("jinja2", reason="needs the extra report")
    arguments = ["sweep", "--out", "s", "--blocks", "1,1", "--blocks", "1", *QUICK, "--epochs", "0.5"]
    assert main(arguments) == 0
    out = capfd.readouterr().out
    assert "2 runs in s, 0 of them done" in out
    assert "| train.tsv | 1,1 | identity |" in out
    before = {path: path.stat().st_mtime_ns for path in (folder / "s").rglob("metrics.jsonl")}
    assert len(before) == 2
    assert main([*arguments, "--seeds", "2"]) == 0
    assert "4 runs in s, 2 of them done" in capfd.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert main([*arguments[:-1], "0.6"]) == 2
    assert "other arguments" in capfd.readouterr().err


def test_a_run_that_fails_does_not_keep_others_from_theirs(folder, capfd):
    pytest.importorskip("jinja2", reason="needs the extra report")
    (folder / "s").mkdir()
    (folder / "s/1_seed0").write_text("in the way")
    assert main(["sweep", "--out", "s", "--blocks", "1", "--blocks", "1,1", *QUICK, "--epochs", "0.2"]) == 2
    found = capfd.readouterr()
    assert "1 of 2 runs failed: 1_seed0" in found.err
    assert "wrote" in found.out


def test_a_signal_saves_the_run_and_the_same_command_goes_on(folder):
    pytest.importorskip("jinja2", reason="needs the extra report")
    command = [sys.executable, "-m", "funnel", "sweep", "--out", "s", "--blocks", "1,1", *QUICK, "--epochs", "60"]
    command += ["--eval-every", "5", "--save-every", "1000"]
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
    assert (folder / "s/1-1_seed0/last/training_state.pt").is_file()
    stopped = len(log.read_text().splitlines())
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) > stopped
    assert len({(line["step"], line["split"]) for line in lines}) == len(lines)


def test_a_seed_is_not_taken_for_the_number_of_seeds(tmp_path, capsys):
    assert main(["sweep", "--seed", "3", "--out", str(tmp_path / "out")]) == 2
    assert "--seed: is set by the sweep itself" in capsys.readouterr().err

"""How long a run trains: early stopping, and steps instead of epochs."""

import json

import pytest

import train
from funnel.cli.main import main
from funnel.training.state import TrainState

METRIC = "accuracy"


def record(state, accuracy, loss=1.0, patience=None):
    state.step += 10
    return state.record_evaluation({"loss": loss, METRIC: accuracy}, METRIC, patience)


def test_patience_counts_evaluations_since_the_best_one():
    state = TrainState(total_steps=1000)
    assert [record(state, value, patience=2) for value in (0.5, 0.4, 0.6, 0.5)] == [True, False, True, False]
    assert (state.not_better, state.stopped_early, state.is_done) == (1, False, False)
    assert not record(state, 0.6, patience=2)  # equal scores are not better
    assert (state.not_better, state.stopped_early, state.is_done, state.is_finished) == (2, True, True, True)
    assert state.best["step"] == 30


def test_a_lower_loss_breaks_ties_and_resets_the_count():
    state = TrainState(total_steps=1000)
    assert record(state, 0.5, loss=1.0, patience=1)
    assert record(state, 0.5, loss=0.9, patience=1)
    assert (state.not_better, state.stopped_early) == (0, False)


def test_without_patience_a_run_does_not_stop_early():
    state = TrainState(total_steps=1000)
    for value in (0.5, 0.4, 0.3, 0.2):
        record(state, value)
    assert (state.not_better, state.stopped_early) == (3, False)


def test_nan_is_never_better():
    state = TrainState(total_steps=1000)
    assert record(state, 0.1, patience=2)
    assert not record(state, float("nan"), patience=2)
    assert state.not_better == 1


@pytest.fixture
def data(tmp_path):
    """Texts whose labels cannot be learned, so that evaluations soon stop getting better."""
    path = tmp_path / "mine.csv"
    path.write_text("text,label\n" + "".join(f"film {i % 7},{'ab'[i * i % 11 % 2]}\n" for i in range(60)))
    return path


def run_training(*arguments):
    return train.main([*map(str, arguments)])


def new_run(data, out, *arguments):
    options = ["--data", data, "--weights", "none", "--blocks", "1", "--batch-size", 8, "--out", out]
    return run_training(*options, *arguments)


def test_a_run_that_stops_early_is_finished(tmp_path, data, capsys):
    run = tmp_path / "run"
    # at this learning rate, later evaluations cannot all be better
    assert new_run(data, run, "--patience", 1, "--steps", 400, "--eval-every", 2, "--lr", "1e-2") == 0
    output = capsys.readouterr().out
    assert "stopped early: 1 evaluation without a better one" in output
    record = json.loads((run / "run.json").read_text())
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    stopped_at = max(line["step"] for line in log if line["split"] == "dev")
    assert stopped_at < 400
    assert record["settings"]["stopped_at"] == stopped_at
    assert record["settings"]["steps"] == 400
    assert not list(run.glob("last-*"))

    assert main(["report", str(run)]) == 0
    page = capsys.readouterr().out + "".join(path.read_text() for path in run.glob("*.html"))
    assert "nfinished" not in page.replace("is_finished", "")

    before = (run / "metrics.jsonl").read_text()
    assert run_training("--resume", "--out", run) == 0
    output = capsys.readouterr().out
    assert f"nothing left to do: the run has finished ({stopped_at} steps)" in output
    assert (run / "metrics.jsonl").read_text() == before

    assert run_training("--resume", "--steps", 402, "--out", run) == 0
    assert f"resumed at step {stopped_at}: a new schedule for {402 - stopped_at} more steps" in capsys.readouterr().out
    record = json.loads((run / "run.json").read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert last > stopped_at
    assert (record["settings"]["steps"], record["settings"].get("stopped_at", 402)) == (402, last)


def test_steps_replace_epochs_and_can_be_increased(tmp_path, data, capsys):
    run = tmp_path / "run"
    assert new_run(data, run, "--steps", 3) == 0
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert (settings["steps"], settings["epochs"]) == (3, None)
    assert run_training("--resume", "--out", run) == 0
    assert "nothing left to do: the run has finished (3 steps); to train longer, increase steps" in capsys.readouterr().out
    assert run_training("--resume", "--steps", 5, "--out", run) == 0
    assert "resumed at step 3: a new schedule for 2 more steps" in capsys.readouterr().out
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert settings["steps"] == 5
    assert main(["report", str(run)]) == 0
    assert run_training("--resume", "--steps", 4, "--out", run) == 2
    assert "--steps: 4 steps planned, but the run has already completed 5; increase it" in capsys.readouterr().err


def test_steps_and_epochs_exclude_each_other(tmp_path, data, capsys):
    assert new_run(data, tmp_path / "run", "--steps", 3, "--epochs", 1) == 2
    assert "--steps cannot be combined with epochs; use one of them" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_with_epochs_is_not_resumed_with_steps(tmp_path, data, capsys):
    run = tmp_path / "run"
    assert new_run(data, run, "--epochs", 1) == 0
    assert run_training("--resume", "--steps", 30, "--out", run) == 2
    assert "--steps cannot be combined with epochs" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--steps", 0], ["--patience", 0], ["--steps", -1]])
def test_steps_and_patience_are_positive(tmp_path, data, capsys, arguments):
    assert new_run(data, tmp_path / "run", *arguments) == 2
    assert f"{arguments[0]}" in capsys.readouterr().err

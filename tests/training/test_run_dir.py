"""The run folder: run.json, log, checkpoints, and recovery from damaged files."""

import argparse
import json
import math
import pickle

import pytest
import torch
from conftest import ROOT, tiny_config

from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.io import atomic_folder, folder_versions, write_checksums
from funnel.model.heads import FunnelForSequenceClassification
from funnel.problems.classification import Classification
from funnel.training.distributed import Distributed
from funnel.training.loss import TaskLoss
from funnel.training.run_dir import RunDir, create_unused_folder, read_arguments, read_record
from funnel.training.state import TrainComponents, TrainState
from train import TrainArgs

DIST = Distributed(torch.device("cpu"))
PROBLEM = Classification(tiny_config(vocab_size=99))


@pytest.fixture(scope="module")
def components():
    model = FunnelForSequenceClassification(tiny_config(vocab_size=99))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainComponents(
        DIST, model, model, FunnelTokenizer.train(["a good film"]), optimizer, scaler, "fp32", TaskLoss(PROBLEM), PROBLEM
    )


def save_steps(run, components, *steps):
    """Saves checkpoints in which every weight equals the step."""
    for step in steps:
        for tensor in components.model.state_dict().values():
            tensor.fill_(float(step))
        run.save_last(TrainState(step=step, total_steps=99, best={"step": step, "f1": 0.5}), components)
    return run


def saved_steps(run):
    return {path.name: torch.load(path / "training_state.pt")["step"] for path in folder_versions(run.folder / "last")}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- record -----------------------------------------------------------------------------------------------------------


def open_run(folder, digests=None, steps=12, n_examples=8, **arguments):
    args = TrainArgs(out=folder, **{"epochs": 2.0, "lr": 1e-5, "weights": "none", **arguments})
    derived = {"task": "custom", "blocks": "2", "dtype": "fp32", "steps": steps, "train_examples": n_examples}
    derived["digests"] = digests or {}
    run = RunDir.open(args, DIST)
    return run, run.start(args, derived, "python train.py")


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(FunnelError, match="not empty"):
        RunDir.open(TrainArgs(out=tmp_path), DIST)
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


@pytest.mark.parametrize("out", ["file/run", "file"])
def test_a_folder_that_cannot_be_written_is_refused_before_data_is_read(out, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FunnelError, match=r"cannot write|found a file"):
        RunDir.open(TrainArgs(out=tmp_path / out), DIST)


def test_checking_the_folder_writes_nothing(tmp_path):
    RunDir.open(TrainArgs(out=tmp_path / "a/b"), DIST)
    assert list(tmp_path.iterdir()) == []


def test_the_record_has_command_settings_and_arguments(tmp_path):
    run, _ = open_run(tmp_path / "run")
    record = read_record(run.folder)
    assert record["command"] == "python train.py"
    expected = {"lr": 1e-5, "seed": 0, "task": "custom", "blocks": "2", "steps": 12, "digests": {}}
    assert {name: record["settings"][name] for name in expected} == expected
    assert record["arguments"].keys() == vars(TrainArgs()).keys() - {"out", "resume", "debug", "fsdp"}


def test_the_arguments_are_read_back_with_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    open_run(tmp_path / "run", data=tmp_path.relative_to(tmp_path) / "x.csv", weights="weights", compile=True)
    monkeypatch.chdir("/")
    args = TrainArgs(**read_arguments(tmp_path / "run", TrainArgs))
    assert (args.data, args.weights) == (tmp_path / "x.csv", str(tmp_path / "weights"))
    assert (args.blocks, args.dtype, args.compile, args.task) == ("2", "fp32", True, None)


@pytest.mark.parametrize("weights", ["none", "funnel-transformer/small"])
def test_names_of_weights_are_recorded_as_given(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").mkdir()
    open_run(tmp_path / "run", weights=weights)
    assert read_arguments(tmp_path / "run", TrainArgs)["weights"] == weights


def test_a_run_resumes_only_with_its_own_data(tmp_path):
    open_run(tmp_path / "run")
    before = (tmp_path / "run/run.json").read_bytes()
    open_run(tmp_path / "run", resume=True)
    with pytest.raises(FunnelError, match="data has changed"):
        open_run(tmp_path / "run", digests={"train": "x"}, n_examples=7, resume=True)
    assert (tmp_path / "run/run.json").read_bytes() == before


@pytest.mark.parametrize("content", [b'{"version": 3, "settings": "x"}', b"{", b"\xff", b"[]"])
def test_a_damaged_record_is_an_error(content, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(FunnelError, match=r"run\.json"):
        read_record(tmp_path)


@pytest.mark.parametrize("arguments", [{"epochs": "x"}, {"data": 1}, {"seed": 0.5}, {"compile": "no"}])
def test_an_argument_of_the_wrong_type_is_an_error(arguments, tmp_path):
    record = {"version": 3, "settings": {"steps": 1}, "arguments": arguments}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(FunnelError, match=f"run.json: invalid {next(iter(arguments))}"):
        read_arguments(tmp_path, TrainArgs)


def test_a_run_of_an_older_version_cannot_be_resumed(tmp_path):
    (tmp_path / "run.json").write_text('{"version": 2, "command": "x", "settings": {"steps": 1}}')
    for folder in (ROOT / "tests/fixtures/written_by_0_1/run", tmp_path):
        with pytest.raises(FunnelError, match="incompatible version") as error:
            read_record(folder)
        assert "\n" not in str(error.value)


def test_taken_folders_get_a_number(tmp_path):
    assert create_unused_folder(tmp_path / "runs/a") == tmp_path / "runs/a"
    (tmp_path / "runs/a-2").mkdir()
    assert create_unused_folder(tmp_path / "runs/a") == tmp_path / "runs/a-3"
    assert (tmp_path / "runs/a-3").is_dir()


def test_nothing_is_saved_before_the_first_step(tmp_path, components):
    run = save_steps(RunDir(tmp_path), components, 0)
    assert saved_steps(run) == {}


def test_one_nonfinite_loss_does_not_spoil_the_running_mean():
    state = TrainState()
    for loss in (math.nan, 2.0, math.inf, 4.0):
        state.record_step(torch.tensor(loss))
    assert float(state.mean_loss) == pytest.approx(2.0 + 0.05 * (4.0 - 2.0))


# --- more steps -------------------------------------------------------------------------------------------------------


def finish_run(folder, components, keep_optimizer=False):
    """A run of 12 steps with checkpoints of steps 5 and 12; in the first one, the optimizer has a state."""
    run, state = open_run(folder, keep_optimizer=keep_optimizer)
    for step in (5, 12):
        state.step = state.evaluated_step = step
        run.save_last(state, components)
    return run


@pytest.fixture(scope="module")
def trained_components(components):
    """The optimizer has taken a step."""
    components.model(torch.tensor([[1, 2]])).sum().backward()
    components.optimizer.step()
    components.optimizer.zero_grad()
    return components


@pytest.mark.parametrize("keep_optimizer", [False, True])
def test_a_finished_run_keeps_one_checkpoint_without_the_optimizer(keep_optimizer, tmp_path, trained_components):
    run = finish_run(tmp_path / "run", trained_components, keep_optimizer)
    assert saved_steps(run) == {"last": 12}
    assert bool(run.load_last()[2].optimizer) == keep_optimizer


def test_checkpoints_left_by_a_run_killed_while_it_removed_them_are_removed_on_resume(tmp_path, trained_components):
    run = finish_run(tmp_path / "run", trained_components)
    (tmp_path / "run/last-1").mkdir()
    run, state = open_run(tmp_path / "run", resume=True)
    run.save_last(state, trained_components)
    assert saved_steps(run) == {"last": 12}
    assert "the run has finished (12 steps); to train longer" in run.resume_note


def test_until_the_last_evaluation_is_done_the_optimizer_is_kept(tmp_path, trained_components):
    run, state = open_run(tmp_path / "run")
    state.step, state.evaluated_step = 12, 5  # a signal arrived during the last evaluation
    run.save_last(state, trained_components)
    assert run.load_last()[2].optimizer


@pytest.mark.parametrize(("keep_optimizer", "warmup", "words"), [(False, 0.1, "a new warmup"), (True, 0.0, "no warmup")])
def test_more_epochs_start_a_new_schedule(keep_optimizer, warmup, words, tmp_path, trained_components):
    finish_run(tmp_path / "run", trained_components, keep_optimizer)
    for _ in range(2):  # killed before the first new checkpoint, then resumed
        run, state = open_run(tmp_path / "run", resume=True, steps=24, epochs=4.0)
        assert (state.schedule_start, state.total_steps, state.warmup) == (12, 24, warmup)
        assert "12 more steps" in run.resume_note
        assert words in run.resume_note
    record = read_record(tmp_path / "run")
    assert (record["settings"]["steps"], record["settings"]["epochs"], record["arguments"]["epochs"]) == (24, 4.0, 4.0)
    state.step = 15
    run.save_last(state, trained_components)
    run, state = open_run(tmp_path / "run", resume=True, steps=24, epochs=4.0)
    assert (state.schedule_start, state.total_steps, state.warmup) == (12, 24, warmup)
    assert run.resume_note == "resumed at step 15"


@pytest.mark.parametrize("steps", [6, 11])
def test_fewer_epochs_than_completed_are_an_error(steps, tmp_path, trained_components):
    finish_run(tmp_path / "run", trained_components)
    before = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(FunnelError, match=rf"epochs: {steps} steps planned, but .* completed 12") as error:
        open_run(tmp_path / "run", resume=True, steps=steps)
    assert error.value.parameter == "epochs"
    assert (tmp_path / "run/run.json").read_bytes() == before


def test_the_size_of_a_run_is_that_of_its_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").write_bytes(b"12345")
    (tmp_path / "y").write_bytes(b"678")
    assert RunDir(tmp_path).size() == 8


# --- log --------------------------------------------------------------------------------------------------------------


def test_each_event_is_one_line_and_nonfinite_values_are_null(tmp_path):
    run = RunDir(tmp_path)
    run.log(step=1, split="train", loss=0.5)
    run.log(step=2, split="dev", loss=math.nan, accuracy=1.0)
    assert lines_of(tmp_path)[1] == {"step": 2, "split": "dev", "loss": None, "accuracy": 1.0}
    run.log(loss=math.inf)
    assert (tmp_path / "metrics.jsonl").read_text().endswith('{"loss": null}\n')


def test_resuming_drops_the_lines_that_will_be_written_again(tmp_path):
    run = RunDir(tmp_path)
    for step in (1, 2, 3):
        run.log(step=step, split="train", loss=0.5)
        run.log(step=step, split="dev", loss=0.5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "spl')  # the process died here
    run.truncate_log(TrainState(step=2, evaluated_step=1))
    assert [(line["step"], line["split"]) for line in lines_of(tmp_path)] == [(1, "train"), (1, "dev"), (2, "train")]


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "expected"), [(1, [5]), (2, [5, 4]), (3, [5, 4, 3]), (9, [5, 4, 3, 2, 1])])
def test_the_newest_checkpoints_are_kept(keep, expected, tmp_path, components):
    run = save_steps(RunDir(tmp_path, keep), components, 1, 2, 3, 4, 5)
    assert list(saved_steps(run).values()) == expected
    assert list(saved_steps(run)) == ["last", *(f"last-{n}" for n in range(1, len(expected)))]
    run = save_steps(RunDir(tmp_path, 2), components, 6)  # fewer from now on
    assert list(saved_steps(run).values()) == [6, 5]
    (_, weights, _), _, state, _ = run.load_last()
    assert (state.step, state.best) == (6, {"step": 6, "f1": 0.5})
    assert all((tensor == 6).all() for tensor in weights.values())


def test_an_unchanged_state_is_saved_once(tmp_path, components):
    run = save_steps(RunDir(tmp_path, 3), components, 1, 1)
    assert list(saved_steps(run).values()) == [1]


def test_unrelated_folders_with_numbers_are_never_touched(tmp_path):
    for name in ("model-1", "model-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    for _ in range(3):
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "a").write_text("a")
    files = ["model", "model-1", "model-1/mine", "model-2", "model-2/mine", "model/a"]
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == files


GENERATOR = "generator/model.safetensors"  # a further model, as of ELECTRA
FILES = (GENERATOR, "model.safetensors", "training_state.pt", "config.json", "tokenizer.json", "checksums.json")


def damage_file(path, damage):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"bit flipped": content, "truncated": content[: len(content) // 2], "empty": b""}[damage])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["bit flipped", "truncated", "empty", "missing"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(name, damage, tmp_path, components, capsys):
    run = save_steps(RunDir(tmp_path, 3), components, 1, 2)
    if name == GENERATOR:
        (tmp_path / "last" / name).parent.mkdir()
        (tmp_path / "last" / name).write_bytes(b"weights")
        write_checksums(tmp_path / "last")
    damage_file(tmp_path / "last" / name, damage)
    if (name, damage) == ("checksums.json", "missing"):  # the other files are intact
        assert run.load_last()[2].step == 2
        return
    (_, weights, _), _, state, _ = run.load_last()
    assert state.step == 1
    assert all((tensor == 1).all() for tensor in weights.values())
    warning = capsys.readouterr().err
    assert f"last/{name}" in warning or "checksums.json" in warning
    assert "resuming from an older checkpoint" in warning
    save_steps(run, components, 3)
    assert run.load_last()[2].step == 3


def test_if_all_checkpoints_are_damaged_the_run_does_not_restart_silently(tmp_path, components):
    run = save_steps(RunDir(tmp_path, 2), components, 1, 2)
    for folder in ("last", "last-1"):
        (tmp_path / folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(FunnelError, match=r"last-1/model.safetensors.* \(1 newer checkpoint damaged, too\)"):
        run.load_last()


def test_before_the_first_checkpoint_there_is_nothing_to_load(tmp_path):
    assert RunDir(tmp_path).load_last() is None


def test_a_process_killed_between_the_renames_loses_nothing(tmp_path, components):
    run = save_steps(RunDir(tmp_path, 3), components, 1, 2)
    (tmp_path / "last").rename(tmp_path / ".last.old")  # killed here
    assert run.load_last()[2].step == 2
    save_steps(run, components, 3)
    assert list(saved_steps(run).values()) == [3, 2, 1]


def test_a_process_killed_after_the_renames_loses_nothing(tmp_path, components):
    run = save_steps(RunDir(tmp_path, 3), components, 1)
    (tmp_path / "last").rename(tmp_path / ".last.old")
    save_steps(RunDir(tmp_path / "other", 3), components, 2)
    (tmp_path / "other/last").rename(tmp_path / "last")  # killed here: the new one is in place, the old one not yet rotated
    assert run.load_last()[2].step == 2
    save_steps(run, components, 3)
    assert list(saved_steps(run).values()) == [3, 2, 1]


def test_a_pickle_in_place_of_the_state_is_not_executed(tmp_path, components):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    run = save_steps(RunDir(tmp_path, 1), components, 1)
    (tmp_path / "last/training_state.pt").write_bytes(pickle.dumps(Malicious()))
    (tmp_path / "last/checksums.json").unlink()
    with pytest.raises(FunnelError, match="damaged"):
        run.load_last()
    assert not (tmp_path / "executed").exists()


def test_a_pickle_with_an_argparse_namespace_is_not_a_state(tmp_path, components):
    run = save_steps(RunDir(tmp_path, 1), components, 1)
    torch.save(argparse.Namespace(step=1), tmp_path / "last/training_state.pt")
    (tmp_path / "last/checksums.json").unlink()
    with pytest.raises(FunnelError, match=r"training_state\.pt"):
        run.load_last()

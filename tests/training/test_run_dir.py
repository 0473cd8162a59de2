"""The run folder: run.json, log, checkpoints, and recovery from damaged files."""

import argparse
import json
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT, tiny_config

from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.io import atomic_folder, folder_versions, read_json
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training.distributed import Distributed
from funnel.training.run_dir import RunDir, create_unused_folder
from funnel.training.state import TrainComponents, TrainState

DIST = Distributed(torch.device("cpu"))


@pytest.fixture(scope="module")
def components():
    model = FunnelForSequenceClassification(tiny_config(vocab_size=99))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainComponents(DIST, model, model, FunnelTokenizer.train(["a good film"]), optimizer, scaler, "fp32")


def save_steps(run, components, *steps):
    """Saves checkpoints in which every weight equals the step."""
    for step in steps:
        for tensor in components.model.state_dict().values():
            tensor.fill_(float(step))
        run.save_last(TrainState(step=step, best={"step": step, "f1": 0.5}), components)
    return run


def saved_steps(run):
    return {path.name: torch.load(path / "training_state.pt")["step"] for path in folder_versions(run.folder / "last")}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- record -----------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    out: object
    lr: float = 1e-5
    resume: bool = False
    keep_checkpoints: int = 2


def open_run(folder, lr=1e-5, resume=False, digests=None):
    facts = {"task": "t", "blocks": "2", "seed": 0, "digests": digests or {}}
    return RunDir.open(Args(folder, lr, resume), facts, "python train.py", DIST)


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(FunnelError, match="not empty"):
        open_run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


def test_the_record_has_command_and_settings(tmp_path):
    run = open_run(tmp_path / "run")
    record = read_json(run.folder / "run.json")
    assert record["command"] == "python train.py"
    assert record["settings"] == {"lr": 1e-5, "task": "t", "blocks": "2", "seed": 0, "digests": {}}


def test_a_run_resumes_only_with_its_own_settings(tmp_path):
    open_run(tmp_path / "run")
    open_run(tmp_path / "run", resume=True)
    with pytest.raises(FunnelError, match=r"lr 1e-05, not 2e-05"):
        open_run(tmp_path / "run", lr=2e-5, resume=True)
    with pytest.raises(FunnelError, match="data has changed"):
        open_run(tmp_path / "run", digests={"train": "x"}, resume=True)
    with pytest.raises(FunnelError, match="no run in"):
        open_run(tmp_path / "none", resume=True)


@pytest.mark.parametrize("content", [b'{"settings": "x"}', b"{", b"\xff", b"[]"])
def test_a_damaged_record_is_an_error(content, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(FunnelError, match=r"no run in|run\.json"):
        open_run(tmp_path, resume=True)


def test_a_run_of_an_older_version_cannot_be_resumed():
    with pytest.raises(FunnelError, match="incompatible version") as error:
        open_run(ROOT / "tests/fixtures/written_by_0_1/run", resume=True)
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
    weights, state = run.load_last()
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


FILES = ("model.safetensors", "training_state.pt", "config.json", "tokenizer.json", "checksums.json")


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
    damage_file(tmp_path / "last" / name, damage)
    if (name, damage) == ("checksums.json", "missing"):  # the other files are intact
        assert run.load_last()[1].step == 2
        return
    weights, state = run.load_last()
    assert state.step == 1
    assert all((tensor == 1).all() for tensor in weights.values())
    warning = capsys.readouterr().err
    assert f"last/{name}" in warning or "checksums.json" in warning
    assert "resuming from an older checkpoint" in warning
    save_steps(run, components, 3)
    assert run.load_last()[1].step == 3


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
    assert run.load_last()[1].step == 2
    save_steps(run, components, 3)
    assert list(saved_steps(run).values()) == [3, 2, 1]


def test_a_process_killed_after_the_renames_loses_nothing(tmp_path, components):
    run = save_steps(RunDir(tmp_path, 3), components, 1)
    (tmp_path / "last").rename(tmp_path / ".last.old")
    save_steps(RunDir(tmp_path / "other", 3), components, 2)
    (tmp_path / "other/last").rename(tmp_path / "last")  # killed here: the new one is in place, the old one not yet rotated
    assert run.load_last()[1].step == 2
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

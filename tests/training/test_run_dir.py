"""A run's folder: its record, its log, its checkpoints; what it does when they are damaged."""

import json
import math

import pytest
import torch
from conftest import tiny_config

from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.io import atomic_folder, folder_versions
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training.run_dir import RunDir, TrainState, unused_folder

CONFIG = tiny_config(vocab_size=99)


@pytest.fixture(scope="module")
def tokenizer():
    return FunnelTokenizer.train(["a good film"])


def saved(run, tokenizer, *steps):
    """Saves checkpoints whose every weight is the step's number."""
    model = FunnelForSequenceClassification(CONFIG)
    for step in steps:
        weights = {name: torch.full_like(tensor, float(step)) for name, tensor in model.state_dict().items()}
        run.save(
            "last", CONFIG, weights, type(model).__name__, tokenizer, TrainState(step=step, best={"step": step, "f1": 0.5})
        )
    return run


def steps_of(run):
    return {path.name: torch.load(path / "training_state.pt")["step"] for path in folder_versions(run.folder / "last")}


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(FunnelError, match="--resume"):
        RunDir(tmp_path).start({}, "train")
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


def test_a_run_is_resumed_with_its_own_settings_only(tmp_path):
    run = RunDir(tmp_path / "run")
    run.start({"lr": 1e-5, "seed": 0}, "train")
    run.check({"lr": 1e-5, "seed": 0})
    with pytest.raises(FunnelError, match=r"lr 1e-05, not 2e-05"):
        run.check({"lr": 2e-5, "seed": 0})
    with pytest.raises(FunnelError, match="holds no run"):
        RunDir(tmp_path / "none").check({})


@pytest.mark.parametrize("content", [b'{"settings": "x"}', b"{", b"\xff", b"[]"])
def test_a_damaged_record_is_no_run(content, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(FunnelError, match=r"holds no run|run\.json"):
        RunDir(tmp_path).check({})


def test_free_folders_are_numbered(tmp_path):
    assert unused_folder(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").mkdir()
    assert unused_folder(tmp_path / "a") == tmp_path / "a-3"


def test_the_log_is_a_line_an_event(tmp_path):
    run = RunDir(tmp_path)
    run.log(step=1, split="train", loss=0.5)
    run.log(step=2, split="dev", loss=math.nan, accuracy=1.0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1] == {"step": 2, "split": "dev", "loss": None, "accuracy": 1.0}
    run.log(loss=math.inf)
    assert (tmp_path / "metrics.jsonl").read_text().endswith('{"loss": null}\n')


def test_what_will_be_written_again_is_dropped_from_the_log(tmp_path):
    run = RunDir(tmp_path)
    for step in (1, 2, 3):
        run.log(step=step, split="train", loss=0.5)
        run.log(step=step, split="dev", loss=0.5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "spl')  # the process died here
    run.forget_after(TrainState(step=2, evaluated=1))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [(1, "train"), (1, "dev"), (2, "train")]


@pytest.mark.parametrize(("kept", "there"), [(1, [5]), (2, [5, 4]), (3, [5, 4, 3]), (9, [5, 4, 3, 2, 1])])
def test_the_newest_checkpoints_are_kept(kept, there, tmp_path, tokenizer):
    run = saved(RunDir(tmp_path, kept), tokenizer, 1, 2, 3, 4, 5)
    assert list(steps_of(run).values()) == there
    assert list(steps_of(run)) == ["last", *(f"last-{n}" for n in range(1, len(there)))]
    run = saved(RunDir(tmp_path, 2), tokenizer, 6)  # fewer are asked for from now on
    assert list(steps_of(run).values()) == [6, 5] if kept > 1 else [6]
    weights, state = run.load()
    assert (state.step, state.best) == (6, {"step": 6, "f1": 0.5})
    assert all((tensor == 6).all() for tensor in weights.values())


def test_another_folder_s_neighbours_are_never_touched(tmp_path):
    for name in ("model-1", "model-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    for _ in range(3):
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "a").write_text("a")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "model", "model-1", "model-1/mine", "model-2", "model-2/mine", "model/a"]  # fmt: skip


FILES = ("model.safetensors", "training_state.pt", "config.json", "tokenizer.json", "checksums.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing"])
def test_a_damaged_checkpoint_is_passed_over_aloud(name, damage, tmp_path, tokenizer, capsys):
    run = saved(RunDir(tmp_path, 3), tokenizer, 1, 2)
    path = tmp_path / "last" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"flipped": content, "cut": content[: len(content) // 2], "empty": b""}[damage])
    if (name, damage) == ("checksums.json", "missing"):  # then nothing is known of the others, which are whole
        assert run.load()[1].step == 2
        return
    weights, state = run.load()
    assert state.step == 1
    assert all((tensor == 1).all() for tensor in weights.values())
    error = capsys.readouterr().err
    assert f"last/{name}" in error or "checksums.json" in error
    assert "goes on from the checkpoint before it" in error
    saved(run, tokenizer, 3)
    assert run.load()[1].step == 3


def test_when_all_are_damaged_nothing_is_started_in_silence(tmp_path, tokenizer):
    run = saved(RunDir(tmp_path, 2), tokenizer, 1, 2)
    for folder in ("last", "last-1"):
        (tmp_path / folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(FunnelError, match=r"last-1/model.safetensors.* and so are the 1 newer"):
        run.load()


def test_before_the_first_checkpoint_there_is_none(tmp_path):
    assert RunDir(tmp_path).load() is None


def test_between_two_renames_the_old_checkpoint_is_found_and_kept(tmp_path, tokenizer):
    run = saved(RunDir(tmp_path, 3), tokenizer, 1, 2)
    (tmp_path / "last").rename(tmp_path / ".last.old")  # the process died here
    assert run.load()[1].step == 2
    saved(run, tokenizer, 3)
    assert list(steps_of(run).values()) == [3, 2, 1]


def test_after_the_renames_too(tmp_path, tokenizer):
    run = saved(RunDir(tmp_path, 3), tokenizer, 1)
    (tmp_path / "last").rename(tmp_path / ".last.old")
    with atomic_folder(tmp_path / "x"):
        pass
    saved(RunDir(tmp_path / "other", 3), tokenizer, 2)
    (tmp_path / "other/last").rename(tmp_path / "last")  # the new one is in place, the old one not yet put away
    assert run.load()[1].step == 2
    saved(run, tokenizer, 3)
    assert list(steps_of(run).values()) == [3, 2, 1]


def test_a_pickle_in_the_state_s_place_does_not_run(tmp_path, tokenizer):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    run = saved(RunDir(tmp_path, 1), tokenizer, 1)
    (tmp_path / "last/training_state.pt").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "last/checksums.json").unlink()
    with pytest.raises(FunnelError, match="damaged"):
        run.load()
    assert not (tmp_path / "ran").exists()

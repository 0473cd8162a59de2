"""Trackers: what TensorBoard's and W&B's own readers find, after resuming too; failures; trackers of one's own."""

import json
import os
import signal
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pretrain
import train
from funnel.errors import FunnelError
from funnel.training.distributed import Distributed
from funnel.training.progress import Progress
from funnel.training.run_dir import LastCheckpoint, RunDir
from funnel.training.state import TrainState
from train import TrainArgs

DERIVED = {"task": "custom", "blocks": "2", "dtype": "fp32", "steps": 40, "metrics": ["accuracy"], "labels": ["a", "b"]}


def start(folder: Path, resume_at: tuple[int, int] | None = None, **trackers: bool) -> RunDir:
    """Starts a run, or resumes it at a step and the step of the last evaluation."""
    args = TrainArgs(out=folder, epochs=2.0, lr=1e-5, weights="none", warmup=0.1, resume=resume_at is not None, **trackers)
    run = RunDir(folder)
    if resume_at is not None:
        state = TrainState(step=resume_at[0], total_steps=40, evaluated_step=resume_at[1])
        run.checkpoint = LastCheckpoint(folder, None, None, state)
    run.start(args, DERIVED, "python train.py")
    return run


def log_steps(run: RunDir, *steps: int, loss: float = 1.0) -> None:
    for step in steps:
        run.log(step=step, split="train", loss=loss / step, lr=1e-3, memory_mib=None)
        if step % 20 == 0:
            run.log(step=step, split="dev", loss=loss / 2, accuracy=float("nan") if step == 40 else 0.5)


def logged_points(folder: Path) -> list[tuple[str, int, float]]:
    """What metrics.jsonl contains."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sorted(
        (f"{line['split']}/{name}", line["step"], pytest.approx(value, rel=1e-6))
        for line in lines
        for name, value in line.items()
        if name not in ("step", "split") and value is not None
    )


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def read_events(folder: Path):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def event_points(folder: Path) -> list[tuple[str, int, float]]:
    events = read_events(folder)
    return sorted((tag, event.step, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag))


def test_tensorboard_reads_the_points_of_the_log(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    run = start(tmp_path / "run", tensorboard=True)
    log_steps(run, 10, 20, 30, 40)
    run.close(failed=False)
    points = event_points(tmp_path / "run")
    assert points == logged_points(tmp_path / "run")
    assert {tag for tag, *_ in points} == {"train/loss", "train/lr", "dev/loss", "dev/accuracy"}
    assert len(points) == 4 * 2 + 2 + 1


def test_tensorboard_shows_the_hyperparameters(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.plugins.hparams import plugin_data_pb2

    start(tmp_path / "run", tensorboard=True).close(failed=False)
    contents = read_events(tmp_path / "run").PluginTagToContent("hparams")
    parsed = {tag: plugin_data_pb2.HParamsPluginData.FromString(content) for tag, content in contents.items()}
    values = parsed["_hparams_/session_start_info"].session_start_info.hparams
    assert values["lr"].number_value == 1e-5
    assert values["blocks"].string_value == "2"
    assert [info.name.tag for info in parsed["_hparams_/experiment"].experiment.metric_infos] == ["dev/accuracy"]
    assert len(list((tmp_path / "run").rglob("events*"))) == 1


@pytest.mark.parametrize("was_tracked", [True, False])
def test_a_resumed_run_has_each_point_once_and_no_stale_ones(was_tracked, tmp_path):
    """Whether or not it had the tracker before. Killed at step 30, after the evaluation at 20, with the checkpoint of 20."""
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    killed = start(tmp_path / "run", tensorboard=was_tracked)
    log_steps(killed, 10, 20, 30, loss=5.0)
    for tracker in killed.trackers:
        tracker.writer.flush()  # never closed; its thread must not write after the resumed run has replaced the file
    run = start(tmp_path / "run", resume_at=(20, 0), tensorboard=True)
    run.log(step=20, split="dev", loss=3.0, accuracy=0.25)
    log_steps(run, 30, 40)
    run.close(failed=False)
    points = event_points(tmp_path / "run")
    assert points == logged_points(tmp_path / "run")
    assert len(points) == 4 * 2 + 2 + 1
    assert ("train/loss", 20, 0.25) in points
    assert ("dev/accuracy", 20, 0.25) in points


def test_resuming_keeps_the_times_of_the_points(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    run = start(tmp_path / "run", tensorboard=True)
    log_steps(run, 10)
    run.close(failed=False)
    before = read_events(tmp_path / "run").Scalars("train/loss")[0].wall_time
    run = start(tmp_path / "run", resume_at=(20, 20), tensorboard=True)
    log_steps(run, 30)
    run.close(failed=False)
    first, second = read_events(tmp_path / "run").Scalars("train/loss")
    assert first.wall_time == before < second.wall_time


def test_a_damaged_event_file_is_replaced(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    run = start(tmp_path / "run", tensorboard=True)
    log_steps(run, 10, 20)
    run.close(failed=False)
    path = next((tmp_path / "run").glob("events*"))
    path.write_bytes(b"\xff" * 40 + path.read_bytes()[40:-3])
    start(tmp_path / "run", resume_at=(20, 20), tensorboard=True).close(failed=False)
    assert event_points(tmp_path / "run") == logged_points(tmp_path / "run")


@pytest.mark.slow
def test_both_scripts_write_events_that_equal_the_log_after_a_stop(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    quick = ["--steps", "8", "--batch-size", "4", "--eval-every", "3", "--log-every", "2", "--tensorboard", "--device", "cpu"]
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "a good film\t1\na bad film\t0\n" * 10)
    (tmp_path / "corpus.txt").write_text("a good film\na bad film\n\n" * 150)
    data, corpus = str(tmp_path / "train.tsv"), str(tmp_path / "corpus.txt")
    for script, own in (
        (train, ["--data", data, "--weights", "none", "--blocks", "1,1"]),
        (pretrain, ["--corpus", corpus, "--objective", "mlm", "--d-model", "32", "--blocks", "1,1", "--max-length", "16"]),
    ):
        calls, original = [], script.train_step

        def stop_at_the_fifth_step(batch, calls=calls, original=original, **options):
            calls.append(batch)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(batch, **options)

        out = tmp_path / script.__name__
        monkeypatch.setattr(script, "train_step", stop_at_the_fifth_step)
        assert script.main([*own, *quick, "--out", str(out)]) == 143
        assert script.main(["--resume", "--out", str(out)]) == 0
        points = event_points(out)
        assert points == logged_points(out)
        assert {step for tag, step, _ in points if tag == "dev/loss"} == {3, 6, 8}


# --- W&B --------------------------------------------------------------------------------------------------------------


class FakeWandB:
    """Stands for the module wandb."""

    def __init__(self) -> None:
        self.arguments, self.logged, self.exit_codes = [], [], []

    def init(self, **arguments):
        self.arguments.append(arguments)
        return SimpleNamespace(
            define_metric=lambda *_, **__: None,
            log=self.logged.append,
            finish=lambda exit_code: self.exit_codes.append(exit_code),
        )


@pytest.fixture
def fake_wandb(monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_DIR", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_a_resumed_run_continues_under_its_id_and_logs_each_point_once(fake_wandb, tmp_path):
    log_steps(start(tmp_path / "run", wandb=True), 10, 20, 30)
    run = start(tmp_path / "run", resume_at=(10, 0), wandb=True)
    log_steps(run, 20, 30, 40)
    run.close(failed=True)
    first, second = fake_wandb.arguments
    assert first["id"] == second["id"]
    assert first["name"] == "run"
    assert first["config"]["lr"] == 1e-5
    assert "labels" not in first["config"]
    points = [(name, values["step"]) for values in fake_wandb.logged for name in values if name != "step"]
    assert len(points) == len(set(points))
    assert sorted(points) == [(tag, step) for tag, step, _ in logged_points(tmp_path / "run")]
    assert fake_wandb.exit_codes == [1]


def test_a_run_that_is_tracked_only_after_resuming_sends_its_earlier_points(fake_wandb, tmp_path):
    log_steps(start(tmp_path / "run"), 10, 20, 30)
    log_steps(start(tmp_path / "run", resume_at=(20, 20), wandb=True), 30)
    assert [values["step"] for values in fake_wandb.logged] == [10, 20, 20, 30]


def test_its_environment_variables_name_the_run(fake_wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_NAME", "mine")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    start(tmp_path / "run", wandb=True)
    assert fake_wandb.arguments[0]["id"] == "abc"
    assert "name" not in fake_wandb.arguments[0]


def test_a_refused_run_is_an_error_before_training_and_has_sent_nothing(fake_wandb, tmp_path, monkeypatch):
    log_steps(start(tmp_path / "run"), 10, 20)
    with monkeypatch.context() as patch:
        patch.setattr(fake_wandb, "init", lambda **_: 1 / 0)
        with pytest.raises(FunnelError, match=r"wandb: the run could not be started \(division by zero\).*WANDB_MODE=offline"):
            start(tmp_path / "run", resume_at=(20, 20), wandb=True)
    log_steps(start(tmp_path / "run", resume_at=(20, 20), wandb=True), 30)
    assert [values["step"] for values in fake_wandb.logged] == [10, 20, 20, 30]


def offline_points(path: Path) -> list[tuple[str, int, float]]:
    """The history in one of W&B's offline files: LevelDB's log format (blocks of 32 KiB) with protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, parts, points = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if 2**15 - position % 2**15 < 7:
            position += 2**15 - position % 2**15
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the last part of a record
            items = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in Record.FromString(parts).history.item}
            points += [(name, items["step"], value) for name, value in items.items() if "/" in name]
            parts = b""
    return points


@pytest.mark.slow
def test_offline_files_have_each_point_once(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = start(tmp_path / "run", wandb=True)
    log_steps(run, 10, 20, 30)
    run.close(failed=True)
    run = start(tmp_path / "run", resume_at=(10, 0), wandb=True)
    log_steps(run, 20, 30, 40)
    run.close(failed=False)
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({path.name for path in files}) == 1  # the same id
    points = sorted(point for path in files for point in offline_points(path))
    assert points == logged_points(tmp_path / "run")


# --- any tracker ------------------------------------------------------------------------------------------------------


class Recorder:
    """A tracker of one's own."""

    def __init__(self) -> None:
        self.lines, self.closed = [], []

    def log(self, step, split, values) -> None:
        self.lines.append((step, split, dict(values)))

    def close(self, failed) -> None:
        self.closed.append(failed)


def test_a_tracker_receives_finite_values_until_it_is_closed(tmp_path):
    run, recorder = start(tmp_path / "run"), Recorder()
    run.trackers.append(recorder)
    with pytest.raises(ZeroDivisionError), Progress(run, TrainState(total_steps=40)):
        log_steps(run, 40, 0)
    assert recorder.lines == [(40, "train", {"loss": 1 / 40, "lr": 1e-3}), (40, "dev", {"loss": 0.5})]
    assert recorder.closed == [True]


def test_only_rank_0_logs(tmp_path):
    run, recorder = RunDir(tmp_path, dist=Distributed(torch.device("cpu"), rank=1)), Recorder()
    run.trackers.append(recorder)
    log_steps(run, 10)
    assert recorder.lines == []


def test_a_failing_tracker_is_dropped_with_a_warning(tmp_path, capsys):
    run, failing, recorder = start(tmp_path / "run"), Recorder(), Recorder()
    failing.lines = None
    run.trackers += [failing, recorder]
    log_steps(run, 10, 20)
    run.close(failed=False)
    assert len(recorder.lines) == len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3
    assert failing.closed == []
    error = capsys.readouterr().err
    assert error.count("warning: Recorder failed and is no longer used") == 1


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_an_error_before_anything_is_read_or_written(name, module, tmp_path, monkeypatch):
    for loaded in [loaded for loaded in sys.modules if loaded.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    args = TrainArgs(out=tmp_path / "run", **{name: True})
    with pytest.raises(FunnelError, match=rf"{name} needs the extra {name} \(.*{module}.*\); .*funnel-transformer\[{name}\]'"):
        RunDir.open(args, Distributed(torch.device("cpu")))
    assert not (tmp_path / "run").exists()

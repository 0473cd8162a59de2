"""Fault tolerance: runs that were killed, filled the disk or have damaged checkpoints resume to the same result."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch
from conftest import tiny_config

from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from funnel.model.heads import FunnelForSequenceClassification

pytestmark = pytest.mark.slow

TEXTS = [f"{'not ' * (i % 3)}a {'good' if i % 4 else 'bad'} film {'indeed ' * (i % 7)}" for i in range(100)]
# 200 steps of 10 examples, an evaluation every 24, a checkpoint every 5.
COMMON = ("--data", "train.tsv", "--dev", "dev.tsv", "--weights", "weights", "--batch-size", "10", "--epochs", "20",
          "--lr", "1e-3", "--eval-every", "24", "--save-every", "5", "--keep-checkpoints", "2")  # fmt: skip


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """The working directory of the runs, with data and weights."""
    folder = tmp_path_factory.mktemp("faults")
    rows = "".join(f"{text}\t{'yes' if 'good' in text else 'no'}\t{i % 3}\n" for i, text in enumerate(TEXTS))
    (folder / "train.tsv").write_text("text\tlabel\tof three\n" + rows)
    (folder / "dev.tsv").write_text("text\tlabel\tof three\n" + "".join(rows.splitlines(keepends=True)[:33]))
    tokenizer = FunnelTokenizer.train(TEXTS)
    torch.manual_seed(0)
    config = tiny_config(vocab_size=tokenizer.vocab_size, hidden_dropout=0.1, attention_dropout=0.1)
    FunnelForSequenceClassification(config).save_pretrained(folder / "weights")
    tokenizer.save(folder / "weights")
    return folder


def run_train(folder, arguments, max_file_size):
    import resource

    import train

    os.chdir(folder)
    torch.set_num_threads(1)
    log = open(os.open("log.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), "w", buffering=1)  # noqa: SIM115
    sys.stdout = sys.stderr = log
    if max_file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))  # larger writes fail, as on a full disk
    status = train.main(list(arguments))
    log.flush()
    os._exit(status)


@pytest.fixture(scope="session")
def start(workdir):
    """Starts train.py in a process forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo"])  # creating an optimizer imports the latter, which takes seconds

    def start_process(*arguments, max_file_size=0):
        process = context.Process(target=run_train, args=(workdir, arguments, max_file_size))
        process.start()
        return process

    return start_process


@pytest.fixture
def finish(workdir):
    """Waits for a process; returns its exit status and output."""

    def wait(process):
        process.join(120)
        assert process.exitcode is not None, "the process hangs"
        return process.exitcode, (workdir / "log.txt").read_text()

    return wait


@pytest.fixture(scope="session")
def uninterrupted(workdir, start):
    """The folder of a run that is not interrupted, for reference."""
    process = start(*COMMON, "--out", "uninterrupted")
    process.join(120)
    assert process.exitcode == 0, (workdir / "log.txt").read_text()
    return workdir / "uninterrupted"


def log_of(folder):
    """metrics.jsonl without the fields that depend on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("examples_per_second", "memory_mib")} for line in lines]


def is_newer(path, since):
    """Whether a folder was created after `since`; a killed run leaves the one that it was writing."""
    try:
        return path.stat().st_ctime > since
    except FileNotFoundError:
        return False


def wait_for(process, path, since=0.0):
    """Waits until a new folder appears or the process ends."""
    deadline = time.monotonic() + 60
    while not is_newer(path, since) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.0002)


def test_a_run_killed_12_times_ends_with_the_same_result(workdir, start, finish, uninterrupted):
    rng = random.Random(0)
    out, phases = workdir / "killed", {"before the first checkpoint": 0, "while saving": 0, "while training": 0}
    for kill in range(12):
        since = time.time()
        process = start(*COMMON, "--out", "killed", *(["--resume"] if (out / "run.json").exists() else []))
        if kill < 2:
            wait_for(process, out, since)
            time.sleep(rng.uniform(0, 0.01))
        else:
            wait_for(process, out / ".last.new", since)
            if kill % 2:
                time.sleep(rng.uniform(0, 0.015))
            else:
                wait_for(process, out / "last", max(since, time.time()))  # the rename counts as a change
                time.sleep(rng.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, (workdir / "log.txt").read_text()
        if not (out / "last").exists() and not (out / ".last.old").exists():
            phases["before the first checkpoint"] += 1
        else:
            is_saving = is_newer(out / ".last.new", since) or is_newer(out / ".best.new", since)
            phases["while saving" if is_saving else "while training"] += 1
    status, output = finish(start(*COMMON, "--out", "killed", "--resume"))
    assert status == 0, output
    assert phases["while saving"] >= 2, phases
    assert phases["while training"] >= 2, phases
    assert is_same_run(out, uninterrupted)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in uninterrupted.iterdir())


def is_same_run(actual, expected):
    """Whether two runs have the same weights and the same log."""
    pairs = [(load_checkpoint(actual / name).weights, load_checkpoint(expected / name).weights) for name in ("best", "last")]
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in b) and log_of(actual) == log_of(expected)


@pytest.fixture
def stopped_run(workdir, start, uninterrupted):
    """A run that was stopped halfway, with two checkpoints."""
    out = workdir / "stopped"
    if not out.exists():
        process = start(*COMMON, "--out", "stopped")
        wait_for(process, out / "last-1")
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 128 + signal.SIGTERM
    shutil.rmtree(workdir / "run", ignore_errors=True)
    return shutil.copytree(out, workdir / "run")


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("max_file_size", [2_000, 20_000, 100_000])
def test_a_full_disk_is_an_error_and_the_run_can_be_resumed(max_file_size, workdir, start, finish, stopped_run, uninterrupted):
    """With the largest limit, the disk fills up while the training state is written."""
    out = workdir / f"full{max_file_size}"
    sizes = {path.name: path.stat().st_size for path in (stopped_run / "last").iterdir()}
    assert sizes["model.safetensors"] < 100_000 < sizes["training_state.pt"]
    status, output = finish(start(*COMMON, "--out", out.name, max_file_size=max_file_size))
    assert status == 2
    assert output.count("train.py: error: ") == 1
    assert "cannot write" in output
    assert "File too large" in output
    assert "Traceback" not in output
    if (out / "run.json").exists():
        status, output = finish(start(*COMMON, "--out", out.name, "--resume"))
        assert status == 0, output
        assert is_same_run(out, uninterrupted)


def test_a_disk_that_fills_up_later_leaves_the_checkpoints_intact(workdir, start, finish, stopped_run, uninterrupted):
    before = {name: content for name, content in files_of(stopped_run).items() if name.startswith("last")}
    status, output = finish(start(*COMMON, "--out", "run", "--resume", max_file_size=100_000))
    assert status == 2
    assert "cannot write" in output
    assert "File too large" in output
    after = files_of(stopped_run)
    assert {name: after[name] for name in before} == before
    assert not (stopped_run / ".last.new").exists()
    status, output = finish(start(*COMMON, "--out", "run", "--resume"))
    assert status == 0, output
    assert is_same_run(stopped_run, uninterrupted)


@pytest.mark.parametrize("out", ["/proc/run", "weights/config.json/run"])
def test_a_folder_that_cannot_be_written_is_an_error(out, start, finish):
    status, output = finish(start(*COMMON, "--out", out))
    assert status == 2
    assert "cannot write" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt"])
@pytest.mark.parametrize("damage", ["bit flipped", "missing"])
def test_a_damaged_checkpoint_costs_only_the_steps_since_the_previous_one(
    name, damage, workdir, start, finish, stopped_run, uninterrupted
):
    path = stopped_run / "last" / name
    content = bytearray(path.read_bytes())
    content[random.Random(1).randrange(len(content))] ^= 16
    path.write_bytes(content) if damage == "bit flipped" else path.unlink()
    status, output = finish(start(*COMMON, "--out", "run", "--resume"))
    assert status == 0, output
    assert f"last/{name}" in output
    assert "resuming from an older checkpoint" in output
    assert is_same_run(stopped_run, uninterrupted)


def test_if_all_checkpoints_are_damaged_nothing_is_changed(workdir, start, finish, stopped_run):
    for folder in ("last", "last-1"):
        (stopped_run / folder / "training_state.pt").write_bytes(b"")
    before = files_of(stopped_run)
    status, output = finish(start(*COMMON, "--out", "run", "--resume"))
    assert status == 2
    assert "last-1/training_state.pt" in output
    assert files_of(stopped_run) == before


@pytest.mark.parametrize(
    "change",
    [("--lr", "2e-3"), ("--seed", "1"), ("--blocks", "1,2,1,1"), ("--batch-size", "5"), ("--eval-every", "25"),
     ("--label-column", "of three")],
)  # fmt: skip
def test_a_run_is_not_resumed_with_other_arguments(change, start, finish, stopped_run):
    before = files_of(stopped_run)
    status, output = finish(start(*COMMON, *change, "--out", "run", "--resume"))
    assert status == 2
    assert "was started with" in output
    assert files_of(stopped_run) == before


def test_a_run_is_not_resumed_with_other_data(workdir, start, finish, stopped_run):
    before, data = files_of(stopped_run), (workdir / "dev.tsv").read_text()
    (workdir / "dev.tsv").write_text(data.replace("yes", "no", 1))
    try:
        status, output = finish(start(*COMMON, "--out", "run", "--resume"))
    finally:
        (workdir / "dev.tsv").write_text(data)
    assert status == 2
    assert "the data has changed" in output
    assert files_of(stopped_run) == before


def test_a_second_signal_ends_the_run_immediately(workdir, start, uninterrupted):
    process = start(*COMMON, "--out", "twice")
    wait_for(process, workdir / "twice/last")
    os.kill(process.pid, signal.SIGSTOP)  # both signals arrive while it is stopped
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode in (128 + signal.SIGTERM, 128 + signal.SIGINT)


def test_weights_that_overflow_end_the_run_with_a_diagnosis(workdir, start, finish):
    config, weights, architecture = load_checkpoint(workdir / "weights")
    weights["encoder.blocks.1.0.ffn.linear_1.weight"].fill_(3e38)
    save_checkpoint(workdir / "huge", Checkpoint(config, weights, architecture))
    shutil.copy(workdir / "weights/tokenizer.json", workdir / "huge")
    arguments = list(COMMON)
    arguments[arguments.index("weights")] = "huge"
    status, output = finish(start(*arguments, "--dtype", "fp32", "--out", "diverged"))
    assert status == 2
    assert "training diverged at step 1 " in output
    assert "the first non-finite output is that of encoder.blocks.1.0.ffn" in output

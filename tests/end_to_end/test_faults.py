"""What happens to a run: it is killed, its disk is full, its checkpoints are damaged. It loses nothing."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch
from conftest import tiny_config

from funnel.data.tokenizer import FunnelTokenizer
from funnel.model import checkpoint
from funnel.model.heads import FunnelForSequenceClassification

TEXTS = [f"{'not ' * (i % 3)}a {'good' if i % 4 else 'bad'} film {'indeed ' * (i % 7)}" for i in range(100)]
# 200 steps of 10 texts, an evaluation every 24, a checkpoint every 5.
COMMON = ("--data", "train.tsv", "--dev", "dev.tsv", "--weights", "weights", "--batch-size", "10", "--epochs", "20",
          "--lr", "1e-3", "--eval-every", "24", "--save-every", "5", "--keep-checkpoints", "2")  # fmt: skip


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A folder with data and weights, which the runs are in."""
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


def _run(folder, arguments, most_bytes):
    import resource
    import sys

    import train

    os.chdir(folder)
    torch.set_num_threads(1)
    log = open(os.open("log.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), "w", buffering=1)  # noqa: SIM115
    sys.stdout = sys.stderr = log
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))  # a write beyond it fails, as on a full disk
    status = train.main(list(arguments))
    log.flush()
    os._exit(status)


@pytest.fixture(scope="session")
def start(task):
    """Starts train.py in a process of its own that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo"])  # the optimizer imports the latter, which takes seconds

    def function(*arguments, most_bytes=0):
        process = context.Process(target=_run, args=(task, arguments, most_bytes))
        process.start()
        return process

    return function


@pytest.fixture
def finish(task):
    """Waits for a process's end: its status, and what it said."""

    def function(process):
        process.join(120)
        assert process.exitcode is not None, "hangs"
        return process.exitcode, (task / "log.txt").read_text()

    return function


@pytest.fixture(scope="session")
def whole(task, start):
    """The run that nothing happens to."""
    process = start(*COMMON, "--out", "whole")
    process.join(120)
    assert process.exitcode == 0, (task / "log.txt").read_text()
    return task / "whole"


def log_of(folder):
    """metrics.jsonl without the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("examples_per_second", "memory_mib")} for line in lines]


def is_new(path, since):
    """Whether a folder was made after a moment: a killed run leaves the one that it was writing."""
    try:
        return path.stat().st_ctime > since
    except FileNotFoundError:
        return False


def wait_for(process, path, since=0.0):
    """Waits until a new folder is there, or the process has ended."""
    end = time.monotonic() + 60
    while not is_new(path, since) and process.is_alive() and time.monotonic() < end:
        time.sleep(0.0002)


def test_killed_and_resumed_again_and_again(task, start, finish, whole):
    chance = random.Random(0)
    out, kills, during = task / "killed", 0, {"before the first": 0, "writing": 0, "training": 0}
    while kills < 25:
        since = time.time()
        process = start(*COMMON, "--out", "killed", *(["--resume"] if (out / "run.json").exists() else []))
        if kills < 2:
            wait_for(process, out, since)
            time.sleep(chance.uniform(0, 0.01))
        else:
            wait_for(process, out / ".last.new", since)
            if kills % 2:
                time.sleep(chance.uniform(0, 0.015))
            else:
                wait_for(process, out / "last", max(since, time.time()))  # the renaming counts as a change
                time.sleep(chance.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, (task / "log.txt").read_text()
        kills += 1
        if not (out / "last").exists() and not (out / ".last.old").exists():
            during["before the first"] += 1
        else:
            during["writing" if is_new(out / ".last.new", since) or is_new(out / ".best.new", since) else "training"] += 1
    status, said = finish(start(*COMMON, "--out", "killed", "--resume"))
    print(f"killed {during}; {said.splitlines()[3]}")
    assert status == 0, said
    assert during["writing"] >= 5, during
    assert during["training"] >= 5, during
    assert same(out, whole)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())


def same(found, expected):
    """Whether two runs have the same weights and the same log."""
    pairs = [(checkpoint.load(found / name).weights, checkpoint.load(expected / name).weights) for name in ("best", "last")]
    equal = all(torch.equal(a[key], b[key]) for a, b in pairs for key in b)
    return equal and log_of(found) == log_of(expected)


@pytest.fixture
def halfway(task, start, whole):
    """A run that was stopped on its way, with two checkpoints to go on from."""
    out = task / "halfway"
    if not out.exists():
        process = start(*COMMON, "--out", "halfway")
        wait_for(process, out / "last-1")
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 128 + signal.SIGTERM
    shutil.rmtree(task / "run", ignore_errors=True)
    return shutil.copytree(out, task / "run")


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("most_bytes", [2_000, 20_000, 100_000])
def test_a_full_disk(most_bytes, task, start, finish, whole):
    """The third one is full in the middle of the training state."""
    out = task / f"full{most_bytes}"
    sizes = {path.name: path.stat().st_size for path in (whole / "last").iterdir()}
    assert sizes["model.safetensors"] < 100_000 < sizes["training_state.pt"]
    status, said = finish(start(*COMMON, "--out", out.name, most_bytes=most_bytes))
    assert status == 2
    assert said.count("train.py: error: ") == 1
    assert "cannot be written" in said
    assert "File too large" in said
    assert "Traceback" not in said
    if (out / "run.json").exists():
        status, said = finish(start(*COMMON, "--out", out.name, "--resume"))
        assert status == 0, said
        assert same(out, whole)


def test_a_disk_that_fills_up_on_the_way(task, start, finish, halfway, whole):
    before = {name: content for name, content in files_of(halfway).items() if name.startswith("last")}
    status, said = finish(start(*COMMON, "--out", "run", "--resume", most_bytes=100_000))
    assert status == 2
    assert "cannot be written (File too large)" in said
    after = files_of(halfway)
    assert {name: after[name] for name in before} == before
    assert not (halfway / ".last.new").exists()
    status, said = finish(start(*COMMON, "--out", "run", "--resume"))
    assert status == 0, said
    assert same(halfway, whole)


@pytest.mark.parametrize("out", ["/proc/run", "weights/config.json/run"])
def test_a_folder_that_may_not_be_written(out, start, finish):
    status, said = finish(start(*COMMON, "--out", out))
    assert status == 2
    assert "cannot be written" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(name, damage, task, start, finish, halfway, whole):
    path = halfway / "last" / name
    content = bytearray(path.read_bytes())
    content[random.Random(1).randrange(len(content))] ^= 16
    path.write_bytes(content) if damage == "flipped" else path.unlink()
    status, said = finish(start(*COMMON, "--out", "run", "--resume"))
    assert status == 0, said
    assert f"last/{name}" in said
    assert "goes on from the checkpoint before it" in said
    assert same(halfway, whole)


def test_two_damaged_checkpoints_are_an_error_and_stay_as_they_are(task, start, finish, halfway):
    for folder in ("last", "last-1"):
        (halfway / folder / "training_state.pt").write_bytes(b"")
    before = files_of(halfway)
    status, said = finish(start(*COMMON, "--out", "run", "--resume"))
    assert status == 2
    assert "last-1/training_state.pt" in said
    assert files_of(halfway) == before


@pytest.mark.parametrize(
    "change",
    [("--lr", "2e-3"), ("--seed", "1"), ("--blocks", "1,2,1,1"), ("--batch-size", "5"), ("--epochs", "21"),
     ("--eval-every", "25"), ("--label-column", "of three")],
)  # fmt: skip
def test_another_configuration_does_not_go_on(change, start, finish, halfway):
    before = files_of(halfway)
    status, said = finish(start(*COMMON, *change, "--out", "run", "--resume"))
    assert status == 2
    assert "was started with" in said
    assert files_of(halfway) == before


def test_other_contents_do_not_go_on(task, start, finish, halfway):
    before, data = files_of(halfway), (task / "dev.tsv").read_text()
    (task / "dev.tsv").write_text(data.replace("yes", "no", 1))
    try:
        status, said = finish(start(*COMMON, "--out", "run", "--resume"))
    finally:
        (task / "dev.tsv").write_text(data)
    assert status == 2
    assert "the data is not what" in said
    assert files_of(halfway) == before


def test_a_second_signal_ends_it_at_once(task, start, whole):
    process = start(*COMMON, "--out", "twice")
    wait_for(process, task / "twice/last")
    os.kill(process.pid, signal.SIGSTOP)  # both arrive while it is busy with something
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode in (128 + signal.SIGTERM, 128 + signal.SIGINT)


def test_weights_that_overflow_end_with_a_diagnosis(task, start, finish):
    saved = checkpoint.load(task / "weights")
    saved.weights["encoder.blocks.1.0.ffn.linear_1.weight"].fill_(3e38)
    checkpoint.save(task / "huge", saved.config, saved.weights, saved.architecture)
    shutil.copy(task / "weights/tokenizer.json", task / "huge")
    arguments = list(COMMON)
    arguments[arguments.index("weights")] = "huge"
    status, said = finish(start(*arguments, "--dtype", "fp32", "--out", "diverged"))
    assert status == 2
    assert "5 steps in a row were skipped; step 5: loss nan" in said
    assert "first in the result of encoder.blocks.1.0.ffn" in said

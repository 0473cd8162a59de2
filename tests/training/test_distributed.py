"""Several processes: the same run as one, sharded or not; what happens when one of them ends; signals."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, run_command, tiny_config

from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, StoppedBySignal
from funnel.model import checkpoint
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training import distributed
from funnel.training.distributed import Distributed, GracefulStop

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_a_batch_is_shared_out(size, rows):
    index = np.arange(100, 100 + rows)
    parts = [Distributed(CPU, rank, size).share(index) for rank in range(size)]
    assert np.concatenate([part for part, _, share in parts if share]).tolist() == index.tolist()
    assert sum(share for *_, share in parts) == pytest.approx(1)
    for part, first, share in parts:
        assert len(part) > 0
        assert share == 0 or (index[first : first + len(part)] == part).all()


def test_half_an_environment_says_how_to_start(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(FunnelError, match="torchrun --nproc-per-node"):
        Distributed.start("cpu")


def test_a_signal_waits_for_the_check(monkeypatch):
    with GracefulStop(Distributed(CPU)) as signals:
        signals.check()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        with pytest.raises(StoppedBySignal) as stopped:
            signals.check()
        assert stopped.value.signum == signal.SIGINT
        ended = []
        monkeypatch.setattr(distributed.os, "_exit", ended.append)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert ended == [128 + signal.SIGTERM]


TEXTS = [f"{'not ' * (i % 3)}a {'good' if i % 4 else 'bad'} film {'indeed ' * (i % 7)}" for i in range(141)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data and weights, with dropout, such that neither batches nor dev can be divided by 2 or 4."""
    folder = tmp_path_factory.mktemp("processes")
    rows = "".join(f"{text}\t{'yes' if 'good' in text else 'no'}\n" for text in TEXTS)
    (folder / "train.tsv").write_text("text\tlabel\n" + rows)
    (folder / "dev.tsv").write_text("text\tlabel\n" + "".join(rows.splitlines(keepends=True)[:67]))
    tokenizer = FunnelTokenizer.train(TEXTS)
    torch.manual_seed(0)
    config = tiny_config(vocab_size=tokenizer.vocab_size, hidden_dropout=0.1, attention_dropout=0.1, activation_dropout=0.1)
    FunnelForSequenceClassification(config).save_pretrained(folder / "weights")
    tokenizer.save(folder / "weights")
    return folder


# 56 steps; the last batch of each of the 5 whole epochs has one text.
COMMON = ("--data", "train.tsv", "--dev", "dev.tsv", "--weights", "weights", "--blocks", "1,2x2,1", "--batch-size", "14",
          "--epochs", "5.1", "--lr", "1e-3", "--dtype", "fp32", "--eval-every", "16", "--save-every", "12")  # fmt: skip


def torchrun(size, *arguments):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), str(ROOT / "train.py"), *arguments]


def launch(folder, size, *arguments):
    """Starts train.py in one process or, with torchrun, in several."""
    command = torchrun(size, *arguments) if size > 1 else [str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(folder):
    """The run in one process."""
    code, out, error = finish(launch(folder, 1, *COMMON, "--out", "alone"))
    assert code == 0, error
    assert "56 steps" in out
    return folder / "alone"


def assert_same_run(found, expected):
    """Every line of the log and every weight, to float32 rounding that has gone through 56 steps."""
    lines, others = lines_of(found), lines_of(expected)
    assert [(line["step"], line["split"]) for line in lines] == [(line["step"], line["split"]) for line in others]
    for line, other in zip(lines, others, strict=True):
        for name in line.keys() - {"examples_per_second", "memory_mib"}:
            assert line[name] == pytest.approx(other[name], rel=1e-4) if name != "split" else True
    weights = checkpoint.load(found / "last").weights
    for name, tensor in checkpoint.load(expected / "last").weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("flags", [("4",), ("2", "--shard"), ("2", "--accumulate", "3", "--gradient-checkpointing")])
def test_any_number_of_processes_is_the_same_run(flags, folder, alone):
    size, *more = flags
    out = "run" + "".join(flags)
    code, _, error = finish(launch(folder, int(size), *COMMON, *more, "--out", out))
    assert code == 0, error
    if "--accumulate" in more:  # then masks are drawn part by part, in one process too
        code, _, error = finish(launch(folder, 1, *COMMON, *more, "--out", f"{out}-alone"))
        assert code == 0, error
        alone = folder / f"{out}-alone"
    assert_same_run(folder / out, alone)


@pytest.mark.parametrize(("first", "then"), [((2,), (1,)), ((2, "--shard"), (3,))])
def test_a_run_goes_on_with_another_number_of_processes(first, then, folder, alone):
    out = f"from{len(first)}{first[0]}to{len(then)}{then[0]}"
    size, *more = first
    running = launch(folder, size, *COMMON, *more, "--out", out)
    while not (folder / out / "last").is_dir():
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    code, _, error = finish(running)
    assert code not in (0, None)
    assert "the same command with --resume" in error
    size, *more = then
    code, output, error = finish(launch(folder, size, *COMMON, *more, "--out", out, "--resume"))
    assert code == 0, error
    assert "resumed at step" in output
    assert_same_run(folder / out, alone)


def test_a_mistake_is_told_once(folder):
    for arguments in ((*COMMON, "--lr", "-1"), (*COMMON, "--out", "weights"), (*COMMON, "--weights", "nowhere")):
        code, _, error = finish(launch(folder, 2, *arguments))
        assert code != 0
        assert error.count("train.py: error: ") == 1, error
        assert 'train.py", line' not in error


def test_when_a_process_dies_all_end_and_the_checkpoint_is_good(folder, alone):
    running = launch(folder, 2, *COMMON, "--out", "died")
    while not (folder / "died/last").is_dir():
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    found = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    started = time.monotonic()
    code, _, error = finish(running)
    assert code != 0
    assert time.monotonic() - started < 60
    assert "SIGKILL" in error
    assert 'train.py", line' not in error  # no traceback of ours
    code, _, error = finish(launch(folder, 2, *COMMON, "--out", "died", "--resume"))
    assert code == 0, error
    assert_same_run(folder / "died", alone)


def test_a_process_that_is_alone_needs_no_group(folder):
    done = run_command("train.py", *COMMON[:-2], "--epochs", "0.2", "--out", str(folder / "one"), cwd=folder, WORLD_SIZE="1")
    assert done.returncode == 0, done.stderr

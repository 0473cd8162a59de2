"""Training in several processes, sharded or not, gives the same result as in one; failure of one process.

Each rank draws its own dropout masks, so equality is tested without dropout.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run_command, tiny_config

import train
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model.checkpoint import load_checkpoint
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training.distributed import Distributed, init_distributed


def test_an_incomplete_environment_is_an_error_that_recommends_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(FunnelError, match="torchrun --nproc-per-node"):
        init_distributed("cpu")


def test_fsdp_needs_several_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(FunnelError, match=r"fsdp .* torchrun"):
        init_distributed("cpu", fsdp=True)


def test_a_single_process_needs_no_collectives():
    dist = Distributed(torch.device("cpu"))
    tensor = torch.tensor(3.0)
    assert dist.sum(tensor) is tensor
    assert dist.mean(tensor) is tensor
    assert dist.max(2) == 2
    assert dist.run_on_main_and_broadcast(lambda: "x") == "x"
    assert dist.first_result(None) is None


TEXTS = [f"{'not ' * (i % 3)}a {'good' if i % 4 else 'bad'} film {'indeed ' * (i % 7)}" for i in range(141)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data and weights; neither the batches nor dev divide evenly by 2 or 4."""
    folder = tmp_path_factory.mktemp("distributed")
    rows = "".join(f"{text}\t{'yes' if 'good' in text else 'no'}\n" for text in TEXTS)
    (folder / "train.tsv").write_text("text\tlabel\n" + rows)
    (folder / "dev.tsv").write_text("text\tlabel\n" + "".join(rows.splitlines(keepends=True)[:67]))
    tokenizer = FunnelTokenizer.train(TEXTS)
    torch.manual_seed(0)
    FunnelForSequenceClassification(tiny_config(vocab_size=tokenizer.vocab_size)).save_pretrained(folder / "weights")
    tokenizer.save(folder / "weights")
    return folder


# 56 steps; the last batch of each epoch has one example.
COMMON = ("--data", "train.tsv", "--dev", "dev.tsv", "--weights", "weights", "--blocks", "1,2x2,1", "--batch-size", "14",
          "--epochs", "5.1", "--lr", "1e-3", "--dtype", "fp32", "--eval-every", "16", "--save-every", "12")  # fmt: skip


def launch(folder, world_size, *arguments):
    """Starts train.py in one process or, with torchrun, in several."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)] if world_size > 1 else []
    return subprocess.Popen(
        [sys.executable, *torchrun, str(ROOT / "train.py"), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def wait_for_checkpoint(process, run):
    while not (run / "last").is_dir():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def single(folder):
    """The run in one process."""
    code, out, error = finish(launch(folder, 1, *COMMON, "--out", "single"))
    assert code == 0, error
    assert "56 steps" in out
    return folder / "single"


def assert_same_run(actual, expected):
    """Every line of the log and every weight agree, up to float32 rounding over 56 steps."""
    lines, expected_lines = lines_of(actual), lines_of(expected)
    assert [(line["step"], line["split"]) for line in lines] == [(line["step"], line["split"]) for line in expected_lines]
    for line, expected_line in zip(lines, expected_lines, strict=True):
        for name in line.keys() - {"examples_per_second", "memory_mib", "split"}:
            assert line[name] == pytest.approx(expected_line[name], rel=1e-4)
    weights = load_checkpoint(actual / "last").weights
    for name, tensor in load_checkpoint(expected / "last").weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("4",),
        ("2", "--grad-accum", "3", "--gradient-checkpointing"),
        ("2", "--fsdp", "--grad-accum", "2", "--gradient-checkpointing"),
    ],
    ids=" ".join,
)
def test_any_number_of_processes_trains_the_same_model(flags, folder, single):
    world_size, *more = flags
    out = "run" + "".join(flags)
    code, _, error = finish(launch(folder, int(world_size), *COMMON, *more, "--out", out))
    assert code == 0, error
    assert_same_run(folder / out, single)


@pytest.mark.slow
def test_a_partly_frozen_model_is_sharded_like_any_other(folder, monkeypatch):
    frozen = (*COMMON, "--epochs", "1", "--freeze-layers", "3")
    process = launch(folder, 2, *frozen, "--fsdp", "--out", "frozen-sharded")
    monkeypatch.chdir(folder)
    assert train.main([*frozen, "--out", "frozen"]) == 0
    code, _, error = finish(process)
    assert code == 0, error
    assert_same_run(folder / "frozen-sharded", folder / "frozen")
    before, after = (load_checkpoint(folder / name).weights for name in ("weights", "frozen-sharded/last"))
    unchanged = {name.rsplit(".", 1)[0] for name in after if name in before and torch.equal(before[name], after[name])}
    assert {"embeddings.word_embeddings", "encoder.blocks.0.0.ffn.linear_1", "encoder.blocks.1.0.ffn.linear_2"} <= unchanged
    assert not {"encoder.blocks.1.1.ffn.linear_1", "classifier.linear_out"} & unchanged


DISTILLED = ("--teacher", "teacher", "--layer-lr-decay", "0.7")


@pytest.fixture(scope="module")
def distilled(folder):
    """A run in one process with a teacher and a group of parameters per layer."""
    torch.manual_seed(1)
    tokenizer = FunnelTokenizer.load(folder / "weights")
    config = tiny_config(vocab_size=tokenizer.vocab_size, id2label={0: "yes", 1: "no"})
    FunnelForSequenceClassification(config).save_pretrained(folder / "teacher")
    tokenizer.save(folder / "teacher")
    code, _, error = finish(launch(folder, 1, *COMMON, *DISTILLED, "--out", "distilled"))
    assert code == 0, error
    return folder / "distilled"


@pytest.mark.slow
def test_several_processes_share_a_teacher(folder, distilled):
    code, _, error = finish(launch(folder, 2, *COMMON, *DISTILLED, "--grad-accum", "2", "--out", "teacher2"))
    assert code == 0, error
    assert_same_run(folder / "teacher2", distilled)


@pytest.mark.slow
def test_a_run_with_a_teacher_and_layer_decay_resumes_with_another_number_of_processes(folder, distilled):
    running = launch(folder, 2, *COMMON, *DISTILLED, "--fsdp", "--out", "resumed")
    wait_for_checkpoint(running, folder / "resumed")
    running.send_signal(signal.SIGTERM)
    finish(running)
    code, output, error = finish(launch(folder, 1, "--out", "resumed", "--resume"))
    assert code == 0, error
    assert "resumed at step" in output
    assert_same_run(folder / "resumed", distilled)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [((2, "--fsdp"), (3,)), ((1,), (2, "--fsdp"))])
def test_a_run_resumes_with_another_number_of_processes(first, second, folder, single):
    out = f"from{first[0]}to{second[0]}{len(second)}"
    world_size, *more = first
    running = launch(folder, world_size, *COMMON, *more, "--out", out)
    wait_for_checkpoint(running, folder / out)
    running.send_signal(signal.SIGTERM)
    code, _, error = finish(running)
    assert code not in (0, None)
    assert "rerun with --resume" in error
    assert "forcefully exiting" not in error  # torchrun kills a worker that hangs at exit
    world_size, *more = second
    code, output, error = finish(launch(folder, world_size, *COMMON, *more, "--out", out, "--resume"))
    assert code == 0, error
    assert "resumed at step" in output
    assert_same_run(folder / out, single)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [("--lr", "-1"), ("--weights", "nowhere")])
def test_an_error_on_all_ranks_is_printed_once(mistake, folder):
    code, _, error = finish(launch(folder, 2, *COMMON, *mistake))
    assert code != 0
    assert error.count("train.py: error: ") == 1, error
    assert 'train.py", line' not in error


@pytest.mark.slow
def test_divergence_ends_all_ranks_with_one_diagnosis(folder):
    diverging = ("--lr", "1e3", "--warmup", "0", "--weight-decay", "1e30", "--out", "diverged")
    code, _, error = finish(launch(folder, 2, *COMMON, "--fsdp", *diverging))
    assert code != 0
    assert error.count("training diverged at step") == 1, error


@pytest.mark.slow
def test_if_a_process_dies_all_end_and_the_checkpoint_is_intact(folder, single):
    running = launch(folder, 2, *COMMON, "--out", "died")
    wait_for_checkpoint(running, folder / "died")
    children = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    started = time.monotonic()
    code, _, error = finish(running)
    assert code != 0
    assert time.monotonic() - started < 60
    assert "SIGKILL" in error
    assert 'train.py", line' not in error  # no traceback of this project
    code, _, error = finish(launch(folder, 2, *COMMON, "--out", "died", "--resume"))
    assert code == 0, error
    assert_same_run(folder / "died", single)


@pytest.mark.slow
def test_world_size_one_needs_no_process_group(folder):
    done = run_command("train.py", *COMMON, "--epochs", "0.2", "--out", str(folder / "one"), cwd=folder, WORLD_SIZE="1")
    assert done.returncode == 0, done.stderr

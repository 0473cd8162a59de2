"""train.py as a user runs it."""

import functools
import json
import math
import os
import shutil
import signal

import pytest
import torch
from conftest import run_command, tiny_config

import train
from funnel.data import demo
from funnel.data.tokenizer import FunnelTokenizer
from funnel.model import checkpoint
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training.distributed import Distributed, GracefulStop

QUICK = ("--epochs", "0.03", "--eval-every", "5", "--blocks", "1,1", "--batch-size", "32")


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    return run_command("train.py", *QUICK, "--out", "run", cwd=folder), folder


def test_a_run_leaves_what_it_promises(run):
    done, folder = run
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (folder / "run").iterdir()) == [
        "best",
        "last",
        "last-1",
        "layout_plan.json",
        "metrics.jsonl",
        "run.json",
    ]
    record = json.loads((folder / "run/run.json").read_text())
    assert " ".join(QUICK) in record["command"]
    assert record["settings"]["blocks"] == "1,1"
    dev = [line for line in lines_of(folder / "run") if line["split"] == "dev"]
    assert [line["step"] for line in dev] == [5, 10, 15, 20, 22]
    assert all({"loss", "accuracy", "f1"} <= line.keys() for line in dev)
    assert any(line["split"] == "train" for line in lines_of(folder / "run"))


def test_the_best_checkpoint_is_the_best_evaluation(run):
    _, folder = run
    best = max(line["accuracy"] for line in lines_of(folder / "run") if line["split"] == "dev")
    model = FunnelForSequenceClassification.from_pretrained(folder / "run/best")
    tokenizer = FunnelTokenizer.load(folder / "run/best")
    _, dev = demo.examples()
    right = 0
    for encoding, label in zip(tokenizer.encode(dev.texts), dev.labels, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([encoding.input_ids]), None, torch.tensor([encoding.token_type_ids]))
        right += int(logits.argmax() == int(label))
    assert right / len(dev.texts) == pytest.approx(best)
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_without_a_terminal_there_is_no_bar_and_the_summary_is_plain(run):
    done, _ = run
    assert "\r" not in done.stdout + done.stderr
    assert "best on dev: step" in done.stdout
    assert "checkpoints and metrics.jsonl in run" in done.stdout


def without_clock(lines):
    return [{k: v for k, v in line.items() if k not in ("examples_per_second", "memory_mib")} for line in lines]


@pytest.mark.parametrize(("dtype", "at"), [("bf16", "step 8"), ("fp32", "evaluation at step 10")])
def test_a_stopped_run_goes_on_bit_for_bit(dtype, at, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    arguments = [*QUICK, "--batch-size", "8", "--epochs", "0.0075", "--eval-every", "10", "--dtype", dtype, "--save-every", "3"]
    assert train.main([*arguments, "--out", str(whole)]) == 0
    step = int(at.split()[-1])
    calls = 0

    def after(function):
        def call(*args, **kwargs):
            nonlocal calls
            result = function(*args, **kwargs)
            calls += 1
            if calls == (step if at.startswith("step") else 2):
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        return call

    if at.startswith("step"):
        monkeypatch.setattr(train.training, "clip_gradients", after(train.training.clip_gradients))
    else:  # in the midst of it: at its second batch
        original, entered = train.training.predict, 0

        def predict(*args, check, **kwargs):
            nonlocal entered
            entered += 1
            return original(*args, check=after(check) if entered == 1 else check, **kwargs)

        monkeypatch.setattr(train.training, "predict", predict)
    assert train.main([*arguments, "--out", str(stopped)]) == 143
    assert f"saved at step {step}; the same command with --resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert train.main([*arguments, "--out", str(stopped), "--resume"]) == 0
    assert f"resumed at step {step}" in capsys.readouterr().out
    for name in ("last", "best"):
        expected, found = checkpoint.load(whole / name).weights, checkpoint.load(stopped / name).weights
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert without_clock(lines_of(stopped)) == without_clock(lines_of(whole))


def test_handlers_of_signals_are_put_back(run):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with GracefulStop(Distributed(torch.device("cpu"))):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_run_without_a_checkpoint_begins_again_and_says_so(run, tmp_path, capsys):
    shutil.copytree(run[1] / "run", tmp_path / "run")
    for path in (tmp_path / "run").glob("last*"):
        shutil.rmtree(path)
    assert train.main([*QUICK, "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert "no checkpoint yet: begins at step 0" in capsys.readouterr().out
    found, expected = lines_of(tmp_path / "run"), lines_of(run[1] / "run")
    assert [(line["step"], line["split"]) for line in found] == [(line["step"], line["split"]) for line in expected]
    # Another process may have summed with another number of threads.
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-4)


def test_a_finished_run_has_nothing_to_resume(run, tmp_path, capsys):
    shutil.copytree(run[1] / "run", tmp_path / "run")
    assert train.main([*QUICK, "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert "nothing left to do" in capsys.readouterr().out


def not_finite(steps, loss_function):
    """A loss function that is nan at some steps."""
    step = 0

    def function(logits, labels):
        nonlocal step
        step += logits.requires_grad  # not in an evaluation
        return loss_function(logits, labels) * (math.nan if step in steps and logits.requires_grad else 1)

    return function


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.training, "loss_function", not_finite({3, 4, 9}, train.training.loss_function))
    assert train.main([*QUICK, "--eval-every", "100", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert out.count("the step is skipped") == 3
    assert "step 3: loss nan" in out
    assert "3 steps were skipped" in out
    assert [line["skipped"] for line in lines_of(tmp_path / "run") if line["split"] == "train"] == [3, 3]
    checkpoint.check_finite(checkpoint.load(tmp_path / "run/last").weights, "last")


def test_more_than_a_few_in_a_row_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.training, "loss_function", not_finite(set(range(9, 99)), train.training.loss_function))
    assert train.main([*QUICK, "--eval-every", "4", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "5 steps in a row were skipped; step 13: loss nan" in error
    assert "lower --lr" in error
    state = torch.load(tmp_path / "run/last/training_state.pt")
    assert state["step"] >= 8
    checkpoint.check_finite(checkpoint.load(tmp_path / "run/last").weights, "last")


@pytest.fixture
def weights(tmp_path):
    """A tiny_config checkpoint of ours with a vocabulary."""
    config = tiny_config(vocab_size=200, id2label={0: "a", 1: "b", 2: "c"})
    tokenizer = FunnelTokenizer.train(["the film was good"] * 5)
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(config)
    checkpoint.save(tmp_path / "weights", config, model.state_dict(), "FunnelForSequenceClassification", tokenizer.save)
    return tmp_path / "weights"


def sst2(folder, train_rows="a good film\t1\na bad film\t0\n", dev_rows="good\t1\n"):
    folder.mkdir()
    (folder / "train.tsv").write_text("sentence\tlabel\n" + train_rows)
    (folder / "dev.tsv").write_text("sentence\tlabel\n" + dev_rows)
    return folder


def test_weights_are_grown_to_the_layout_that_was_asked_for(weights, tmp_path, capsys):
    data = sst2(tmp_path / "data")
    arguments = [
        "--task",
        "sst2",
        "--data",
        str(data),
        "--weights",
        str(weights),
        "--blocks",
        "1,2,2,2",
        "--epochs",
        "1",
    ]
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert "4 layers kept, 3 new: identity), new classifier" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "run/best").config.layout == "1,2,2,2"


def test_a_model_that_sees_one_class_says_so(weights, tmp_path, capsys):
    data = sst2(tmp_path / "data", "film\t1\n" * 8, "good\t1\nfilm\t0\n")
    arguments = ["--task", "sst2", "--data", str(data), "--weights", str(weights), "--lr", "1e-2", "--epochs", "5"]
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert "predicts one class only, 'positive'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--blocks", "2,,2"], ["--blocks", "2,,2"]),
        (["--blocks", "0"], ["--blocks"]),
        (["--blocks", "2,x"], ["--blocks"]),
        (["--blocks=-1"], ["--blocks"]),
        (["--task", "sst3"], ["sst3", "sst2"]),
        (["--task", "sst2", "--data", "none"], ["none", "no such folder"]),
        (["--task", "sst2", "--data", "empty"], ["train.tsv"]),
        (["--epochs", "0"], ["--epochs"]),
        (["--epochs", "nan"], ["--epochs"]),
        (["--lr", "-1"], ["--lr"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--max-length", "2"], ["--max-length 2"]),
        (["--max-length", "18446744073709551616"], ["--max-length"]),
        (["--epochs", "1e308"], ["--epochs"]),
        (["--eval-every", "0"], ["--eval-every"]),
        (["--save-every", "0"], ["--save-every"]),
        (["--keep-checkpoints", "0"], ["--keep-checkpoints"]),
        (["--shard"], ["--shard", "torchrun"]),
        (["--shard", "--dtype", "fp16"], ["--shard", "fp16"]),
        (["--seed", "-1"], ["--seed"]),
        (["--weight-decay", "-1"], ["--weight-decay"]),
        (["--weights", "x" * 300], ["no folder can have this name"]),
        (["--weights", "a/b\nc"], ["no such folder"]),
        (["--task", "sst2", "--data", "x" * 300], ["no such folder"]),
        (["--out", "x" * 300], ["--out"]),
        (["--out", "taken/note"], ["is a file"]),
        (["--warmup", "1"], ["--warmup"]),
        (["--weights", "nowhere"], ["nowhere", "no such folder"]),
        (["--weights", "empty"], ["empty", "config.json"]),
        (["--out", "taken"], ["taken", "--resume"]),
        (["--resume", "--out", "empty"], ["--resume", "holds no run"]),
        (["--resume"], ["--resume", "--out"]),
    ],
)
def test_mistakes_are_one_line_with_status_2_and_write_nothing(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/note").write_text("mine")
    assert train.main(arguments) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.err.startswith("train.py: error: ")
    assert all(word in captured.err for word in words), captured.err
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["empty", "taken", "taken/note"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [("good\t2\n", "line 2: label '2'"), ("good\n", "line 2: 1 fields"), ("", "empty")],
)
def test_a_row_with_a_mistake_is_named_before_anything_is_written(rows, words, weights, tmp_path, capsys):
    data = sst2(tmp_path / "data", dev_rows=rows)
    arguments = ["--task", "sst2", "--data", str(data), "--weights", str(weights), "--out", str(tmp_path / "run")]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert "dev.tsv" in error
    assert words in error
    assert not (tmp_path / "run").exists()


def test_without_a_network_the_default_weights_are_named_with_the_way_out(tmp_path):
    sst2(tmp_path / "data")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = run_command("train.py", "--task", "sst2", "--data", "data", cwd=tmp_path, **offline)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "funnel-transformer/small" in done.stderr
    assert "--weights DIR" in done.stderr
    assert not (tmp_path / "runs").exists()


def plain_weights(folder, words="a good film\na bad film\nnot so"):
    """A checkpoint without dropout."""
    tokenizer = FunnelTokenizer.train(words.splitlines())
    torch.manual_seed(0)
    FunnelForSequenceClassification(tiny_config(vocab_size=tokenizer.vocab_size)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def test_accumulation_checkpointing_and_compilation_train_the_same_model(tmp_path, monkeypatch):
    rows = "".join(f"{'not ' * (i % 2)}a {'good' if i % 3 else 'bad'} film\t{int(i % 3 > 0)}\n" for i in range(37))
    sst2(tmp_path / "data", rows, rows)
    plain_weights(tmp_path / "weights")
    # The compiler's kernels are PyTorch's business, and take minutes: its tracing is enough here.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    common = ("--task", "sst2", "--data", str(tmp_path / "data"), "--weights", str(tmp_path / "weights"), "--epochs", "3",
              "--batch-size", "8", "--lr", "1e-3", "--dtype", "fp32")  # fmt: skip
    found = {}
    for flags in ((), ("--accumulate", "3"), ("--gradient-checkpointing",), ("--compile",)):
        out = tmp_path / ("run" + "".join(flags))
        assert train.main([*common, *flags, "--out", str(out)]) == 0
        found[flags] = checkpoint.load(out / "last").weights
    start = checkpoint.load(tmp_path / "weights").weights
    for flags, weights in found.items():
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, found[()][name], rtol=0, atol=2e-5, msg=f"{flags} {name}")
    assert any((found[()][name] - start[name]).abs().max() > 1e-3 for name in start)

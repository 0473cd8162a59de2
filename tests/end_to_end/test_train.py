"""End-to-end tests of train.py."""

import functools
import json
import math
import os
import re
import shutil
import signal

import pytest
import torch
from conftest import run_command, tiny_config

import train
from funnel.data import demo
from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.checkpoint import Checkpoint, check_finite, load_checkpoint, save_checkpoint
from funnel.model.heads import FunnelForSequenceClassification
from funnel.problems.classification import Classification
from funnel.training import evaluate

QUICK = ("--weights", "none", "--epochs", "0.075", "--eval-every", "5", "--blocks", "1,1", "--batch-size", "32")
MACHINE_DEPENDENT = ("examples_per_second", "memory_mib")


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def reproducible_lines_of(folder):
    return [{k: v for k, v in line.items() if k not in MACHINE_DEPENDENT} for line in lines_of(folder)]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """A run of 22 steps in a separate process: the finished process and its working directory."""
    folder = tmp_path_factory.mktemp("quick")
    return run_command("train.py", *QUICK, "--out", "run", cwd=folder), folder


# --- the files of a run -----------------------------------------------------------------------------------------------


def test_a_run_writes_the_documented_files(quick_run):
    done, folder = quick_run
    assert done.returncode == 0, done.stderr
    files = ["best", "last", "layout_plan.json", "metrics.jsonl", "run.json"]
    assert sorted(p.name for p in (folder / "run").iterdir()) == files
    record = json.loads((folder / "run/run.json").read_text())
    assert " ".join(QUICK) in record["command"]
    assert record["settings"]["blocks"] == "1,1"
    dev = [line for line in lines_of(folder / "run") if line["split"] == "dev"]
    assert [line["step"] for line in dev] == [5, 10, 15, 20, 22]
    assert all({"loss", "accuracy", "f1"} <= line.keys() for line in dev)
    assert any(line["split"] == "train" for line in lines_of(folder / "run"))


def test_the_best_checkpoint_belongs_to_the_best_evaluation(quick_run):
    _, folder = quick_run
    best = max(line["accuracy"] for line in lines_of(folder / "run") if line["split"] == "dev")
    model = FunnelForSequenceClassification.from_pretrained(folder / "run/best")
    tokenizer = FunnelTokenizer.load(folder / "run/best")
    _, dev = demo.examples()
    correct = 0
    for encoding, label in zip(tokenizer.encode(dev.texts), dev.labels, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([encoding.input_ids]), None, torch.tensor([encoding.token_type_ids]))
        correct += int(logits.argmax() == int(label))
    assert correct / len(dev.texts) == pytest.approx(best)
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_without_a_terminal_there_is_no_progress_bar(quick_run):
    done, _ = quick_run
    assert "\r" not in done.stdout + done.stderr
    assert "best on dev: step" in done.stdout
    assert re.search(r"checkpoints and metrics.jsonl are in run \([0-9.]+ MB\)", done.stdout)


# --- stopping and resuming --------------------------------------------------------------------------------------------


def stop_at_call(function, number):
    """Wraps a function so that its `number`-th call is followed by SIGTERM."""
    calls = 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        result = function(*args, **kwargs)
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    return wrapped


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "where", "step"), [("bf16", "training", 8), ("fp32", "evaluation", 10)])
def test_a_stopped_run_resumes_bit_for_bit(dtype, where, step, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    arguments = [*QUICK, "--batch-size", "8", "--epochs", "0.019", "--eval-every", "10", "--dtype", dtype, "--save-every", "3"]
    assert train.main([*arguments, "--out", str(whole)]) == 0
    if where == "training":
        monkeypatch.setattr(train, "train_step", stop_at_call(train.train_step, step))
    else:  # after the second batch of the first evaluation
        original = train.evaluate

        def interrupted(components, datasets, metrics, poll):
            return original(components, datasets, metrics, stop_at_call(poll, 2))

        monkeypatch.setattr(train, "evaluate", interrupted)
    assert train.main([*arguments, "--out", str(stopped)]) == 143
    assert f"rerun with --resume --out {stopped} to continue from step {step}" in capsys.readouterr().err
    monkeypatch.undo()
    assert train.main(["--out", str(stopped), "--resume"]) == 0
    assert f"resumed at step {step}" in capsys.readouterr().out
    for name in ("last", "best"):
        expected, actual = load_checkpoint(whole / name).weights, load_checkpoint(stopped / name).weights
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert reproducible_lines_of(stopped) == reproducible_lines_of(whole)


def test_resuming_without_a_checkpoint_restarts_at_step_0(quick_run, tmp_path, capsys):
    shutil.copytree(quick_run[1] / "run", tmp_path / "run")
    for path in (tmp_path / "run").glob("last*"):
        shutil.rmtree(path)
    assert train.main([*QUICK, "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert "no checkpoint to resume from: starting at step 0" in capsys.readouterr().out
    actual, expected = lines_of(tmp_path / "run"), lines_of(quick_run[1] / "run")
    assert [(line["step"], line["split"]) for line in actual] == [(line["step"], line["split"]) for line in expected]
    # The other process may have used another number of threads.
    assert [line["loss"] for line in actual] == pytest.approx([line["loss"] for line in expected], abs=1e-4)


@pytest.mark.parametrize("arguments", [QUICK, ()])
def test_resuming_a_finished_run_does_nothing(arguments, quick_run, tmp_path, capsys):
    shutil.copytree(quick_run[1] / "run", tmp_path / "run")
    assert train.main([*arguments, "--out", str(tmp_path / "run"), "--resume"]) == 0
    output = capsys.readouterr().out
    assert "nothing left to do" in output
    assert "examples/s" not in output


@pytest.fixture
def own_data(tmp_path, weights, monkeypatch):
    """The working directory, with x.csv and weights; 15 steps per epoch of 8 examples."""
    rows = "".join(f"a {word} film {number},{label}\n" for number in range(66) for word, label in (("good", 1), ("bad", 0)))
    (tmp_path / "x.csv").write_text("text,label\n" + rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


OWN_DATA = ("--data", "x.csv", "--weights", "weights", "--batch-size", "8", "--lr", "1e-3", "--save-every", "4")


def assert_same_run(actual, expected):
    for name in ("last", "best"):
        expected_weights, weights = load_checkpoint(expected / name).weights, load_checkpoint(actual / name).weights
        assert all(torch.equal(weights[key], expected_weights[key]) for key in expected_weights)
    assert reproducible_lines_of(actual) == reproducible_lines_of(expected)


def test_a_run_resumes_from_another_directory_after_its_data_was_moved_and_its_weights_deleted(own_data, monkeypatch, capsys):
    assert train.main([*OWN_DATA, "--epochs", "1", "--out", "whole"]) == 0
    monkeypatch.setattr(train, "train_step", stop_at_call(train.train_step, 6))
    assert train.main([*OWN_DATA, "--epochs", "1", "--blocks", "1,2,1", "--out", "run"]) == 143
    monkeypatch.undo()
    record, plan = ((own_data / "run" / name).read_bytes() for name in ("run.json", "layout_plan.json"))
    (own_data / "x.csv").rename(own_data / "y.csv")
    shutil.rmtree(own_data / "weights")
    monkeypatch.chdir("/")
    assert train.main(["--resume", "--out", str(own_data / "run"), "--data", str(own_data / "y.csv")]) == 0
    assert "resumed at step 6\n" in capsys.readouterr().out
    assert_same_run(own_data / "run", own_data / "whole")
    assert record == (own_data / "run/run.json").read_bytes()
    assert plan == (own_data / "run/layout_plan.json").read_bytes()


@pytest.mark.parametrize("more", [(), ("--keep-optimizer",)])
def test_added_epochs_resume_bit_for_bit(more, own_data, monkeypatch, capsys):
    assert train.main([*OWN_DATA, *more, "--epochs", "1", "--out", "whole"]) == 0
    shutil.copytree("whole", "stopped")
    assert train.main(["--resume", "--out", "whole", "--epochs", "2"]) == 0
    start = "the saved optimizer state, no warmup" if more else "a new optimizer state and a new warmup"
    assert f"resumed at step 15: a new schedule for 15 more steps, with {start}" in capsys.readouterr().out
    original = train.train_step
    monkeypatch.setattr(train, "train_step", stop_at_call(original, 2))
    assert train.main(["--resume", "--out", "stopped", "--epochs", "2"]) == 143
    monkeypatch.setattr(train, "train_step", original)
    assert train.main(["--resume", "--out", "stopped"]) == 0
    assert_same_run(own_data / "stopped", own_data / "whole")
    rates = [line["lr"] for line in lines_of(own_data / "whole") if line["split"] == "train" and line["step"] > 15]
    assert max(rates) <= 1e-3
    assert rates[-1] == pytest.approx(1e-3 / (14 if more else 13))  # the last step of the new schedule


def test_an_argument_that_cannot_change_is_refused_before_the_data_is_read(own_data, capsys):
    assert train.main([*OWN_DATA, "--epochs", "0.2", "--out", "run"]) == 0
    (own_data / "x.csv").unlink()
    assert train.main(["--resume", "--out", "run", "--lr", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: --lr 1.0: run was started with 0.001; omit --lr")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("out", "words"), [("taken", "not empty"), ("taken/note", "found a file"), ("taken/note/run", "write")]
)
def test_a_wrong_run_folder_is_reported_before_data_and_weights_are_read(out, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/note").write_text("mine")
    monkeypatch.setattr(train, "load", lambda *_: pytest.fail("data were read"))
    assert train.main(["--out", out]) == 2
    assert words in capsys.readouterr().err


def test_unknown_flags_return_2_and_help_returns_0(capsys):
    assert train.main(["--unknown"]) == 2
    assert train.main(["--help"]) == 0
    assert "unrecognized arguments: --unknown" in capsys.readouterr().err


# --- non-finite steps -------------------------------------------------------------------------------------------------


def nan_at_steps(steps, loss_function):
    """A loss function that returns NaN at some training steps, counted from 1."""
    step = 0

    def function(*args):
        nonlocal step
        step += 1
        return loss_function(*args) * (math.nan if step in steps else 1)

    return function


def test_a_nonfinite_loss_ends_the_run_and_leaves_the_last_checkpoint_intact(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Classification, "loss", nan_at_steps({9}, Classification.loss))
    assert train.main([*QUICK, "--eval-every", "4", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "training diverged at step 9" in error
    assert "lower the learning rate" in error
    assert torch.load(tmp_path / "run/last/training_state.pt")["step"] == 8
    check_finite(load_checkpoint(tmp_path / "run/last").weights, "last")
    assert max(line["step"] for line in lines_of(tmp_path / "run")) == 8


def test_divergence_is_detected_within_log_every_steps(tmp_path, monkeypatch, capsys):
    steps = 0
    original = train.train_step

    def count(*args, **options):
        nonlocal steps
        steps += 1
        return original(*args, **options)

    monkeypatch.setattr(train, "train_step", count)
    monkeypatch.setattr(Classification, "loss", nan_at_steps({3}, Classification.loss))
    assert train.main([*QUICK, "--eval-every", "100", "--log-every", "6", "--out", str(tmp_path / "run")]) == 2
    assert "diverged at step 3" in capsys.readouterr().err
    assert steps == 6


def overflow_at_evaluation(number, evaluate):
    """Wraps `evaluate` so that the logits of its `number`-th call are infinite."""
    calls = 0

    def function(*args):
        nonlocal calls
        calls += 1
        results = evaluate(*args)
        if calls == number:
            results["dev"].results[3] = math.inf
        return results

    return function


def test_an_evaluation_with_nonfinite_logits_ends_the_run_and_records_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "evaluate", overflow_at_evaluation(2, train.evaluate))
    assert train.main([*QUICK, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "evaluation at step 10: the logits of 1 example of dev are not finite in fp32" in error
    assert torch.load(tmp_path / "run/last/training_state.pt")["step"] == 5
    assert [line["step"] for line in lines_of(tmp_path / "run") if line["split"] == "dev"] == [5]


# --- weights, tasks, warnings -----------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    """A tiny checkpoint with a vocabulary and a classifier of three classes."""
    config = tiny_config(vocab_size=200, id2label={0: "a", 1: "b", 2: "c"})
    tokenizer = FunnelTokenizer.train(["the film was good"] * 5)
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(config)
    checkpoint = Checkpoint(config, model.state_dict(), "FunnelForSequenceClassification")
    save_checkpoint(tmp_path / "weights", checkpoint, tokenizer.save)
    return tmp_path / "weights"


def write_sst2(folder, train_rows="a good film\t1\na bad film\t0\n", dev_rows="good\t1\n"):
    folder.mkdir()
    (folder / "train.tsv").write_text("sentence\tlabel\n" + train_rows)
    (folder / "dev.tsv").write_text("sentence\tlabel\n" + dev_rows)
    return folder


def sst2_arguments(data, weights, *more):
    return ["--task", "sst2", "--data", str(data), "--weights", str(weights), *more]


def test_weights_are_extended_to_the_requested_layout(weights, tmp_path, capsys):
    data = write_sst2(tmp_path / "data")
    arguments = sst2_arguments(data, weights, "--blocks", "1,2,2,2", "--epochs", "1")
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert "4 layers kept, 3 new: identity), new classifier" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run/best").config.layout == "1,2,2,2"


def test_predicting_a_single_class_prints_a_warning(weights, tmp_path, capsys):
    data = write_sst2(tmp_path / "data", "film\t1\n" * 8, "good\t1\nfilm\t0\n")
    arguments = sst2_arguments(data, weights, "--lr", "1e-2", "--epochs", "5")
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    assert re.search("the best checkpoint .step [1-5]. predicts 'positive' for all 2 examples of dev", output)
    assert "try more epochs or a lower learning rate" in output


def test_the_single_class_warning_is_about_the_best_checkpoint(weights, tmp_path, monkeypatch, capsys):
    data = write_sst2(tmp_path / "data", "film\t1\n" * 8, "good\t1\nfilm\t0\n")
    logits = iter([[[9.0, 0], [0, 9]], [[0.0, 9], [9, 0]], [[9.0, 0], [9, 0]]])  # wrong, correct, one class
    monkeypatch.setattr(evaluate, "predict", lambda *_: torch.tensor(next(logits)))
    arguments = sst2_arguments(data, weights, "--epochs", "3", "--out", str(tmp_path / "run"))
    assert train.main(arguments) == 0
    output = capsys.readouterr().out
    assert "best on dev: step 2: " in output
    assert "predicts" not in output


def write_scores(path):
    rows = [f"a {word} film,{price}.5\n" for word, price in (("cheap", 10_000), ("fair", 50_000), ("grand", 90_000))] * 20
    path.write_text("text,label\n" + "".join(rows))
    return path


def test_scores_of_any_scale_are_learned(tmp_path, capsys):
    data, out = write_scores(tmp_path / "prices.csv"), tmp_path / "run"
    arguments = ["--data", str(data), "--weights", "none", "--blocks", "1,1", "--batch-size", "4", "--epochs", "4"]
    assert train.main([*arguments, "--metric", "rmse", "--seed", "1", "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert re.search(r"labels: mean (4|5)\d{4}\.?\d*, standard deviation 3\d{4}", output)
    assert "learning rate 0.0005" in output  # random weights
    assert json.loads((out / "run.json").read_text())["settings"]["metrics"] == ["rmse", "pearson", "spearman"]
    dev = [line for line in lines_of(out) if line["split"] == "dev"]
    best = min(dev, key=lambda line: line["rmse"])
    assert best["rmse"] < 10_000
    assert best["loss"] == pytest.approx(best["rmse"] ** 2)
    assert f"best on dev: step {best['step']}: " in output
    train_losses = [line["loss"] for line in lines_of(out) if line["split"] == "train"]
    assert 1e7 < train_losses[0] < 1e10  # squared units of the labels
    assert load_checkpoint(out / "best").config.label_mean == pytest.approx(50_000.5, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--blocks", "2,,2"], ["invalid --blocks '2,,2': expected layer counts such as 4,4,4"]),
        (["--blocks", "0"], ["--blocks"]),
        (["--blocks", "2,x"], ["--blocks"]),
        (["--blocks=-1"], ["--blocks"]),
        (["--task", "sst3"], ["--task", "sst3", "sst2"]),
        (["--task", "sst2", "--data", "none"], ["none", "no such folder"]),
        (["--task", "sst2", "--data", "empty"], ["train.tsv"]),
        (["--epochs", "0"], ["--epochs"]),
        (["--epochs", "nan"], ["--epochs"]),
        (["--epochs", "many"], ["--epochs"]),
        (["--epoch", "1"], ["--epoch"]),
        (["--lr", "-1"], ["--lr"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--weights", "none", "--max-length", "2"], ["--max-length"]),
        (["--weights", "none", "--max-length", "18446744073709551616"], ["--max-length"]),
        (["--epochs", "1e308"], ["--epochs"]),
        (["--eval-every", "0"], ["--eval-every"]),
        (["--save-every", "0"], ["--save-every"]),
        (["--keep-checkpoints", "0"], ["--keep-checkpoints"]),
        (["--fsdp"], ["--fsdp", "torchrun"]),
        (["--fsdp", "--dtype", "fp16"], ["--fsdp", "fp16"]),
        (["--seed", "-1"], ["--seed"]),
        (["--weight-decay", "-1"], ["--weight-decay"]),
        (["--weights", "x" * 300], ["--weights"]),
        (["--weights", "a/b\nc"], ["no such folder"]),
        (["--task", "sst2", "--data", "x" * 300], ["no such folder"]),
        (["--out", "x" * 300], ["cannot write xxx", "File name too long"]),
        (["--out", "taken/note"], ["found a file"]),
        (["--warmup", "1"], ["--warmup"]),
        (["--weights", "nowhere"], ["nowhere", "no such folder"]),
        (["--weights", "empty"], ["empty", "config.json"]),
        (["--out", "taken"], ["taken", "resume"]),
        (["--resume", "--out", "empty"], ["--resume", "no run in"]),
        (["--resume"], ["--out", "resume"]),
    ],
)
def test_errors_print_one_line_exit_with_status_2_and_write_nothing(arguments, words, tmp_path, capsys, monkeypatch):
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


@pytest.mark.parametrize(("rows", "words"), [("good\t2\n", "line 2"), ("good\n", "line 2"), ("", "empty")])
def test_an_invalid_row_is_reported_before_anything_is_written(rows, words, weights, tmp_path, capsys):
    data = write_sst2(tmp_path / "data", dev_rows=rows)
    assert train.main(sst2_arguments(data, weights, "--out", str(tmp_path / "run"))) == 2
    error = capsys.readouterr().err
    assert "dev.tsv" in error
    assert words in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_a_network_the_error_says_how_to_use_local_weights(tmp_path):
    write_sst2(tmp_path / "data")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = run_command("train.py", "--task", "sst2", "--data", "data", cwd=tmp_path, **offline)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "funnel-transformer/small" in done.stderr
    assert "--weights" in done.stderr
    assert not (tmp_path / "runs").exists()


# --- the same model with less memory ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_grad_accum_checkpointing_and_compile_train_the_same_model(tmp_path, monkeypatch):
    rows = "".join(f"{'not ' * (i % 2)}a {'good' if i % 3 else 'bad'} film\t{int(i % 3 > 0)}\n" for i in range(37))
    write_sst2(tmp_path / "data", rows, rows)
    tokenizer = FunnelTokenizer.train(["a good film", "a bad film", "not so"])
    torch.manual_seed(0)
    FunnelForSequenceClassification(tiny_config(vocab_size=tokenizer.vocab_size)).save_pretrained(tmp_path / "weights")
    tokenizer.save(tmp_path / "weights")
    # Only tracing is tested: generating kernels takes minutes, and they are tested by PyTorch.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    common = sst2_arguments(tmp_path / "data", tmp_path / "weights", "--epochs", "3", "--batch-size", "8", "--lr", "1e-3",
                            "--dtype", "fp32")  # fmt: skip
    results = {}
    for flags in ((), ("--grad-accum", "3"), ("--gradient-checkpointing",), ("--compile",)):
        out = tmp_path / ("run" + "".join(flags))
        assert train.main([*common, *flags, "--out", str(out)]) == 0
        results[flags] = load_checkpoint(out / "last").weights
    initial = load_checkpoint(tmp_path / "weights").weights
    for flags, weights in results.items():
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, results[()][name], rtol=0, atol=2e-5, msg=f"{flags} {name}")
    assert any((results[()][name] - initial[name]).abs().max() > 1e-3 for name in initial)

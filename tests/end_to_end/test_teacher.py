"""train.py with a teacher, and with layer-wise learning-rate decay."""

import random
import shutil

import pytest
import torch
from conftest import tiny_config
from test_train import assert_same_run, lines_of, stop_at_call

import train
from funnel.data.tokenizer import FunnelTokenizer
from funnel.io import read_json
from funnel.model.checkpoint import load_checkpoint
from funnel.model.heads import FunnelForSequenceClassification

ROWS = [f"a {word} film {number}\t{label}" for number in range(66) for word, label in (("good", "yes"), ("bad", "no"))]


def write_rows(path, rows):
    path.write_text("text\tlabel\n" + "".join(f"{row}\n" for row in rows))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with data, weights, and the run of a teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    write_rows(folder / "train.tsv", ROWS)
    write_rows(folder / "dev.tsv", ROWS[::5])
    tokenizer = FunnelTokenizer.train(["a good bad film"] * 5 + [str(number) for number in range(66)])
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config(vocab_size=tokenizer.vocab_size, blocks="2,1", hidden_dropout=0.1))
    model.save_pretrained(folder / "weights")
    tokenizer.save(folder / "weights")
    arguments = ["--data", "train.tsv", "--dev", "dev.tsv", "--weights", "weights", "--lr", "3e-3", "--batch-size", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main([*arguments, "--epochs", "4", "--out", "teacher"]) == 0
    assert max(line.get("accuracy", 0) for line in lines_of(folder / "teacher")) == 1
    return folder


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch):
    """A copy of the folder, as working directory."""
    shutil.copytree(prepared, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


COMMON = ("--data", "train.tsv", "--dev", "dev.tsv", "--weights", "weights", "--batch-size", "8", "--lr", "3e-3",
          "--save-every", "4")  # fmt: skip
TEACHER = ("--teacher", "teacher")


def test_a_student_learns_from_its_teacher_without_labels(folder):
    texts, labels = zip(*(row.split("\t") for row in ROWS), strict=True)
    shuffled = random.Random(0).sample(labels, len(labels))
    write_rows(folder / "train.tsv", [f"{text}\t{label}" for text, label in zip(texts, shuffled, strict=True)])
    accuracies = []
    for flags in (("--teacher-weight", "1", *TEACHER), ()):
        out = "run" + "".join(flags).replace("/", "")
        assert train.main([*COMMON, *flags, "--blocks", "1,1", "--epochs", "4", "--out", out]) == 0
        accuracies.append([line for line in lines_of(folder / out) if line["split"] == "dev"][-1]["accuracy"])
    assert accuracies[0] == 1
    assert accuracies[1] < 0.8


def test_a_run_with_a_teacher_resumes_from_another_directory(folder, monkeypatch, capsys):
    arguments = [*COMMON, *TEACHER, "--teacher-weight", "0.7", "--epochs", "0.8"]
    assert train.main([*arguments, "--out", "whole"]) == 0
    assert "teacher: teacher, weight 0.7" in capsys.readouterr().out
    monkeypatch.setattr(train, "train_step", stop_at_call(train.train_step, 6))
    assert train.main([*arguments, "--out", "run"]) == 143
    monkeypatch.undo()
    monkeypatch.chdir("/")
    assert read_json(folder / "run/run.json")["arguments"]["teacher"] == str(folder / "teacher")
    assert train.main(["--resume", "--out", str(folder / "run")]) == 0
    assert_same_run(folder / "run", folder / "whole")


def test_a_run_is_not_resumed_with_another_teacher(folder, capsys):
    assert train.main([*COMMON, *TEACHER, "--epochs", "0.2", "--out", "run"]) == 0
    shutil.copytree("teacher", "moved")
    assert train.main(["--resume", "--out", "run", "--teacher", "moved", "--epochs", "0.4"]) == 0
    assert train.main([*COMMON, "--epochs", "0.2", "--out", "other"]) == 0
    assert train.main(["--resume", "--out", "run", "--teacher", "other", "--epochs", "0.6"]) == 2
    assert "--teacher: its weights have changed" in capsys.readouterr().err


def test_the_loss_that_is_logged_has_the_teachers_part(folder):
    for weight in ("0", "0.5"):
        assert train.main([*COMMON, *TEACHER, "--teacher-weight", weight, "--epochs", "0.2", "--out", f"run{weight}"]) == 0
    assert train.main([*COMMON, "--epochs", "0.2", "--out", "plain"]) == 0
    plain, zero, half = (
        [line for line in lines_of(folder / run) if line["split"] == "train"] for run in ("plain", "run0", "run0.5")
    )
    assert zero[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=1e-5)
    assert half[-1]["loss"] > 1.05 * plain[-1]["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--teacher", "nowhere"), "--teacher: nowhere: no such folder"),
        (("--teacher", "weights"), "--teacher weights: its labels are LABEL_0, LABEL_1, those of the task no, yes"),
        (("--teacher-weight", "0.3"), "--teacher-weight has no effect without a teacher"),
        (("--teacher-weight", "2"), "invalid --teacher-weight 2.0: expected a number in [0, 1]"),
        (("--layer-lr-decay", "0"), "invalid --layer-lr-decay 0.0: expected a number in (0, 1]"),
    ],
)
def test_invalid_arguments_are_reported_before_anything_is_written(arguments, message, folder, capsys):
    assert train.main([*COMMON, *arguments, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (folder / "run").exists()


def test_a_run_with_layer_lr_decay_resumes_bit_for_bit(folder, monkeypatch):
    arguments = [*COMMON, "--layer-lr-decay", "0.5", "--epochs", "0.8", "--log-every", "1"]
    assert train.main([*arguments, "--out", "whole"]) == 0
    monkeypatch.setattr(train, "train_step", stop_at_call(train.train_step, 6))
    assert train.main([*arguments, "--out", "run"]) == 143
    monkeypatch.undo()
    assert train.main(["--resume", "--out", str(folder / "run")]) == 0
    assert_same_run(folder / "run", folder / "whole")
    rates = [line["lr"] for line in lines_of(folder / "run") if line["split"] == "train"]
    assert max(rates) == pytest.approx(3e-3)  # that of the head
    initial, final = load_checkpoint(folder / "weights").weights, load_checkpoint(folder / "run/last").weights
    steps = [
        (final[name] - initial[name]).abs().max()
        for name in ("embeddings.layer_norm.bias", "encoder.blocks.1.0.ffn.layer_norm.bias")
    ]
    assert steps[0] < 0.3 * steps[1]  # three layers: a factor of 0.125 between the rates

"""End-to-end tests of pretrain.py."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_command, tiny_config

import pretrain
import train
from funnel.cli import main as cli
from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.checkpoint import load_checkpoint
from funnel.model.heads import FunnelForMaskedLM, FunnelForPreTraining, FunnelModel

MACHINE_DEPENDENT = ("examples_per_second", "memory_mib")
SETTINGS = ("--batch-size", "6", "--max-length", "24", "--lr", "1e-3", "--dtype", "fp32", "--log-every", "4")
OBJECTIVES = {
    "electra": ("--weights", "weights"),
    "mlm": ("--weights", "weights", "--objective", "mlm", "--whole-words"),
    "distill": ("--teacher", "teacher", "--objective", "distill", "--blocks", "1,1", "--decoder-layers", "1"),
}


def sentence(generator: random.Random) -> str:
    subject, other = generator.sample(["cat", "dog", "bird", "fish"], 2)
    return f"the {subject} {generator.choice(['sees', 'hears', 'follows'])} the {other} ."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of 60 documents, weights of a Funnel without dropout, and a BERT-like teacher."""
    folder = tmp_path_factory.mktemp("pretrain")
    generator = random.Random(0)
    documents = [" ".join(sentence(generator) for _ in range(generator.randint(1, 9))) for _ in range(60)]
    (folder / "corpus.txt").write_text("\n\n".join(documents) + "\n")
    tokenizer = FunnelTokenizer.train(documents)
    torch.manual_seed(0)
    size = {"vocab_size": tokenizer.vocab_size, "d_model": 16}
    FunnelForPreTraining(tiny_config(**size)).save_pretrained(folder / "weights")
    bert = {"blocks": "2", "relative_attention": False, "position_embeddings": 32, "num_decoder_layers": 0}
    FunnelModel(tiny_config(**size, **bert)).save_pretrained(folder / "teacher")
    for name in ("weights", "teacher"):
        tokenizer.save(folder / name)
    return folder


def run(folder, *arguments, monkeypatch):
    monkeypatch.chdir(folder)
    corpus = [] if "--corpus" in arguments else ["--corpus", "corpus.txt"]
    return pretrain.main([*corpus, *SETTINGS, *arguments])


def reproducible_lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MACHINE_DEPENDENT} for line in lines]


def weights_of(folder):
    return load_checkpoint(folder).weights


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_held_out_loss_falls(objective, folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    arguments = ("--steps", "60", "--eval-every", "20", "--lr", "5e-3", "--out", str(out))
    assert run(folder, *OBJECTIVES[objective], *arguments, monkeypatch=monkeypatch) == 0
    evaluations = [line for line in reproducible_lines_of(out) if line["split"] == "dev"]
    assert [line["step"] for line in evaluations] == [20, 40, 60]
    name = "generator_loss" if objective == "electra" else "loss"  # the discriminator's task becomes harder
    assert evaluations[-1][name] < 0.95 * evaluations[0][name]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_stopped_run_resumes_bit_for_bit(objective, folder, tmp_path, monkeypatch):
    arguments = (*OBJECTIVES[objective], "--eval-every", "6", "--save-every", "5", "--steps", "14")
    assert run(folder, *arguments, "--out", str(tmp_path / "whole"), monkeypatch=monkeypatch) == 0

    class Stop(Exception):
        pass

    steps, original = 0, pretrain.train_step

    def stop_at_12(*args, **options):
        nonlocal steps
        steps += 1
        if steps == 12:
            raise Stop
        return original(*args, **options)

    monkeypatch.setattr(pretrain, "train_step", stop_at_12)
    with pytest.raises(Stop):
        run(folder, *arguments, "--out", str(tmp_path / "stopped"), monkeypatch=monkeypatch)
    monkeypatch.setattr(pretrain, "train_step", original)
    monkeypatch.chdir(tmp_path)
    assert pretrain.main(["--resume", "--out", "stopped"]) == 0
    assert reproducible_lines_of(tmp_path / "stopped") == reproducible_lines_of(tmp_path / "whole")
    for part in ("last", "last/generator") if objective == "electra" else ("last",):
        expected, actual = (weights_of(tmp_path / name / part) for name in ("whole", "stopped"))
        assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())


def test_a_new_model_has_the_given_sizes(folder, tmp_path, monkeypatch):
    sizes = ("--tokenizer", "weights", "--blocks", "1,1,1", "--d-model", "32", "--n-head", "2", "--d-inner", "48")
    arguments = (*sizes, "--decoder-layers", "1", "--steps", "2", "--out", str(tmp_path / "run"))
    assert run(folder, *arguments, monkeypatch=monkeypatch) == 0
    config = load_checkpoint(tmp_path / "run/last").config
    assert (config.layout, config.d_model, config.n_head, config.d_inner) == ("1,1,1", 32, 2, 48)
    assert config.num_decoder_layers == 1


def test_the_result_can_be_fine_tuned(folder, tmp_path, monkeypatch, capsys):
    assert run(folder, *OBJECTIVES["electra"], "--steps", "2", "--out", str(tmp_path / "run"), monkeypatch=monkeypatch) == 0
    (tmp_path / "data.csv").write_text("text,label\n" + "the cat sees the dog,a\nthe dog hears the cat,b\n" * 20)
    arguments = ["--data", str(tmp_path / "data.csv"), "--weights", str(tmp_path / "run"), "--epochs", "1"]
    assert train.main([*arguments, "--blocks", "1,1,1,1", "--out", str(tmp_path / "fine-tuned")]) == 0
    assert "new classifier" in capsys.readouterr().out


def test_electra_continues_with_the_generator_of_its_weights(folder, tmp_path, monkeypatch):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert run(folder, *OBJECTIVES["electra"], "--steps", "3", "--out", first, monkeypatch=monkeypatch) == 0
    arguments = ("--weights", first, "--steps", "1", "--lr", "1e-12", "--weight-decay", "0", "--out", second)
    assert run(folder, *arguments, monkeypatch=monkeypatch) == 0
    expected, actual = (weights_of(tmp_path / name / "last/generator") for name in ("first", "second"))
    assert all(torch.allclose(tensor, actual[name], atol=1e-6) for name, tensor in expected.items())


def test_electra_keeps_the_generator_if_the_layout_stays(folder, tmp_path, monkeypatch, capsys):
    first = str(tmp_path / "first")
    assert run(folder, *OBJECTIVES["electra"], "--steps", "1", "--out", first, monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    layout = load_checkpoint(tmp_path / "first/last").config.layout
    for blocks, is_new in ((layout, False), ("1,1,1,1", True)):
        out = str(tmp_path / blocks)
        arguments = ("--weights", first, "--blocks", blocks, "--steps", "1", "--out", out)
        assert run(folder, *arguments, monkeypatch=monkeypatch) == 0
        assert ("a new one is trained" in capsys.readouterr().out) == is_new


@pytest.mark.parametrize("states", ["pooled", "blocks"])
def test_distillation_of_other_states_with_pairs(states, folder, tmp_path, monkeypatch):
    arguments = (*OBJECTIVES["distill"], "--states", states, "--pairs", "--steps", "3", "--out", str(tmp_path / "run"))
    assert run(folder, *arguments, monkeypatch=monkeypatch) == 0


def test_a_tokenizer_is_trained_on_the_corpus_once(folder, tmp_path, monkeypatch):
    sizes = ("--vocab", "120", "--d-model", "16", "--blocks", "1,1", "--steps", "1", "--batch-size", "4")
    assert run(folder, *sizes, "--out", str(tmp_path / "first"), monkeypatch=monkeypatch) == 0
    monkeypatch.setattr(FunnelTokenizer, "train_wordpiece", None)  # read from the cache
    assert run(folder, *sizes, "--out", str(tmp_path / "second"), monkeypatch=monkeypatch) == 0
    first, second = (FunnelTokenizer.load(tmp_path / name / "last") for name in ("first", "second"))
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    assert first.vocab_size <= 120


def test_masked_lm_continues_a_masked_lm_with_its_head(folder, tmp_path, monkeypatch, capsys):
    config = tiny_config(vocab_size=FunnelTokenizer.load(folder / "weights").vocab_size, d_model=16, lm_head_transform=True)
    FunnelForMaskedLM(config).save_pretrained(tmp_path / "mlm")
    FunnelTokenizer.load(folder / "weights").save(tmp_path / "mlm")
    arguments = ("--objective", "mlm", "--weights", str(tmp_path / "mlm"), "--steps", "1", "--out", str(tmp_path / "run"))
    assert run(folder, *arguments, monkeypatch=monkeypatch) == 0
    assert "new head" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--corpus", "missing.txt"], ["missing.txt", "no such file"]),
        (["--corpus", "empty.txt"], ["--corpus", "empty.txt"]),
        (["--corpus", "binary.txt"], ["binary.txt", "UTF-8"]),
        (["--corpus", "one.txt"], ["--corpus", "document"]),
        (["--corpus", "corpus.txt", "--corpus", "corpus.txt"], ["--corpus", "same content"]),
        (["--batch-size", "100000"], ["--batch-size", "sequences"]),
        (["--objective", "distill"], ["--teacher"]),
        (["--teacher", "teacher"], ["--teacher", "distill"]),
        (["--d-model", "64"], ["--d-model", "weights"]),
        (["--states", "blocks"], ["--states", "electra"]),
        (["--weights", "none", "--tokenizer", "weights", "--vocab", "200"], ["--vocab", "tokenizer"]),
        (["--weights", "none", "--init", "copy"], ["--init", "new model"]),
        (["--max-length", "4"], ["--max-length"]),
        (["--steps", "0"], ["--steps"]),
        (["--mask-share", "0"], ["--mask-share"]),
        (["--resume"], ["--out"]),
        (["--resume", "--out", "fine-tuned"], ["--resume", "train.py"]),
    ],
)
def test_errors_print_one_line_exit_with_status_2_and_write_nothing(arguments, words, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("corpus.txt", "weights", "teacher"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "one.txt").write_text("the cat sees the dog .\n")
    (tmp_path / "binary.txt").write_bytes(b"the cat \xff sees\n")
    (tmp_path / "fine-tuned").mkdir()
    record = {"version": 3, "command": "", "settings": {"steps": 1}, "arguments": {"task": "demo"}}
    (tmp_path / "fine-tuned/run.json").write_text(json.dumps(record))
    before = sorted(tmp_path.rglob("*"))
    corpus = [] if "--corpus" in arguments else ["--corpus", "corpus.txt"]
    given = [*corpus, "--weights", "weights", "--steps", "2", *SETTINGS, *arguments]
    assert pretrain.main(given if "--resume" not in arguments else arguments) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1
    assert all(word in captured.err for word in words), captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_changed_corpus_is_noticed_on_resume(folder, tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text((folder / "corpus.txt").read_text())
    arguments = ("--weights", "weights", "--steps", "2", "--corpus", str(corpus), "--out", str(tmp_path / "run"))
    assert run(folder, *arguments, monkeypatch=monkeypatch) == 0
    with corpus.open("a") as file:
        file.write("\nthe fish follows the bird .\n")
    assert pretrain.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "4"]) == 2
    assert "the data has changed since the run was started" in capsys.readouterr().err


def test_reports_refuse_a_pretraining_run(folder, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "run")
    assert run(folder, *OBJECTIVES["mlm"], "--steps", "1", "--out", out, monkeypatch=monkeypatch) == 0
    assert cli.main(["report", out, "--out", str(tmp_path / "report.html")]) == 2
    assert "pretraining run" in capsys.readouterr().err


def test_a_finished_run_names_the_flag_that_makes_it_longer(folder, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "run")
    assert run(folder, *OBJECTIVES["mlm"], "--steps", "1", "--out", out, monkeypatch=monkeypatch) == 0
    assert pretrain.main(["--resume", "--out", out]) == 0
    assert "to train longer, increase steps" in capsys.readouterr().out


def test_train_py_refuses_to_resume_a_pretraining_run(folder, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "run")
    assert run(folder, *OBJECTIVES["mlm"], "--steps", "1", "--out", out, monkeypatch=monkeypatch) == 0
    assert train.main(["--resume", "--out", out]) == 2
    assert "pretrain.py" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_give_the_losses_of_one(objective, folder, tmp_path):
    arguments = ["--corpus", "corpus.txt", *SETTINGS, *OBJECTIVES[objective], "--steps", "12", "--eval-every", "6"]
    for name, launcher in {
        "one": [],
        "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    }.items():
        command = [sys.executable, *launcher, str(ROOT / "pretrain.py"), *arguments, "--out", str(tmp_path / name)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (reproducible_lines_of(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two)
    for expected, actual in zip(one, two, strict=True):
        assert actual.pop("split") == expected.pop("split")
        assert actual == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_sigterm_saves_a_checkpoint_and_names_the_command_to_resume(folder, tmp_path, monkeypatch, capsys):
    original = pretrain.train_step

    def step_and_terminate(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    monkeypatch.setattr(pretrain, "train_step", step_and_terminate)
    out = tmp_path / "run"
    assert run(folder, *OBJECTIVES["electra"], "--steps", "9", "--out", str(out), monkeypatch=monkeypatch) == 143
    assert f"rerun with --resume --out {out} to continue from step 1" in capsys.readouterr().err
    assert torch.load(out / "last/training_state.pt")["step"] == 1


def test_the_help_text_names_all_objectives():
    done = run_command("pretrain.py", "--help", cwd=ROOT)
    assert all(word in done.stdout for word in ("electra", "mlm", "distill", "--corpus"))

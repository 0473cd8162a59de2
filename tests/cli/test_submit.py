"""`funnel submit`."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config

from funnel.cli.main import main
from funnel.data.tasks import TASKS
from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.heads import FunnelForSequenceClassification


@pytest.fixture
def glue(tmp_path) -> Path:
    """A GLUE folder with only the test files of SST-2 and MNLI."""
    for name in ("sst2", "mnli"):
        task = TASKS[name]
        (tmp_path / "glue" / task.title).mkdir(parents=True)
        for file in task.tests.values():
            header = "\t".join(["index", *map(str, file.text_columns)])
            rows = [f"{i}\t" + "\t".join(["a good film"] * len(file.text_columns)) for i in range(2)]
            (tmp_path / "glue" / task.title / file.path).write_text("\n".join([header, *rows]) + "\n")
    return tmp_path / "glue"


def write_run(folder: Path, task: str) -> Path:
    """A run with a random classifier of a task's labels."""
    torch.manual_seed(0)
    tokenizer = FunnelTokenizer.train(["a good film"] * 5)
    labels = TASKS[task].labels if task in TASKS else {"0": "no", "1": "yes"}
    config = tiny_config(
        vocab_size=tokenizer.vocab_size, num_decoder_layers=0, id2label=dict(enumerate((labels or {"": "score"}).values()))
    )
    FunnelForSequenceClassification(config).save_pretrained(folder / "best")
    tokenizer.save(folder / "best")
    settings = {"task": task, "max_length": 128, "columns": ["sentence"]}
    (folder / "run.json").write_text(json.dumps({"version": 2, "command": "x", "settings": settings}))
    return folder


@pytest.mark.parametrize("data", ["glue", "glue/SST-2"])
def test_writes_the_tasks_answer_files(data, glue, tmp_path, capsys):
    run, out = write_run(tmp_path / "run", "sst2"), tmp_path / "answers"
    assert main(["submit", str(run), "--data", str(tmp_path / data), "--out", str(out)]) == 0
    assert f"wrote {out / 'SST-2.tsv'}" in capsys.readouterr().out
    header, *rows = (out / "SST-2.tsv").read_text().splitlines()
    assert header == "index\tprediction"
    assert [row.split("\t")[0] for row in rows] == ["0", "1"]
    assert {row.split("\t")[1] for row in rows} <= {"0", "1"}


def test_writes_every_test_file_of_the_task(glue, tmp_path):
    run, out = write_run(tmp_path / "run", "mnli"), tmp_path / "answers"
    assert main(["submit", str(run), "--data", str(glue), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["AX.tsv", "MNLI-m.tsv", "MNLI-mm.tsv"]


def test_a_missing_test_file_is_an_error(glue, tmp_path, capsys):
    run, out = write_run(tmp_path / "run", "mnli"), tmp_path / "answers"
    (glue / "MNLI/AX.tsv").unlink()
    assert main(["submit", str(run), "--data", str(glue), "--out", str(out)]) == 2
    assert "AX.tsv: no such file; the GLUE server expects predictions for it" in capsys.readouterr().err
    assert not out.exists()


def test_malformed_test_files_are_detected_before_the_classifier_is_loaded(glue, tmp_path, capsys, monkeypatch):
    run, out = write_run(tmp_path / "run", "mnli"), tmp_path / "answers"
    (glue / "MNLI/AX.tsv").write_text("index\tsentence1\tsentence2\n0\ta\n")
    monkeypatch.setattr("funnel.inference.classifier.Classifier.load", None)
    assert main(["submit", str(run), "--data", str(glue), "--out", str(out)]) == 2
    assert "AX.tsv, line 2" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("out", ["file", "file/inner"])
def test_an_unwritable_folder_is_detected_before_the_classifier_is_loaded(out, glue, tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", "sst2")
    (tmp_path / "file").touch()
    monkeypatch.setattr("funnel.inference.classifier.Classifier.load", None)
    assert main(["submit", str(run), "--data", str(glue), "--out", str(tmp_path / out)]) == 2
    assert f"--out {tmp_path / out / 'SST-2.tsv'}: {tmp_path / 'file'} is not a writable folder" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["custom", "imdb", "demo"])
def test_only_glue_tasks_have_submissions(task, glue, tmp_path, capsys):
    run = write_run(tmp_path / "run", task)
    assert main(["submit", str(run), "--data", str(glue), "--out", str(tmp_path / "answers")]) == 2
    assert f"trained on task {task}, which has no GLUE test files" in capsys.readouterr().err


def test_a_folder_that_is_not_a_run_is_an_error(glue, tmp_path, capsys):
    run = write_run(tmp_path / "run", "sst2")
    assert main(["submit", str(glue), "--data", str(glue), "--out", str(tmp_path / "answers")]) == 2
    assert "not a run or one of its checkpoints (run.json is missing" in capsys.readouterr().err
    (run / "run.json").write_text("{}")
    assert main(["submit", str(run), "--data", str(glue), "--out", str(tmp_path / "answers")]) == 2
    assert "names no task" in capsys.readouterr().err


def test_a_missing_data_folder_is_an_error(tmp_path, capsys):
    run = write_run(tmp_path / "run", "sst2")
    assert main(["submit", str(run), "--data", str(tmp_path / "none"), "--out", str(tmp_path / "answers")]) == 2
    assert f"--data {tmp_path / 'none'}: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["--data", "--out"])
def test_data_and_out_are_required(missing, tmp_path, capsys):
    options = {"--data": "x", "--out": "y"}
    del options[missing]
    assert main(["submit", str(tmp_path), *(part for pair in options.items() for part in pair)]) == 2
    assert missing in capsys.readouterr().err


def test_answers_replace_neither_other_files_nor_test_files(glue, tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", "mnli")
    monkeypatch.setattr("funnel.inference.classifier.Classifier.load", None)
    out = tmp_path / "answers/MNLI-m.tsv"
    out.parent.mkdir()
    out.write_text("mine")
    assert main(["submit", str(run), "--data", str(glue), "--out", str(out.parent)]) == 2
    assert f"--out {out}: already exists" in capsys.readouterr().err
    assert main(["submit", str(run), "--data", str(glue), "--out", str(glue / "MNLI"), "--overwrite"]) == 2  # has AX.tsv
    assert "AX.tsv: this command reads the file" in capsys.readouterr().err


def test_another_tasks_folder_is_an_error(glue, tmp_path, capsys):
    """SST-2's and CoLA's test files have the same name and columns."""
    run = write_run(tmp_path / "run", "cola")
    assert main(["submit", str(run), "--data", str(glue / "SST-2"), "--out", str(tmp_path / "answers")]) == 2
    assert "the folder of SST-2, but the run was trained on CoLA" in capsys.readouterr().err

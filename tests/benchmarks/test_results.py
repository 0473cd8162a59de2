"""Benchmarks: runs of a study and their results; padding of batches."""

import json
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.speed.real_text import pad
from benchmarks.studies import results
from benchmarks.studies.results import read_results, run_all, train
from funnel.data.batches import Batch


class Result(NamedTuple):
    run: int


def test_results_are_stored_and_no_run_starts_after_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    started: list[int] = []
    has_failed = threading.Event()

    def run(number: int) -> Result:
        started.append(number)
        if number == 2:
            has_failed.set()
            raise ValueError("broken")
        if number == 3:  # in progress while run 2 fails
            has_failed.wait()
            threading.Event().wait(0.5)
        return Result(number)

    with pytest.raises(ValueError, match="broken"):
        run_all(run, range(20), 2, path)
    stored = {json.loads(line)["run"] for line in path.read_text().splitlines()}
    assert stored == set(started) - {2}
    assert set(started) <= {0, 1, 2, 3}


def test_stored_results_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert read_results(path) == []
    run_all(Result, range(3), 1, path)
    run_all(Result, [7], 1, path)
    assert read_results(path) == [{"run": 0}, {"run": 1}, {"run": 2}, {"run": 7}]


def test_a_run_replaces_the_rest_of_an_interrupted_one_unless_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "rest").touch()
    found = []

    def run_nothing(*_: object, **__: object) -> None:
        found.append(folder.exists())
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text('{"settings": {"steps": 2}}')
        (folder / "metrics.jsonl").write_text('{"step": 2, "split": "dev", "accuracy": 0.5}\n')

    monkeypatch.setattr(results.subprocess, "run", run_nothing)
    assert train(["--resume"], folder, 1)["accuracy"] == train([], folder, 1)["accuracy"] == 0.5
    assert found == [True, False]


def test_padding_extends_all_inputs_of_a_batch() -> None:
    names = ("input_ids", "attention_mask", "token_type_ids")
    batch = Batch({name: torch.ones(2, 3, dtype=torch.long) for name in names}, torch.zeros(2))
    padded = pad(batch, 5)
    assert [padded.inputs[name].tolist() for name in names] == [[[1, 1, 1, 0, 0]] * 2] * 3
    assert pad(batch, 2).input_ids.shape == (2, 3)

"""Storing the results of a study's runs."""

import json
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.studies.results import read_results, run_all


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

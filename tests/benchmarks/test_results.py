"""What a benchmark's runs came to is kept, also when one of them fails."""

import json
import threading
from typing import NamedTuple

import pytest

from benchmarks.studies.results import run_all


class Result(NamedTuple):
    key: int


def test_runs_that_end_are_kept_and_none_starts_after_a_failure(tmp_path):
    started, failed = [], threading.Event()

    def run(key: int) -> Result:
        started.append(key)
        if key == 2:
            failed.set()
            raise ValueError("broken")
        if key == 3:  # going while the other one fails
            failed.wait()
            threading.Event().wait(0.5)
        return Result(key)

    with pytest.raises(ValueError, match="broken"):
        run_all(run, range(20), 2, tmp_path / "results.jsonl")
    kept = {json.loads(line)["key"] for line in (tmp_path / "results.jsonl").read_text().splitlines()}
    assert kept == set(started) - {2}
    assert set(started) <= {0, 1, 2, 3}

"""Runs the fuzzer with a few mutations of every untrusted file; fuzz.py runs more."""

import time

import pytest
from fuzz import ERROR, FAILURE, RESULT, Campaign, fuzz
from targets import TARGETS


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_give_a_result_or_a_clear_error(name, tmp_path, capsys):
    counts = fuzz(Campaign(name, 1, 0, 25, time.monotonic() + 60, 20, tmp_path / "failures"))
    if not counts:
        pytest.skip(capsys.readouterr().out)
    assert counts[FAILURE] == 0, capsys.readouterr().out
    assert counts[ERROR] + counts[RESULT] == 25

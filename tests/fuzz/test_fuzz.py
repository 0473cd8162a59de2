"""Each file that can come from a stranger, damaged a few times; fuzz.py does it as long as one likes."""

import time

import fuzz
import pytest
from targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_give_a_result_or_a_clear_error(name, tmp_path, capsys):
    counts = fuzz.fuzz(name, 1, 0, 25, time.monotonic() + 60, 20, tmp_path / "failures")
    if not counts:
        pytest.skip(capsys.readouterr().out)
    assert counts["failure"] == 0, capsys.readouterr().out
    assert sum(counts.values()) == 25
    assert counts["error"] + counts["result"] == 25

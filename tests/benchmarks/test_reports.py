"""Studies: the tables in docs/results.md match the stored results, and only missing runs are started."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

from benchmarks.studies import glue, layouts, problems
from funnel.model.config import FunnelConfig

REPORTS = [
    (glue, ["--report"]),
    (problems, ["--report"]),
    (layouts, ["--weights", "minilm", "--report", "--epochs", "0.25", "1"]),
]


@pytest.mark.parametrize(("study", "arguments"), REPORTS)
def test_results_page_has_the_rows_that_the_report_prints(
    study: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [study.__name__, *arguments])
    study.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "results.md").read_text().splitlines()
    assert len(rows) > 5
    assert [row for row in rows if row not in page] == []


def run_of(layout: str, init: str, seed: int = 0) -> layouts.Run:
    return layouts.Run("sst2", "minilm", 5e-5, layout, init, seed, 0.25)


def test_stored_runs_and_redundant_copies_are_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout without new layers is trained only once, since the init makes no difference."""
    monkeypatch.setattr(layouts, "resolve", Path)
    monkeypatch.setattr(layouts, "read_source_config", lambda _: FunnelConfig(blocks="2,2,2"))
    settings = layouts.Settings(None, "minilm", Path("runs"), jobs=1, length=13)
    requested = [
        run_of(layout, init, seed) for layout in ("2,2,2", "2,2", "3,3,3") for init in ("identity", "copy") for seed in (1, 0)
    ]
    stored = layouts.Result(*run_of("3,3,3", "identity"), accuracy=0.9, flops=1.0)
    assert layouts.missing_runs(requested, [stored], settings) == [
        run_of("2,2,2", "identity"),
        run_of("2,2", "identity"),
        run_of("3,3,3", "copy"),
        run_of("2,2,2", "identity", 1),
        run_of("2,2", "identity", 1),
        run_of("3,3,3", "identity", 1),
        run_of("3,3,3", "copy", 1),
    ]

"""The page and the table on runs; the page also in a browser, where there is one."""

import itertools
import json
import re
import shutil
import statistics
import subprocess

import pytest
from conftest import run_command

from funnel.analysis import report
from funnel.cli.main import main
from funnel.errors import FunnelError
from funnel.model import checkpoint
from funnel.model.flops import total_flops

pytest.importorskip("matplotlib", reason="needs the extra report")
pytest.importorskip("jinja2", reason="needs the extra report")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two layouts, one of them with two seeds; the texts' letters are none that a page would take for its own."""
    folder = tmp_path_factory.mktemp("report")
    rows = "".join(
        f"<b>{word}</b> & film {i}\t{label}\n" for i in range(30) for word, label in (("good", "<yes>"), ("bad", "no"))
    )
    (folder / "train.tsv").write_text("text\tlabel\n" + rows)
    for name, blocks, seed in (("a", "1,1", 0), ("b", "1,1", 1), ("c", "1,1,1", 0)):
        flags = ("--batch-size", "8", "--dev-share", "0.5", "--lr", "1e-3", "--seed", str(seed), "--out", f"runs/{name}")
        done = run_command("train.py", "--data", "train.tsv", "--weights", "none", "--blocks", blocks, *flags, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder / "runs"


def test_table_has_mean_and_spread_over_seeds(runs, capsys):
    assert main(["report", str(runs)]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| train.tsv")]
    assert [line[1] for line in lines] == ["1,1", "1,1,1"]
    assert [line[-1] for line in lines] == ["a, b |", "c |"]
    ends = []
    for name in "ab":
        log = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        ends.append(100 * [line for line in log if line["split"] == "dev"][-1]["accuracy"])
    assert lines[0][6] == f"accuracy {statistics.mean(ends):.1f} ± {statistics.stdev(ends):.1f}"
    config = checkpoint.load_config(runs / "a/best")
    length = report.read(runs / "a").length
    assert lines[0][9].startswith(f"{total_flops(config, length, 8) / 1e6:.3g} ")
    assert (runs / "report.html").is_file()


def test_page_stands_alone_and_shows_texts_as_they_are(runs):
    text = report.page([report.read(runs / "a")])
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|url\((?!#)|@import|<script|<link""", text)
    assert "&lt;yes&gt;" in text
    assert "<yes>" not in text
    evaluation = json.loads((runs / "a/best/evaluation.json").read_text())
    assert sum(map(sum, evaluation["confusion"])) == evaluation["texts"] == 30
    for count in itertools.chain(*evaluation["confusion"]):
        assert f">{count}</td>" in text
    assert text.count('class="bar"') == 2
    assert text.count("<svg") == 2
    assert report.INK not in text


def test_a_run_without_evaluation_file_or_with_a_cut_log_is_shown(runs, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "a")
    (tmp_path / "a/best/evaluation.json").unlink()
    with (tmp_path / "a/metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "spl')
    assert "Confusion" not in report.page([report.read(tmp_path / "a")])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "metrics.jsonl").write_text(""), "no evaluation yet"),
        (lambda run: (run / "metrics.jsonl").unlink(), "cannot be read"),
        (lambda run: (run / "run.json").write_text('{"command": "x", "settings": {"blocks": "1"}}'), "damaged"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": "x", "split": "dev", "accuracy": []}'), "damaged"),
        (lambda run: (run / "best/evaluation.json").write_text('{"labels": ["a"], "texts": "x"}'), "damaged"),
        (lambda run: shutil.rmtree(run / "best"), "best"),
    ],
)
def test_a_damaged_run_is_an_error(damage, words, runs, tmp_path, capsys):
    shutil.copytree(runs / "a", tmp_path / "a")
    damage(tmp_path / "a")
    assert main(["report", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "a/report.html").exists()


def test_one_bad_run_does_not_keep_others_from_the_report(runs, tmp_path, capsys):
    for name in "abc":
        shutil.copytree(runs / name, tmp_path / name)
    for name in "ac":
        (tmp_path / name / "metrics.jsonl").write_text("")
    assert main(["report", str(tmp_path)]) == 0
    found = capsys.readouterr()
    assert found.err.count("left out") == 2
    assert found.out.count("| train.tsv |") == 1
    (tmp_path / "b/metrics.jsonl").write_text("")
    assert main(["report", str(tmp_path)]) == 2
    assert "no evaluation yet" in capsys.readouterr().err.splitlines()[-1]


def test_the_same_seed_twice_is_not_two_seeds_and_tasks_are_drawn_apart(runs, tmp_path):
    for name, source, task in (("a", "a", "rte"), ("same", "a", "rte"), ("b", "b", "rte"), ("other", "a", "qnli")):
        shutil.copytree(runs / source, tmp_path / name)
        record = json.loads((tmp_path / name / "run.json").read_text())
        record["settings"]["task"] = task
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    groups = report.grouped([report.read(tmp_path / name) for name in ("a", "same", "b", "other")])
    assert [[record.name for record in group] for group in groups] == [["a", "b"], ["same"], ["other"]]
    drawings = report.comparison(groups)
    assert len(drawings) == 2
    assert all("rte: accuracy" in drawing and "qnli" not in drawing for drawing in drawings)


def test_a_folder_without_runs_is_an_error(tmp_path):
    with pytest.raises(FunnelError, match="holds no run"):
        report.find_runs([tmp_path])


def test_many_classes_are_listed_and_a_regression_is_drawn(tmp_path):
    for name, label in (("classes", lambda i: f"class{i % 13}"), ("scores", lambda i: f"{i / 10}")):
        rows = "".join(f"text {i}\t{label(i)}\n" for i in range(52))
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\n" + rows)
        done = run_command("train.py", "--data", f"{name}.tsv", "--weights", "none", "--blocks", "1,1", "--epochs", "1",
                           "--dev-share", "0.5", "--out", name, cwd=tmp_path)  # fmt: skip
        assert done.returncode == 0, done.stderr
    classes, scores = (report.read(tmp_path / name) for name in ("classes", "scores"))
    assert "Most frequent confusions" in report.page([classes])
    counts = [count for count, _, _ in classes.confusions]
    assert counts == sorted(counts, reverse=True)
    assert "Predictions against scores" in report.page([scores])


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium or Chrome")
def test_page_in_a_browser(runs, tmp_path):
    """In a frame as narrow as a phone nothing but scrolling boxes is wider than it, and drawings and bars have a size."""
    records = [report.read(runs / name) for name in "abc"]
    (tmp_path / "page.html").write_text(report.page(records), encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        """<body><iframe id="f" src="page.html" width="360" height="900"></iframe><script>
        onload = () => { const d = document.getElementById("f").contentDocument;
          d.querySelectorAll("details").forEach(x => x.open = true);
          const sizes = q => [...d.querySelectorAll(q)].map(x => x.getBoundingClientRect()).map(x => [x.width, x.height]);
          const found = {wide: d.documentElement.scrollWidth, svg: sizes("svg"), bars: sizes(".bar")};
          document.body.textContent = JSON.stringify(found); }
        </script></body>""",
        encoding="utf-8",
    )
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", f"file://{tmp_path / 'frame.html'}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = json.loads(re.search(r"\{.*\}", done.stdout).group())
    assert found["wide"] <= 360
    assert len(found["svg"]) == 2 + 2 * 3
    assert all(width > 200 and 100 < height < 300 for width, height in found["svg"])
    assert len(found["bars"]) == 2 + 2 + 3
    assert all(width > 2 and height > 2 for width, height in found["bars"])

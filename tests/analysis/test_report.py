"""Reports: reading runs, the table, the page, and its layout in a browser if one is installed."""

import itertools
import json
import re
import shutil
import statistics
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import ROOT, run_command, tiny_config

from funnel.analysis import figures, learning_curves
from funnel.analysis.heat_map import cluster_order, draw_heat_map
from funnel.analysis.learning_curves import MAX_GROUPS, Quantity, mean_curve, plot_learning_curves, spread
from funnel.analysis.report import COLUMNS, format_scores, markdown_table, render_page, short_command, table_row
from funnel.analysis.runs import find_runs, group_by_settings, read_run
from funnel.cli.main import main
from funnel.data.encoding import TextEncoder, encode_examples
from funnel.data.files import InMemoryExamples
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model.checkpoint import load_config
from funnel.model.flops import total_flops
from funnel.model.heads import FunnelForSequenceClassification
from funnel.problems.calibration import calibrate
from funnel.problems.error_analysis import score_classes
from funnel.problems.metrics import ClassCounts
from funnel.problems.registry import problem_of

pytest.importorskip("matplotlib", reason="needs the extra report")
pytest.importorskip("jinja2", reason="needs the extra report")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
LABELS = ["<yes>", "no"]  # HTML must escape them


def write_run(folder: Path, blocks: str = "1,1", labels: list[str] | None = None, **settings) -> Path:
    """Writes a run folder in the format of train.py, with a random model and random scores.

    Args:
        labels: names of the classes; an empty list for a regression.
    """
    labels = LABELS if labels is None else labels
    seed = settings.get("seed", 0)
    generator = np.random.default_rng([seed, len(blocks)])
    n = 2 * max(15, len(labels))
    targets = [labels[i % len(labels)] if labels else f"{i / 10}" for i in range(n)]
    texts = [f"<b>{('good', 'bad')[i % 2]}</b> & film {i}" for i in range(n)]
    tokenizer = FunnelTokenizer.train(texts)
    config = tiny_config(
        vocab_size=tokenizer.vocab_size,
        num_decoder_layers=0,
        id2label=dict(enumerate(labels or ["score"])),
        problem_type="single_label_classification" if labels else "regression",
    ).replace(blocks=blocks)
    label_ids = {name: i for i, name in enumerate(labels)} if labels else None
    dev_set = encode_examples(InMemoryExamples(texts, None, targets), TextEncoder(label_ids), tokenizer, 128)
    logits = torch.from_numpy(generator.normal(size=(n, len(labels) or 1))).float()
    model = FunnelForSequenceClassification(config)
    model.save_pretrained(folder / "best")
    tokenizer.save(folder / "best")
    evaluation = problem_of("FunnelForSequenceClassification", config).analyze(logits, dev_set, tokenizer)
    (folder / "best/evaluation.json").write_text(json.dumps(evaluation))
    values = {
        "task": "custom", "data": "somewhere/train.tsv", "columns": ["text"], "labels": labels or None, "weights": "none",
        "blocks": blocks, "init": "identity", "keep": "spread", "layout_plan": None, "epochs": 3.0, "lr": 1e-3,
        "batch_size": 8, "max_length": 128, "warmup": 0.1, "weight_decay": 0.01, "seed": 0, "grad_accum": 1, "dtype": "fp32",
        "steps": 12, "eval_every": None, "train_examples": n, "dev_examples": n, "mean_tokens": 9.3 + seed / 10,
        "digests": {"train": "ab"}, **settings,
    }  # fmt: skip
    command = f"/usr/bin/python /home/me/train.py --blocks {blocks} --seed {seed}"
    (folder / "run.json").write_text(json.dumps({"version": 2, "command": command, "settings": values}))
    metrics = ("accuracy", "f1") if labels else ("pearson", "spearman")
    with (folder / "metrics.jsonl").open("w") as log:
        for step in (4, 8, 12):
            train = {"loss": 1 / step, "lr": 1e-4, "examples_per_second": 50.0 + step, "memory_mib": 300.0 + step}
            dev = {"loss": 1.1 / step, **{name: round(float(generator.uniform(0.5, 1)), 4) for name in metrics}}
            log.write(json.dumps({"step": step, "split": "train", **train}) + "\n")
            log.write(json.dumps({"step": step, "split": "dev", **dev}) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of two layouts, the first one with two seeds."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    for name, blocks, seed in (("a", "1,1", 0), ("b", "1,1", 1), ("c", "1,1,1", 0)):
        write_run(folder / name, blocks, seed=seed)
    return folder


def read_log(run: Path, split: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


# --- the table --------------------------------------------------------------------------------------------------------


def test_table_shows_mean_and_standard_deviation_over_seeds(runs, capsys):
    assert main(["report", str(runs)]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| train.tsv")]
    assert [line[1] for line in lines] == ["1,1", "1,1,1"]
    assert [line[-1] for line in lines] == ["a, b |", "c |"]
    final = [100 * read_log(runs / name, "dev")[-1]["accuracy"] for name in "ab"]
    assert lines[0][6] == f"accuracy {statistics.mean(final):.1f} ± {statistics.stdev(final):.1f}"
    best = [100 * max(line["accuracy"] for line in read_log(runs / name, "dev")) for name in "ab"]
    assert lines[0][7] == f"{statistics.mean(best):.1f} ± {statistics.stdev(best):.1f}"
    config = load_config(runs / "a/best")
    length = read_run(runs / "a").length
    assert length == 9
    assert lines[0][9].startswith(f"{total_flops(config, length, 8) / 1e6:.3g} ")
    assert lines[0][11] == f"{312 / 1024:.1f}"
    assert (runs / "report.html").is_file()


def test_training_time_is_computed_from_the_median_rate(runs):
    assert read_run(runs / "a").seconds == pytest.approx(12 * 8 / 58)


def test_peak_memory_is_the_maximum_of_the_log(runs):
    assert read_run(runs / "a").peak_memory == 312


def test_flops_ratio_compares_with_the_same_layers_without_pooling(runs):
    run = read_run(runs / "c")
    unpooled = run.config.replace(blocks="3")
    assert run.flops_ratio == pytest.approx(total_flops(run.config, run.length, 8) / total_flops(unpooled, run.length, 8))
    assert 0.3 < run.flops_ratio < 1


def test_unknown_memory_and_nonfinite_scores_are_displayed(tmp_path):
    write_run(tmp_path / "a", layout_plan="plans/mine.json", steps=20)
    log = (tmp_path / "a/metrics.jsonl").read_text()
    log = re.sub(r'"memory_mib": [\d.]+', '"memory_mib": null', log)
    (tmp_path / "a/metrics.jsonl").write_text(re.sub(r'"accuracy": [\d.]+', '"accuracy": null', log))
    run = read_run(tmp_path / "a")
    row = dict(zip(COLUMNS, table_row([run]), strict=True))
    assert row["memory, GiB"] == "?"
    assert row["final dev score, %"] == "accuracy not finite"
    assert row["new layers"] == "mine.json"
    assert row["epochs"] == "3 (unfinished)"
    assert "not finite" in markdown_table([run])
    assert not any("memory" in description for description, _ in run.summary())
    assert "Unfinished: last evaluated at step 12 of 20." in render_page([run])


def test_a_single_value_has_no_standard_deviation():
    assert format_scores("accuracy", [0.5]) == "50.0"
    assert format_scores("accuracy", [0.5, 0.52]) == "51.0 ± 1.4"


def test_error_metrics_are_not_percentages():
    assert format_scores("rmse", [2046.0, 2048.0]) == "2047 ± 1.414 (absolute)"


def write_dev_log(run, *evaluations):
    lines = [{"step": step, "split": "dev", **scores} for step, scores in enumerate(evaluations, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_regression_selected_by_rmse_is_reported_in_the_units_of_its_labels(tmp_path):
    write_run(tmp_path / "a", labels=[], metrics=["rmse", "pearson"])
    write_dev_log(tmp_path / "a", *({"loss": x**2, "rmse": x, "pearson": 0.9} for x in (2500.0, 2046.7, 2100.0)))
    run = read_run(tmp_path / "a")
    summary = dict(run.summary())
    assert summary["best dev rmse (step 2)"] == "2047"
    assert (summary["final dev rmse"], summary["final dev pearson, %"]) == ("2100", "90.0")
    row = dict(zip(COLUMNS, table_row([run]), strict=True))
    assert (row["final dev score, %"], row["best dev score, %"]) == ("rmse 2100 (absolute)", "2047 (absolute)")
    assert ">rmse<" not in figures.plot_metrics(run)
    assert "predicted" in render_page([run])


@pytest.mark.parametrize(("settings", "step"), [({"metrics": ["accuracy", "f1"]}, 3), ({}, 1)])
def test_the_best_of_equal_evaluations_is_the_one_that_was_kept(settings, step, tmp_path):
    write_run(tmp_path / "a", **settings)
    write_dev_log(tmp_path / "a", *({"loss": loss, "accuracy": 1.0, "f1": 1.0} for loss in (0.3, 0.2, 0.1)))
    assert read_run(tmp_path / "a").best["step"] == step


def test_runs_of_version_0_1_can_be_reported():
    run = read_run(ROOT / "tests/fixtures/written_by_0_1/run")
    assert run.metrics
    assert markdown_table([run]).count("\n") == 2
    assert "Calibration and averages over classes are missing" in render_page([run])


def test_page_shows_the_scores_of_each_class(tmp_path):
    write_run(tmp_path / "a")
    page = render_page([read_run(tmp_path / "a")])
    assert page.index("Classes (dev)") < page.index("<td>&lt;yes&gt;</td>")
    evaluation = json.loads((tmp_path / "a/best/evaluation.json").read_text())
    for name in ("averages", "calibration", "unit"):  # earlier versions wrote neither
        del evaluation[name]
    (tmp_path / "a/best/evaluation.json").write_text(json.dumps(evaluation))
    page = render_page([read_run(tmp_path / "a")])
    assert "Calibration and averages over classes are missing" in page
    assert "Classes (dev)" in page
    assert "reliability diagram" not in page
    del evaluation["classes"]
    (tmp_path / "a/best/evaluation.json").write_text(json.dumps(evaluation))
    assert "Classes (dev)" not in render_page([read_run(tmp_path / "a")])


def test_command_is_shown_without_folders():
    assert short_command("/usr/bin/python3 /home/me/train.py --out 'my run'") == "python3 train.py --out 'my run'"
    assert short_command("unbalanced 'quote") == "unbalanced 'quote"


def test_repeated_seeds_are_not_counted_twice_and_tasks_are_plotted_separately(runs, tmp_path):
    for name, source, task in (("a", "a", "rte"), ("same", "a", "rte"), ("b", "b", "rte"), ("other", "a", "qnli")):
        shutil.copytree(runs / source, tmp_path / name)
        record = json.loads((tmp_path / name / "run.json").read_text())
        record["settings"]["task"] = task
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    groups = group_by_settings([read_run(tmp_path / name) for name in ("a", "same", "b", "other")])
    assert [[run.name for run in group] for group in groups] == [["a", "b"], ["same"], ["other"]]
    drawings = figures.plot_comparison(groups)
    assert len(drawings) == 2
    assert all("rte: dev accuracy" in drawing and "qnli" not in drawing for drawing in drawings)


def test_folds_are_one_group_per_number_of_folds(runs, tmp_path):
    for name, source, fold in (
        ("a", "a", "1/2"),
        ("b", "a", "2/2"),
        ("c", "b", "1/2"),
        ("other", "a", "1/3"),
        ("d", "a", None),
    ):
        shutil.copytree(runs / source, tmp_path / name)
        record = json.loads((tmp_path / name / "run.json").read_text())
        record["settings"]["fold"] = fold
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    groups = group_by_settings([read_run(tmp_path / name) for name in ("a", "b", "c", "other", "d")])
    assert [[run.name for run in group] for group in groups] == [["a", "b", "c"], ["other"], ["d"]]
    cells = [dict(zip(COLUMNS, table_row(group), strict=True))["seeds"] for group in groups]
    assert cells == ["2 x 2 folds", "1 fold", "1"]
    assert dict(zip(COLUMNS, table_row(groups[0][:2]), strict=True))["seeds"] == "2 folds"
    (curves,) = plot_learning_curves([groups[0][:2], groups[2]])
    assert [entry.text for entry in curves.legend] == ["layout 1,1, 2 folds", "layout 1,1"]


def test_a_diverged_group_is_the_first_to_lose_its_color(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(learning_curves, "MAX_GROUPS", 1)
    diverged, good = (read_run(runs / name) for name in "ac")
    for run in (diverged, good):
        run.settings["metrics"] = ["rmse"]
        run.final["rmse"] = 0.5
    diverged.final["rmse"] = None
    (curves,) = plot_learning_curves([[diverged], [good]])
    assert [entry.number for entry in curves.legend] == [2]


# --- the page ---------------------------------------------------------------------------------------------------------


def test_page_is_self_contained_and_escapes_texts(runs):
    page = render_page([read_run(runs / "a")])
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|url\((?!#)|@import|<script|<link""", page)
    assert "&lt;yes&gt;" in page
    assert "<yes>" not in page
    evaluation = json.loads((runs / "a/best/evaluation.json").read_text())
    assert sum(map(sum, evaluation["confusion"])) == evaluation["examples"] == 30
    for count in itertools.chain(*evaluation["confusion"]):
        assert f">{count}</td>" in page
    assert page.count('class="bar"') == 2
    assert page.count("<svg") == 3
    assert figures.TEXT_COLOR not in page


def test_runs_without_error_analysis_or_with_a_truncated_log_are_shown(runs, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "a")
    (tmp_path / "a/best/evaluation.json").unlink()
    with (tmp_path / "a/metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "spl')
    assert "Confusion" not in render_page([read_run(tmp_path / "a")])


def test_many_classes_are_listed_by_frequency_of_confusion(tmp_path):
    run = read_run(write_run(tmp_path / "run", labels=[f"class{i}" for i in range(301)]))
    page = render_page([run])
    assert "Most frequent confusions" in page
    assert 'class="heat"' not in page
    counts = [count for count, _, _ in run.confusions]
    assert counts == sorted(counts, reverse=True)


def test_regressions_are_plotted(tmp_path):
    page = render_page([read_run(write_run(tmp_path / "run", labels=[]))])
    assert "Predictions against labels" in page
    assert page.count("<svg") == 3
    assert "missing" not in page


# --- calibration ------------------------------------------------------------------------------------------------------


def test_page_shows_calibration(tmp_path):
    run = read_run(write_run(tmp_path / "a"))
    page = render_page([run])
    ece = 100 * run.evaluation["calibration"]["ece"]
    assert f"Expected calibration error {ece:.1f}% over 15 bins" in page
    assert dict(run.summary())["expected calibration error (dev), %"] == f"{ece:.1f}"
    titles = re.findall(r"<title>[\d.]+ to [\d.]+: ([\d,]+) prediction", page)
    assert sum(map(int, titles)) == 2 * 30  # in the diagram and in the distribution


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_equal_probabilities_can_be_plotted(probability):
    drawing = figures.plot_calibration(calibrate(np.full(3, probability), np.full(3, True)), "accuracy")
    assert "3 predictions" in drawing
    assert not re.search(r"\bnan\b", drawing)
    assert "reliability" in figures.plot_calibration(calibrate(np.empty(0), np.empty(0)), "accuracy")


def test_decisions_of_several_labels_are_counted_as_such(tmp_path):
    run = read_run(write_run(tmp_path / "a"))
    counts = ClassCounts(np.array([1, 0]), np.array([2, 1]), np.array([1, 1]))
    calibration = calibrate(np.array([0.9, 0.2]), np.array([True, False]))
    run.evaluation = {"examples": 1, "unit": "decision", "threshold": 0.5, "calibration": calibration, "mistakes": []}
    run.evaluation |= score_classes(["x", "y"], counts, average_all=True)
    page = render_page([run])
    assert "of 2 decisions (one per example and class)" in page
    assert "share that are labels" in page
    assert "Classes (dev)" in page


# --- the heat map -----------------------------------------------------------------------------------------------------


def test_confusions_of_many_classes_are_a_heat_map(tmp_path):
    run = read_run(write_run(tmp_path / "run", labels=[f"<class> {i}" for i in range(150)]))
    page = render_page([run])
    assert "Most frequent confusions" in page
    assert "<class>" not in page
    assert len(page) < 300_000
    drawing = re.search(r'<svg class="heat".*?</svg>', page, re.DOTALL).group()
    ElementTree.fromstring(drawing)
    confusion = np.array(run.evaluation["confusion"])
    wrong = {(i, j) for i, j in np.argwhere(confusion).tolist() if i != j}
    titles = re.findall(r"<title>&lt;class&gt; (\d+), predicted &lt;class&gt; (\d+): (\d+) of (\d+)</title>", drawing)
    assert {(int(i), int(j)) for i, j, *_ in titles} == wrong
    for i, j, count, total in titles:
        assert (int(count), int(total)) == (confusion[int(i), int(j)], confusion[int(i)].sum())
    names = re.findall(r'<text x="-5" y="3"><title>&lt;class&gt; (\d+)</title>', drawing)
    assert 40 <= len(set(names)) <= 75  # thinned: 4 units per class, 9 per line
    assert page.count('class="average"') == 3
    assert "all 150 classes" in page


def test_cells_are_where_the_axes_say():
    drawing = draw_heat_map(["a", "b", "c"], [[1, 0, 2], [0, 0, 0], [0, 0, 3]])
    cells = {title: (int(y), int(x)) for x, y, title in re.findall(r'd="M(\d) (\d)h1v1h-1z"><title>([^<]*)', drawing)}
    assert cells == {
        "a: 1 of 3 correct": (0, 0),
        "a, predicted c: 2 of 3": (0, 2),
        "c: 3 of 3 correct": (2, 2),
    }
    assert len(re.findall(r"<text[^>]*>\d</text>", drawing)) == 3  # there is room for counts


def test_rows_and_columns_of_a_large_heat_map_have_the_same_order():
    labels = [f"c{i}" for i in range(40)]
    confusion = np.diag(np.arange(1, 41))
    confusion[3, 30] = confusion[30, 3] = 2
    drawing = draw_heat_map(labels, confusion.tolist())
    position = {labels[i]: n for n, i in enumerate(cluster_order(confusion))}
    for x, y, title in re.findall(r'd="M(\d+) (\d+)h1v1h-1z"><title>([^<]*)', drawing):
        label = re.match(r"c\d+", title).group()
        predicted = (re.findall(r"predicted (c\d+)", title) or [label])[0]
        assert (position[label], position[predicted]) == (int(y), int(x))
    assert abs(position["c3"] - position["c30"]) == 1
    assert not re.findall(r"<text[^>]*>\d+</text>", drawing)


def test_cells_beyond_the_titled_ones_are_drawn_without_a_title(monkeypatch):
    monkeypatch.setattr("funnel.analysis.heat_map.MAX_TITLES", 2)
    drawing = draw_heat_map(["a", "b", "c"], [[5, 4, 3], [2, 9, 1], [0, 0, 1]])
    assert drawing.count("<title>") == 2 + 2 * 3  # cells; names at both axes
    assert drawing.count("h1v1h-1z") == 7


def test_confused_classes_are_adjacent():
    groups = [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    confusion = np.diag(np.full(9, 20))
    for group in groups:
        for i, j in itertools.permutations(group, 2):
            confusion[i, j] = 5
    order = cluster_order(confusion)
    assert sorted(order) == list(range(9))
    assert [sorted(order[i : i + 3]) for i in (0, 3, 6)] == groups


def test_a_chain_of_confusions_keeps_its_order():
    shuffled = np.random.default_rng(0).permutation(12)
    confusion = np.zeros((12, 12), int)
    for a, b in itertools.pairwise(shuffled):
        confusion[a, b] = confusion[b, a] = 10
    confusion += np.diag(np.full(12, 5))
    order = cluster_order(confusion)
    assert sum(confusion[a, b] == 10 for a, b in itertools.pairwise(order)) >= 9  # of 11


@pytest.mark.parametrize("matrix", [[[3]], [[0]], [[0, 0], [0, 0]], [[5, 0], [0, 5]]])
def test_classes_without_confusions_keep_their_order(matrix):
    assert cluster_order(np.array(matrix)) == list(range(len(matrix)))
    ElementTree.fromstring(draw_heat_map(["a", "b"][: len(matrix)], matrix))


# --- learning curves --------------------------------------------------------------------------------------------------


def test_groups_of_runs_are_compared_on_one_axis(runs):
    (curves,) = plot_learning_curves(group_by_settings([read_run(runs / name) for name in "abc"]))
    assert [entry.text for entry in curves.legend] == ["layout 1,1, 2 seeds", "layout 1,1,1"]
    assert (curves.n_gray, curves.has_repetitions) == (0, True)
    for drawing in curves.figures:
        assert re.findall(r"<title>([^<]*)</title>", drawing) == ["1: a", "1: b", "1: a, b", "2: c"]
        assert ">step<" in drawing
        for entry in curves.legend:
            assert entry.color in drawing
            assert re.search(rf">{entry.number}</text>", drawing)
    page = render_page([read_run(runs / name) for name in "abc"])
    assert page.index("Learning curves") < page.index("layout 1,1,1")
    assert "Learning curves" not in render_page([read_run(runs / "a")])


def test_runs_of_different_batch_sizes_are_compared_by_examples(tmp_path):
    written = [write_run(tmp_path / str(size), batch_size=size) for size in (8, 16)]
    (curves,) = plot_learning_curves(group_by_settings([read_run(path) for path in written]))
    assert ">examples<" in curves.figures[0]
    assert [entry.text for entry in curves.legend] == ["layout 1,1, batch size 8", "layout 1,1, batch size 16"]
    loss = Quantity("train", "loss", "loss", 1, True)
    assert loss.curve(read_run(written[1])) == {64: 1 / 4, 128: 1 / 8, 192: 1 / 12}


def test_only_the_best_groups_are_in_color(tmp_path):
    runs = [read_run(write_run(tmp_path / f"{i}", lr=i / 1000)) for i in range(1, 16)]
    for i, run in enumerate(runs):
        run.final["accuracy"] = 0.5 + i / 100
    (curves,) = plot_learning_curves(group_by_settings(runs))
    assert curves.n_gray == 3
    assert [entry.number for entry in curves.legend] == list(range(4, 16))
    assert "lr 0.004" in curves.legend[0].text
    assert len({(entry.color, entry.dashes) for entry in curves.legend}) == MAX_GROUPS


def test_the_mean_over_seeds_is_drawn_where_all_have_a_value():
    assert mean_curve([{1: 2.0, 2: 4.0, 3: 9.0}, {1: 4.0, 2: 6.0}]) == {1: 3.0, 2: 5.0}
    assert mean_curve([{}, {1: 2.0}]) == {}


def test_numbers_next_to_curves_do_not_overlap():
    for heights in ([0.5] * 12, [0.0, 0.01, 0.02, 0.98, 0.99, 1.0], [0.2, 0.8], []):
        moved = spread(heights, 0.07)
        assert all(b - a >= 0.07 - 1e-9 for a, b in itertools.pairwise(moved))
        assert all(-1e-9 <= height <= 1 + 1e-9 for height in moved)
    assert spread([0.2, 0.8], 0.07) == [0.2, 0.8]


def test_scores_that_are_not_finite_are_left_out_of_curves(tmp_path):
    for name in "ab":
        write_run(tmp_path / name, seed=ord(name))
    write_dev_log(tmp_path / "a", *({"loss": 1.0, "accuracy": None, "f1": 0.5} for _ in range(3)))
    (curves,) = plot_learning_curves(group_by_settings([read_run(tmp_path / name) for name in "ab"]))
    assert not re.search(r"\bnan\b", "".join(curves.figures))


# Machado et al. 2009, severity 1: linear RGB as seen with protanopia, deuteranopia and tritanopia
COLOR_BLINDNESS = np.array(
    [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
)


def linear_rgb(color: str) -> np.ndarray:
    values = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def cie_lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.41246, 0.35758, 0.18044], [0.21267, 0.71515, 0.07218], [0.01933, 0.11919, 0.95030]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colors_are_readable_and_distinguishable_with_color_blindness():
    page = (ROOT / "funnel/analysis/report.html").read_text()
    backgrounds = re.findall(r"--card: (#\w+)", page)
    assert len(backgrounds) == 2
    for color, background in itertools.product(figures.COLORS, backgrounds):
        low, high = sorted(linear_rgb(c) @ [0.2126, 0.7152, 0.0722] for c in (color, background))
        assert (high + 0.05) / (low + 0.05) >= 3  # WCAG 2.1, success criterion 1.4.11
    for seen in COLOR_BLINDNESS:
        for a, b in itertools.combinations(figures.COLORS, 2):
            assert np.linalg.norm(cie_lab(seen @ linear_rgb(a)) - cie_lab(seen @ linear_rgb(b))) > 15, (a, b)


def test_neighboring_groups_differ_in_color_and_dashes():
    styles = [(figures.color_of(n), figures.dashes_of(n)) for n in range(1, 25)]
    assert len(set(styles)) == 24
    for (color, dashes), (next_color, next_dashes) in itertools.pairwise(styles):
        assert color != next_color
        assert dashes != next_dashes


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium or Chrome")
def test_page_fits_a_phone(runs, tmp_path):
    """At 360 pixels, only scrollable boxes are wider than the page, and figures and bars are visible."""
    (tmp_path / "page.html").write_text(render_page([read_run(runs / name) for name in "abc"]), encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        """<body><iframe id="f" src="page.html" width="360" height="900"></iframe><script>
        onload = () => { const d = document.getElementById("f").contentDocument;
          d.querySelectorAll("details").forEach(x => x.open = true);
          const sizes = q => [...d.querySelectorAll(q)].map(x => x.getBoundingClientRect()).map(x => [x.width, x.height]);
          const found = {width: d.documentElement.scrollWidth, svg: sizes("svg:not(.swatch)"), bars: sizes(".bar")};
          document.body.textContent = JSON.stringify(found); }
        </script></body>""",
        encoding="utf-8",
    )
    browser = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", f"file://{tmp_path / 'frame.html'}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = json.loads(re.search(r"\{.*\}", browser.stdout).group())
    assert found["width"] <= 360
    assert len(found["svg"]) == 2 + 2 + 3 * 3
    assert all(width > 200 and 100 < height < 300 for width, height in found["svg"])
    assert len(found["bars"]) == 2 + 2 + 3
    assert all(width > 2 and height > 2 for width, height in found["bars"])


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "metrics.jsonl").write_text(""), "no evaluation yet"),
        (lambda run: (run / "metrics.jsonl").unlink(), "cannot read"),
        (lambda run: (run / "run.json").write_text('{"command": "x", "settings": {"blocks": "1"}}'), "damaged"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": "x", "split": "dev", "accuracy": []}'), "damaged"),
        (lambda run: (run / "best/evaluation.json").write_text('{"labels": ["a"], "examples": "x"}'), "damaged"),
        (lambda run: shutil.rmtree(run / "best"), "best"),
    ],
)
def test_a_damaged_run_is_an_error(damage, message, runs, tmp_path, capsys):
    shutil.copytree(runs / "a", tmp_path / "a")
    damage(tmp_path / "a")
    assert main(["report", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "a/report.html").exists()


def test_unreadable_runs_are_skipped_with_a_warning(runs, tmp_path, capsys):
    for name in "abc":
        shutil.copytree(runs / name, tmp_path / name)
    for name in "ac":
        (tmp_path / name / "metrics.jsonl").write_text("")
    assert main(["report", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("warning: skipped a run") == 2
    assert captured.out.count("| train.tsv |") == 1
    (tmp_path / "b/metrics.jsonl").write_text("")
    assert main(["report", str(tmp_path)]) == 2
    assert "no evaluation yet" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_without_runs_is_an_error(tmp_path):
    with pytest.raises(FunnelError, match="contains no run"):
        find_runs([tmp_path])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_report_of_a_trained_run(kind, tmp_path):
    """The report reads the format that training writes."""
    rows = "".join(f"text {i}\t{f'class{i % 13}' if kind == 'classification' else i / 10}\n" for i in range(52))
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + rows)
    flags = ("--weights", "none", "--blocks", "1,1", "--epochs", "1", "--batch-size", "8", "--dev-share", "0.5", "--out", "run")
    training = run_command("train.py", "--data", "train.tsv", *flags, cwd=tmp_path)
    assert training.returncode == 0, training.stderr
    run = read_run(tmp_path / "run")
    assert run.is_finished
    assert run.task == "train.tsv"
    assert run.seconds > 0
    assert run.peak_memory > 1
    expected = "Most frequent confusions" if kind == "classification" else "Predictions against labels"
    assert expected in render_page([run])


def test_an_unfinished_run_is_explained(tmp_path):
    run = write_run(tmp_path / "run")
    shutil.rmtree(run / "best")
    with pytest.raises(FunnelError, match="no best checkpoint yet; wait for its first evaluation"):
        read_run(run)


def test_pipes_in_names_are_escaped(tmp_path):
    run = read_run(write_run(tmp_path / "a|b", task="custom", data="x|y.csv"))
    header, _, row = markdown_table([run]).splitlines()
    assert r"x\|y.csv" in row
    assert len(re.findall(r"(?<!\\)\|", row)) == header.count("|")


def test_the_page_replaces_a_file_only_with_overwrite(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    out.write_text("mine")
    run = write_run(tmp_path / "run")
    assert main(["report", str(run), "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(run / "run.json"), "--overwrite"]) == 2
    assert "expected the name of an .html file" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(out), "--overwrite"]) == 0
    assert out.read_text().startswith("<!doctype html>")

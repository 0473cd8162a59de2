"""The tasks: files in the official layouts, downloads, and options."""

import csv
import io
import tarfile
import threading
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import shared

from funnel.cli.common import parse_options
from funnel.data import download
from funnel.data.download import Archive
from funnel.data.tasks import TASKS, get_task, locate_files
from funnel.errors import FunnelError
from funnel.io import sha256
from funnel.problems.registry import PROBLEMS
from funnel.problems.task_args import TaskArgs, load_task

# A few rows of every file as distributed. Per task: {file: content}, the texts and the labels of train, the number of rows of
# the evaluation sets, and the number of rows of the unlabeled files.
HEADER = "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
MNLI_ROW = "{}\t31193\t31193n\tgovernment\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tConceptually cream skimming .\tProduct {} .\t"
STSB_HEADER = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
STSB_ROW = '{}\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA plane is taking off.\tAn air "plane.\t'
QUESTIONS = '133273\t213221\t213222\tHow is the "life of a math student?\tWhich level?\t'


def glue(header, row, labels, test_header, test_row):
    """train.tsv, dev.tsv and test.tsv."""
    body = "".join(row.format(i, i) + f"{label}\n" for i, label in enumerate(labels))
    return {"train.tsv": f"{header}\n{body}", "dev.tsv": f"{header}\n{body}", "test.tsv": f"{test_header}\n{test_row}\n"}


def mnli():
    train = HEADER + "\tsentence1\tsentence2\tlabel1\tgold_label\n"
    dev = HEADER + "\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n"
    labels = ["neutral", "entailment", "contradiction", "neutral"]
    files = {"train.tsv": train + "".join(f"{MNLI_ROW.format(i, i)}{x}\t{x}\n" for i, x in enumerate(labels))}
    for name in ("dev_matched", "dev_mismatched"):
        files[f"{name}.tsv"] = dev + "".join(f"{MNLI_ROW.format(i, i)}{x}\t-\t-\t-\t-\t{x}\n" for i, x in enumerate(labels[:3]))
    for name in ("test_matched", "test_mismatched"):
        files[f"{name}.tsv"] = HEADER + "\tsentence1\tsentence2\n" + MNLI_ROW.format(0, 0)[:-1] + "\n"
    return files | {"AX.tsv": "index\tsentence1\tsentence2\n0\tThe cat sat .\tThe cat did not sit .\n"}


def zhang(*rows):
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return {"train.csv": text.getvalue(), "test.csv": text.getvalue(), "classes.txt": "x\n"}


REVIEW = 'It was "fine".\\n\\nReally, \\"fine\\".'
UNESCAPED_REVIEW = 'It was "fine".\n\nReally, "fine".'
IMDB = {
    f"{split}/{label}/{i}_7.txt": f"{label} {i}<br />"
    for split in ("train", "test")
    for label in ("neg", "pos")
    for i in (0, 1)
}
LAYOUTS = {
    "cola": (
        {"train.tsv": "gj04\t1\t\tOur friends .\ngj04\t0\t*\tThey drank the pub .\n", "dev.tsv": "gj04\t1\t\tThe sailors .\n",
         "test.tsv": "index\tsentence\n0\tBill whistled .\n"},
        [("Our friends .", None), ("They drank the pub .", None)], "10", {"dev": 1}, {"CoLA": 1}),
    "sst2": (
        glue("sentence\tlabel", "hide \"new secretions {} \t", "01", "index\tsentence", "0\tuneasy mishmash ."),
        [('hide "new secretions 0 ', None), ('hide "new secretions 1 ', None)], "01", {"dev": 2}, {"SST-2": 1}),
    "mrpc": (
        {name: f"\ufeff{'Quality' if name != 'test.tsv' else 'index'}\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
               "1\t702876\t702977\tAmrozi accused \" .\tReferring to him .\n" for name in ("train.tsv", "dev.tsv", "test.tsv")},
        [('Amrozi accused " .', "Referring to him .")], "1", {"dev": 1}, {"MRPC": 1}),
    "stsb": (
        glue(f"{STSB_HEADER}\tscore", STSB_ROW, ["5.000", "3.8"], STSB_HEADER, STSB_ROW.format(0)[:-1]),
        [("A plane is taking off.", 'An air "plane.')] * 2, ["5.000", "3.8"], {"dev": 2}, {"STS-B": 1}),
    "qqp": (
        glue("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", QUESTIONS, "01",
             "id\tquestion1\tquestion2", "0\tWhy?\tHow?"),
        [('How is the "life of a math student?', "Which level?")] * 2, "01", {"dev": 2}, {"QQP": 1}),
    "mnli": (mnli(), [("Conceptually cream skimming .", f"Product {i} .") for i in range(4)],
             ["neutral", "entailment", "contradiction", "neutral"], {"dev": 3, "dev_mismatched": 3},
             {"MNLI-m": 1, "MNLI-mm": 1, "AX": 1}),
    "qnli": (
        glue("index\tquestion\tsentence\tlabel", "{}\tWhen did it end?\tUnlike the two seasons .\t",
             ["not_entailment", "entailment"], "index\tquestion\tsentence", "0\tWhat?\tIn this case ."),
        [("When did it end?", "Unlike the two seasons .")] * 2, ["not_entailment", "entailment"], {"dev": 2}, {"QNLI": 1}),
    "rte": (
        glue("index\tsentence1\tsentence2\tlabel", "{}\tNo weapons .\tWeapons .\t", ["not_entailment", "entailment"],
             "index\tsentence1\tsentence2", "0\tA .\tB ."),
        [("No weapons .", "Weapons .")] * 2, ["not_entailment", "entailment"], {"dev": 2}, {"RTE": 1}),
    "wnli": (
        glue("index\tsentence1\tsentence2\tlabel", "{}\tI stuck a pin .\tThe carrot had a hole .\t", "10",
             "index\tsentence1\tsentence2", "0\tA .\tB ."),
        [("I stuck a pin .", "The carrot had a hole .")] * 2, "10", {"dev": 2}, {"WNLI": 1}),
    "imdb": (IMDB, [(f"{label} {i}<br />", None) for label in ("neg", "pos") for i in (0, 1)], ["neg", "neg", "pos", "pos"],
             {"dev": 4}, {}),
    "ag": (zhang(("3", "Wall St. Bears", "Reuters - Short-sellers"), ("4", "A", "B")),
           [("Wall St. Bears Reuters - Short-sellers", None), ("A B", None)], "34", {"dev": 2}, {}),
    "dbpedia": (zhang(("14", "E. D. Abbott Ltd", " Abbott was a coachbuilder.")),
                [("E. D. Abbott Ltd  Abbott was a coachbuilder.", None)], ["14"], {"dev": 1}, {}),
    "yelp2": (zhang(("1", REVIEW), ("2", "")), [(UNESCAPED_REVIEW, None), ("", None)], "12", {"dev": 2}, {}),
    "yelp5": (zhang(("5", REVIEW), ("1", "bad")), [(UNESCAPED_REVIEW, None), ("bad", None)], "51", {"dev": 2}, {}),
    "amazon2": (zhang(("2", "Stuning", REVIEW)), [("Stuning " + UNESCAPED_REVIEW, None)], "2", {"dev": 1}, {}),
    "amazon5": (zhang(("3", "like funchuck", "Gave this.")), [("like funchuck Gave this.", None)], "3", {"dev": 1}, {}),
}  # fmt: skip


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


def assert_matches(task, layout):
    _, texts, labels, n_evaluation, n_tests = layout
    rows = list(task.files["train"].rows())
    assert [(row.text, row.pair) for row in rows] == texts
    assert [row.label for row in rows] == list(labels)
    assert {split: len(list(file.rows())) for split, file in task.files.items() if split != "train"} == n_evaluation
    assert {name: len(list(file.rows())) for name, file in task.tests.items()} == n_tests
    assert task.labels is None or {row.label for row in rows} <= task.labels.keys()


def test_tasks_are_the_fifteen_of_the_paper_wnli_and_the_demo():
    text_tasks = {name for name, task in TASKS.items() if task.problem in ("classification", "regression")}
    assert text_tasks == {*LAYOUTS, "demo"}
    assert get_task("STS-B") is get_task("stsb")
    with pytest.raises(FunnelError, match=f"unknown task 'sst3'; choose from {', '.join(TASKS)}"):
        get_task("sst3")


@pytest.mark.parametrize("name", LAYOUTS)
def test_official_file_layout_is_read(name, tmp_path):
    write(tmp_path, LAYOUTS[name][0])
    assert_matches(locate_files(TASKS[name], tmp_path), LAYOUTS[name])


@pytest.mark.parametrize("name", ["rte", "wnli", "cola"])
def test_task_is_found_in_a_copy_of_glue(name, tmp_path):
    for other in ("cola", "rte", "wnli", "sst2"):
        write(tmp_path / TASKS[other].title, LAYOUTS[other][0])
    assert_matches(locate_files(TASKS[name], tmp_path), LAYOUTS[name])


@pytest.mark.parametrize("name", LAYOUTS)
def test_official_archive_is_downloaded_once_and_unpacked(name, tmp_path, monkeypatch):
    """With archives packed like the official ones; test_download.py tests the transfer itself."""
    monkeypatch.setenv("FUNNEL_CACHE", str(tmp_path / "cache"))
    files = LAYOUTS[name][0]
    urls = []

    def fake_download(archive: Archive, folder):
        urls.append(archive.url)
        path = folder / archive.name
        folder.mkdir(parents=True, exist_ok=True)
        inner = {"imdb": "aclImdb", "qqp": "QQP-clean"}.get(name, archive.name.split(".")[0])
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as file:
                for member, content in files.items():
                    if member != "AX.tsv":
                        file.writestr(f"{inner}/{member}", content)
                file.writestr(f"{inner}/original/more/train.tsv", "other")
        elif path.suffix in (".tgz", ".gz"):
            write(tmp_path / "packed" / inner, files)
            with tarfile.open(path, "w:gz") as file:
                file.add(tmp_path / "packed" / inner, inner)
        elif archive.name == "AX.tsv":
            path.write_text(files["AX.tsv"])
        else:
            path.write_text(MRPC_FILES[archive.name], encoding="utf-8")
        return path

    monkeypatch.setattr(download, "download", fake_download)
    if name == "mrpc":
        task = locate_files(TASKS[name], None)
        assert {split: len(list(file.rows())) for split, file in task.files.items()} == {"train": 2, "dev": 1}
        assert [row.text for row in task.tests["MRPC"].rows()] == ["PCCW 's", "The world"]
    else:
        assert_matches(locate_files(TASKS[name], None), LAYOUTS[name])
    first_urls = list(urls)
    locate_files(TASKS[name], None)
    assert urls == first_urls
    assert all(url.startswith("https://") for url in urls)


MRPC_HEADER = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
MRPC_FILES = {
    "msr_paraphrase_train.txt": MRPC_HEADER + '1\t1\t2\tA\tB\r\n0\t3\t4\tC\tD\r\n1\t5\t6\t"E\tF\r\n',
    "msr_paraphrase_test.txt": MRPC_HEADER + "1\t7\t8\tPCCW 's\tCurrent\r\n0\t9\t10\tThe world\tDomestic\r\n",
    "mrpc_dev_ids.tsv": "3\t4\n",
}


@pytest.mark.parametrize(
    ("folder", "name", "train", "dev", "labels"),
    [
        ("SST-2", "sst2", 67349, 872, {"0": 29780, "1": 37569}),
        ("CoLA", "cola", 8551, 1043, {"0": 2528, "1": 6023}),
        ("RTE", "rte", 2489, 277, {"entailment": 1248, "not_entailment": 1241}),  # our copy lacks the row with index 2
        ("STS-B", "stsb", 5749, 1500, None),
    ],
)
def test_real_files_have_the_official_counts(folder, name, train, dev, labels):
    task = locate_files(get_task(name), shared(f"data/glue/{folder}"))
    rows = list(task.files["train"].rows())
    assert (len(rows), len(list(task.files["dev"].rows()))) == (train, dev)
    assert labels is None or Counter(row.label for row in rows) == labels


def test_errors_name_missing_files_and_folders(tmp_path):
    with pytest.raises(FunnelError, match=r"data .*: no train\.tsv; expected the folder with SST-2's files"):
        locate_files(get_task("sst2"), tmp_path)
    with pytest.raises(FunnelError, match=r"data .*none: no such folder; expected the folder with SST-2's files"):
        locate_files(get_task("sst2"), tmp_path / "none")
    with pytest.raises(FunnelError, match="the demo task has no files"):
        locate_files(get_task("demo"), tmp_path)
    write(tmp_path, {"train.tsv": "sentence\tlabel\na\t1\n"})
    with pytest.raises(FunnelError, match=r"no dev\.tsv"):
        locate_files(get_task("sst2"), tmp_path)


def test_data_without_a_task_must_have_a_training_file(tmp_path):
    for path, message in (
        (tmp_path, "no training file in this folder; expected train.csv"),
        (tmp_path / "none", "none: no such file; expected a .tsv"),
    ):
        with pytest.raises(FunnelError, match=f"data .*{message}") as error:
            load_task(TaskArgs(data=path))
        assert error.value.parameter == "data"


def test_data_of_a_named_task_must_be_a_folder(tmp_path):
    (tmp_path / "reviews.csv").write_text("text,label\n")
    with pytest.raises(FunnelError, match="task sst2: expected a folder as data, found a file") as error:
        load_task(TaskArgs(task="sst2", data=tmp_path / "reviews.csv"))
    assert error.value.parameter == "task"


def test_default_task_is_the_demo():
    task = load_task(TaskArgs())
    assert (task.name, task.problem, task.label_names) == ("demo", "classification", ["negative", "positive"])
    assert set(task.files) == {"train", "dev"}


def test_named_task_is_located_in_its_folder(tmp_path):
    write(tmp_path, LAYOUTS["stsb"][0])
    task = load_task(TaskArgs(task="STS-B", data=tmp_path))
    assert_matches(task, LAYOUTS["stsb"])
    assert (task.problem, task.label_names, task.label_ids) == ("regression", None, None)
    assert task.text_columns == ("sentence1", "sentence2")


@pytest.mark.parametrize(
    ("options", "parameter", "message"),
    [
        *(({"data": Path("a.csv"), "dev_share": share}, "dev_share", f"invalid dev_share {share}: expected .* in \\(0, 1\\)")
          for share in (-0.3, 0, 1, float("nan"))),
        ({"data": Path("a.csv"), "dev": Path("b.csv"), "dev_share": 0.1}, "dev_share", "cannot be combined with a dev file"),
        ({"data": Path("a.csv"), "problem": "ranking"}, "problem", "invalid problem 'ranking': choose from classification"),
        ({"task": "sst3"}, "task", "unknown task 'sst3'"),
        *(({"task": "sst2", "data": Path("glue"), name: value}, name, f"{name} only applies to your own data")
          for name, value in (("dev", Path("b.csv")), ("dev_share", 0.2), ("text_column", "a"), ("text_pair_column", "b"),
                              ("label_column", "c"), ("problem", "regression"))),
        ({"label_column": "stars"}, "label_column", "label_column only applies to your own data"),
    ],
)  # fmt: skip
def test_invalid_options_are_rejected_before_any_file_is_read(options, parameter, message):
    with pytest.raises(FunnelError, match=message) as error:
        TaskArgs(**options)
    assert error.value.parameter == parameter


def test_options_become_flags():
    arguments = ["--task", "rte", "--data", "glue"]
    assert parse_options(TaskArgs, arguments) == TaskArgs(task="rte", data=Path("glue"))
    arguments = ["--data", "a.csv", "--dev-share", "0.2", "--problem", "regression", "--text-pair-column", "b"]
    expected = TaskArgs(data=Path("a.csv"), dev_share=0.2, problem="regression", text_pair_column="b")
    assert parse_options(TaskArgs, arguments) == expected


def test_tasks_have_checksums_and_the_papers_hyperparameters():
    for task in TASKS.values():
        assert task.name == "demo" or task.archives
        assert all(archive.checksum.split(":")[0] in ("sha256", "md5", "size") for archive in task.archives)
    paper = {"rte": (16, 10), "mrpc": (16, 10), "stsb": (16, 10), "cola": (16, 10), "sst2": (32, 5), "qnli": (32, 3),
             "mnli": (64, 3), "qqp": (64, 5), "imdb": (32, 5), "ag": (32, 3), "dbpedia": (64, 3), "yelp2": (128, 3),
             "yelp5": (128, 3), "amazon2": (128, 3), "amazon5": (128, 3)}  # fmt: skip
    assert {name: (TASKS[name].batch_size, TASKS[name].epochs) for name in paper} == paper
    assert {name for name in paper if TASKS[name].max_length == 512} == {"imdb", "yelp2", "yelp5", "amazon2", "amazon5"}


def test_wnut17_is_downloaded_as_single_files(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNNEL_CACHE", str(tmp_path))
    task = TASKS["wnut17"]
    monkeypatch.setattr(download, "download", lambda archive, folder: folder / archive.name)
    (tmp_path / "data/wnut17").mkdir(parents=True)
    for archive in task.archives:
        (tmp_path / "data/wnut17" / archive.name).write_text("a\tO\nb\tB-person\n")
    for file in locate_files(task, None).files.values():
        assert [sentence.tags for sentence in file.rows()] == [["O", "B-person"]]


def test_checksums_of_wnut17_are_those_of_the_shared_files():
    for archive in TASKS["wnut17"].archives:
        assert archive.checksum == f"sha256:{sha256(shared(f'data/wnut17/{archive.name}'))}"


def test_concurrent_calls_download_an_archive_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNNEL_CACHE", str(tmp_path / "cache"))
    urls, started = [], threading.Event()

    def slow_download(archive: Archive, folder):
        urls.append(archive.url)
        started.set()
        threading.Event().wait(0.3)
        with zipfile.ZipFile(folder / archive.name, "w") as file:
            for member, content in LAYOUTS["rte"][0].items():
                file.writestr(f"RTE/{member}", content)
        return folder / archive.name

    monkeypatch.setattr(download, "download", slow_download)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(locate_files, TASKS["rte"], None)
        started.wait(60)
        assert_matches(pool.submit(locate_files, TASKS["rte"], None).result(), LAYOUTS["rte"])
        assert_matches(first.result(), LAYOUTS["rte"])
    assert len(urls) == 1


def test_every_metric_of_a_task_exists():
    for task in TASKS.values():
        for name in task.metrics:
            assert name in PROBLEMS[task.problem].metric_functions(task.label_names or [])


def test_a_named_task_keeps_glues_f1():
    assert load_task(TaskArgs(metric="f1")).metrics == ("f1", "accuracy")


@pytest.mark.parametrize("metric", ["f1", "pearson"])
def test_a_metric_that_a_named_task_lacks_is_rejected_before_any_file_is_read(metric):
    with pytest.raises(
        FunnelError,
        match=f"metric '{metric}' does not apply to RTE; choose from accuracy, f1 .macro., matthews,",
    ) as error:
        TaskArgs(task="rte", metric=metric)
    assert error.value.parameter == "metric"

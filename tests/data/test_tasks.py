"""The tasks: their files in the layouts of the official distributions, and the user's own."""

import csv
import io
import tarfile
import threading
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import shared

from funnel.data import tasks
from funnel.data.download import Archive
from funnel.data.files import ExampleFile
from funnel.data.tasks import TASKS, get_task, load_custom_task, load_task, locate_files
from funnel.errors import FunnelError

# A few rows of every file as it is distributed: {file: content}, and what is to be read: (texts, labels) of train, the
# number of rows in what is evaluated on, and the number of answers that GLUE's server wants.
NAMES = "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
MNLI_ROW = "{}\t31193\t31193n\tgovernment\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tConceptually cream skimming .\tProduct {} .\t"
STSB_NAMES = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
STSB_ROW = '{}\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA plane is taking off.\tAn air "plane.\t'
QUESTIONS = '133273\t213221\t213222\tHow is the "life of a math student?\tWhich level?\t'


def glue(names, row, labels, test_names, test_row):
    """train.tsv, dev.tsv and test.tsv."""
    body = "".join(row.format(i, i) + f"{label}\n" for i, label in enumerate(labels))
    return {"train.tsv": f"{names}\n{body}", "dev.tsv": f"{names}\n{body}", "test.tsv": f"{test_names}\n{test_row}\n"}


def mnli():
    train = NAMES + "\tsentence1\tsentence2\tlabel1\tgold_label\n"
    dev = NAMES + "\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n"
    labels = ["neutral", "entailment", "contradiction", "neutral"]
    files = {"train.tsv": train + "".join(f"{MNLI_ROW.format(i, i)}{x}\t{x}\n" for i, x in enumerate(labels))}
    for name in ("dev_matched", "dev_mismatched"):
        files[f"{name}.tsv"] = dev + "".join(f"{MNLI_ROW.format(i, i)}{x}\t-\t-\t-\t-\t{x}\n" for i, x in enumerate(labels[:3]))
    for name in ("test_matched", "test_mismatched"):
        files[f"{name}.tsv"] = NAMES + "\tsentence1\tsentence2\n" + MNLI_ROW.format(0, 0)[:-1] + "\n"
    return files | {"AX.tsv": "index\tsentence1\tsentence2\n0\tThe cat sat .\tThe cat did not sit .\n"}


def zhang(*rows):
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return {"train.csv": text.getvalue(), "test.csv": text.getvalue(), "classes.txt": "x\n"}


REVIEW = 'It was "fine".\\n\\nReally, \\"fine\\".'
READ = 'It was "fine".\n\nReally, "fine".'
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
        glue(f"{STSB_NAMES}\tscore", STSB_ROW, ["5.000", "3.8"], STSB_NAMES, STSB_ROW.format(0)[:-1]),
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
    "yelp2": (zhang(("1", REVIEW), ("2", "")), [(READ, None), ("", None)], "12", {"dev": 2}, {}),
    "yelp5": (zhang(("5", REVIEW), ("1", "bad")), [(READ, None), ("bad", None)], "51", {"dev": 2}, {}),
    "amazon2": (zhang(("2", "Stuning", REVIEW)), [("Stuning " + READ, None)], "2", {"dev": 1}, {}),
    "amazon5": (zhang(("3", "like funchuck", "Gave this.")), [("like funchuck Gave this.", None)], "3", {"dev": 1}, {}),
}  # fmt: skip


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


def check(task, layout):
    _, texts, labels, evaluated, tests = layout
    rows = list(task.files["train"].rows())
    assert [(row.text, row.pair) for row in rows] == texts
    assert [row.label for row in rows] == list(labels)
    assert {split: len(list(file.rows())) for split, file in task.files.items() if split != "train"} == evaluated
    assert {name: len(list(file.rows())) for name, file in task.tests.items()} == tests
    assert task.labels is None or {row.label for row in rows} <= task.labels.keys()


def test_there_are_the_papers_fifteen_tasks_wnli_and_the_demo():
    assert set(TASKS) == {*LAYOUTS, "demo"}
    assert get_task("STS-B") is get_task("stsb")
    with pytest.raises(FunnelError, match=", ".join(TASKS)):
        get_task("sst3")


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_of_the_official_layout_are_read(name, tmp_path):
    write(tmp_path, LAYOUTS[name][0])
    check(locate_files(TASKS[name], tmp_path), LAYOUTS[name])


@pytest.mark.parametrize("name", ["rte", "wnli", "cola"])
def test_a_folder_of_all_of_glue_will_do(name, tmp_path):
    for other in ("cola", "rte", "wnli", "sst2"):
        write(tmp_path / TASKS[other].title, LAYOUTS[other][0])
    check(locate_files(TASKS[name], tmp_path), LAYOUTS[name])


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_official_archive_is_downloaded_and_unpacked(name, tmp_path, monkeypatch):
    """As the archives are packed; the transfer itself has its own tests."""
    monkeypatch.setenv("FUNNEL_CACHE", str(tmp_path / "cache"))
    files = LAYOUTS[name][0]
    asked = []

    def fake(archive: Archive, folder):
        asked.append(archive.address)
        path = folder / archive.name
        folder.mkdir(parents=True, exist_ok=True)
        inner = {"imdb": "aclImdb", "qqp": "QQP-clean"}.get(name, archive.name.split(".")[0])
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as file:
                for member, content in files.items():
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

    monkeypatch.setattr(tasks, "download", fake)
    if name == "mrpc":
        task = locate_files(TASKS[name], None)
        assert {split: len(list(file.rows())) for split, file in task.files.items()} == {"train": 2, "dev": 1}
        assert [row.text for row in task.tests["MRPC"].rows()] == ["PCCW 's", "The world"]
    else:
        check(locate_files(TASKS[name], None), LAYOUTS[name])
    before = list(asked)
    locate_files(TASKS[name], None)
    assert asked == before
    assert all(address.startswith("https://") for address in asked)


MRPC_NAMES = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
MRPC_FILES = {
    "msr_paraphrase_train.txt": MRPC_NAMES + '1\t1\t2\tA\tB\r\n0\t3\t4\tC\tD\r\n1\t5\t6\t"E\tF\r\n',
    "msr_paraphrase_test.txt": MRPC_NAMES + "1\t7\t8\tPCCW 's\tCurrent\r\n0\t9\t10\tThe world\tDomestic\r\n",
    "mrpc_dev_ids.tsv": "3\t4\n",
}


@pytest.mark.parametrize(
    ("folder", "name", "train", "dev", "labels"),
    [
        ("SST-2", "sst2", 67349, 872, {"0": 29780, "1": 37569}),
        ("CoLA", "cola", 8551, 1043, {"0": 2528, "1": 6023}),
        ("RTE", "rte", 2489, 277, {"entailment": 1248, "not_entailment": 1241}),  # the copy lacks the row of index 2
        ("STS-B", "stsb", 5749, 1500, None),
    ],
)
def test_real_files_have_their_official_counts(folder, name, train, dev, labels):
    task = locate_files(get_task(name), shared(f"data/glue/{folder}"))
    rows = list(task.files["train"].rows())
    assert (len(rows), len(list(task.files["dev"].rows()))) == (train, dev)
    assert labels is None or Counter(row.label for row in rows) == labels


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FunnelError, match=r"train\.tsv: no such file; --data takes the folder that has SST-2's files"):
        locate_files(get_task("sst2"), tmp_path)
    with pytest.raises(FunnelError, match="no such folder"):
        locate_files(get_task("sst2"), tmp_path / "none")
    with pytest.raises(FunnelError, match="demo"):
        locate_files(get_task("demo"), tmp_path)
    write(tmp_path, {"train.tsv": "sentence\tlabel\na\t1\n"})
    with pytest.raises(FunnelError, match=r"dev\.tsv: no such file"):
        locate_files(get_task("sst2"), tmp_path)


def own(tmp_path, rows, problem=None, names="text,label"):
    (tmp_path / "own.csv").write_text("\n".join([names, *rows]) + "\n")
    return load_custom_task(tmp_path / "own.csv", None, None, None, None, problem)


@pytest.mark.parametrize(
    ("labels", "problem", "expected", "said"),
    [
        (["b", "a", "b"], None, ["a", "b"], "2 classes: a (1), b (2)"),
        (["10", "9", "9"], None, ["9", "10"], "2 classes: 9 (2), 10 (1) (--problem regression takes them as scores)"),
        (["1.5", "2"], None, None, "scores from 1.5 to 2: regression (--problem classification takes them as classes)"),
        ([str(i) for i in range(60)], None, None, "scores from 0 to 59: regression"),
        (["1.5", "2"] * 9, "classification", ["1.5", "2"], "2 classes"),
        (["1", "2"], "regression", None, "scores from 1 to 2"),
        (["0", "x", "nan"], None, ["0", "nan", "x"], "3 classes"),
        (["1.5", "x", "y"], None, ["1.5", "x", "y"], "3 classes"),
        (["1.5", "2", "x"], "classification", ["1.5", "2", "x"], "3 classes"),
        (["pos", "pos ", "neg"], None, ["neg", "pos", "pos "], "3 classes: neg (1), pos (1), 'pos ' (1)"),
        ([f"x{i}" for i in range(11)], "classification", sorted(f"x{i}" for i in range(11)), "11 classes"),
    ],
)
def test_what_own_labels_are(tmp_path, labels, problem, expected, said):
    task, sentence = own(tmp_path, [f"t,{label}" for label in labels], problem)
    assert (task.labels and list(task.labels)) == expected
    assert sentence.startswith(said)
    assert task.metrics == {0: ("pearson", "spearman"), 2: ("accuracy", "f1")}.get(
        len(expected or ()), ("accuracy", "macro_f1")
    )


@pytest.mark.parametrize(
    ("rows", "problem", "names", "words"),
    [
        (["t,a", "t,a"], None, "text,label", "every label is 'a'"),
        (["t,a", "t,b"], "regression", "text,label", "own.csv, line 2: label 'a' is no number that float32 holds$"),
        (["t,a"], None, "review,label", "which column is the text. name it with --text-column; there are review, label"),
        (["t,a"], None, "text,stars", "which column is the label. name it with --label-column; there are text, stars"),
        ([f"t,x{i}" for i in range(60)], None, "text,label", "60 classes for 60 texts; is 'label' the column of labels"),
        ([f"t,x{i}" for i in range(11)], None, "text,label", "11 classes for 11 texts; .*--problem classification takes them"),
        (["t,a", "t,", "t,b"], None, "text,label", "own.csv, line 3: 'label' is empty; give the row its label"),
        (
            ["t,1.5", "t,2", "t,n/a"],
            None,
            "text,label",
            "own.csv, line 4: label 'n/a' is no number .*and most others are scores",
        ),
        ([f"t,{i}" for i in range(60)] + ["t,nan"], None, "text,label", "line 62: label 'nan' is no number"),
        (["t,1.5", "t,1e39"], "regression", "text,label", "line 3: label '1e39' is no number that float32 holds$"),
        (["t,2020_01", "t,2020_02", "t,1.5"], "regression", "text,label", "line 2: label '2020_01' is no number"),
    ],
)
def test_own_data_that_cannot_be_used_is_refused(tmp_path, rows, problem, names, words):
    with pytest.raises(FunnelError, match=words):
        own(tmp_path, rows, problem, names)


def test_a_column_is_one_thing(tmp_path):
    (tmp_path / "own.csv").write_text("text,label\nt,a\n")
    for pair, label in (("text", None), (None, "text"), ("label", None)):
        with pytest.raises(FunnelError, match=r"own.csv: the column '\w+' is asked for twice"):
            load_custom_task(tmp_path / "own.csv", None, None, pair, label, None)


def test_data_without_a_task_is_a_file(tmp_path):
    for path, words in ((tmp_path, "is a folder; say with --task"), (tmp_path / "none", "no such file; it takes a .tsv")):
        with pytest.raises(FunnelError, match=f"--data .*: {words}"):
            load_task(data=path)


def test_own_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_text("")
    with pytest.raises(FunnelError, match=r"it takes a .tsv, .csv or .jsonl file"):
        load_custom_task(tmp_path / "a.parquet", None, None, None, None, None)
    with pytest.raises(FunnelError, match="no such file"):
        load_custom_task(tmp_path / "a.csv", None, None, None, None, None)


def test_every_task_has_a_checksum_and_settings_of_the_paper():
    for task in TASKS.values():
        assert task.name == "demo" or task.archives
        assert all(archive.checksum.split(":")[0] in ("sha256", "md5", "size") for archive in task.archives)
        assert all(isinstance(file, ExampleFile) for file in task.files.values())
    paper = {"rte": (16, 10), "mrpc": (16, 10), "stsb": (16, 10), "cola": (16, 10), "sst2": (32, 5), "qnli": (32, 3),
             "mnli": (64, 3), "qqp": (64, 5), "imdb": (32, 5), "ag": (32, 3), "dbpedia": (64, 3), "yelp2": (128, 3),
             "yelp5": (128, 3), "amazon2": (128, 3), "amazon5": (128, 3)}  # fmt: skip
    assert {name: (TASKS[name].batch_size, TASKS[name].epochs) for name in paper} == paper
    assert {name for name in paper if TASKS[name].max_length == 512} == {"imdb", "yelp2", "yelp5", "amazon2", "amazon5"}


def test_two_processes_that_want_the_same_archive_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNNEL_CACHE", str(tmp_path / "cache"))
    asked, started = [], threading.Event()

    def slow(archive: Archive, folder):
        asked.append(archive.address)
        started.set()
        threading.Event().wait(0.3)
        with zipfile.ZipFile(folder / archive.name, "w") as file:
            for member, content in LAYOUTS["rte"][0].items():
                file.writestr(f"RTE/{member}", content)
        return folder / archive.name

    monkeypatch.setattr(tasks, "download", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(locate_files, TASKS["rte"], None)
        started.wait(60)
        check(pool.submit(locate_files, TASKS["rte"], None).result(), LAYOUTS["rte"])
        check(first.result(), LAYOUTS["rte"])
    assert len(asked) == 1

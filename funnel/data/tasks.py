"""The tasks: their files, columns, labels, metrics and default hyperparameters.

To add a task, add an entry to `TASKS`. The user's own files become a task too (`CUSTOM`; see `funnel.data.custom`).
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from funnel.data import demo
from funnel.data.custom import PROBLEMS, ColumnChoice, find_files, infer_labels, open_dev_file, open_examples
from funnel.data.download import Archive, fetch
from funnel.data.files import Column, ExampleFile, InMemoryExamples
from funnel.data.formats import check_file
from funnel.data.mrpc import build_mrpc
from funnel.errors import FunnelError, format_list
from funnel.io import cache_dir
from funnel.options import check_options, option

DEFAULT_DEV_SHARE = 0.1  # of the training examples, without a dev file
CUSTOM = "custom"  # name of a task made of the user's own files
CLASSIFICATION_METRICS = ("accuracy", "f1 (macro)")  # of the user's own files
REGRESSION_METRICS = ("pearson", "spearman", "rmse")


@dataclass(frozen=True)
class Task:
    """A classification or regression task.

    Attributes:
        name: identifier.
        title: the benchmark's name, for messages; also the name of the task's folder in a copy of GLUE.
        labels: label names by the label as written in the file, in the order of their ids; None for regression.
        metrics: names as in `funnel.training.metrics.get_metric`. The first one selects the best checkpoint.
        batch_size, epochs, learning_rate, max_length: default hyperparameters for pretrained weights.
        files: labeled examples by split: "train" and "dev", and further sets to evaluate on ("dev_mismatched"). Custom
            tasks may lack "dev". Paths are relative to the task's folder until `locate_files` has found it.
        tests: unlabeled files, by the file name that the GLUE server expects for their predictions.
        archives: what to download.
        build: adds files to the unpacked archives, as in `funnel.data.download.fetch`.
        description: summary of custom files, to be printed; "" for other tasks.
        warnings: suspected problems with custom files, one line each.
    """

    name: str
    title: str
    labels: dict[str, str] | None
    metrics: tuple[str, ...]
    batch_size: int
    epochs: float
    learning_rate: float
    max_length: int = 128
    files: Mapping[str, ExampleFile | InMemoryExamples] = field(default_factory=dict)
    tests: Mapping[str, ExampleFile] = field(default_factory=dict)
    archives: tuple[Archive, ...] = ()
    build: Callable[[Path, Path], None] | None = None
    description: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def label_names(self) -> list[str] | None:
        """The names of the classes in the order of their ids; None for regression."""
        return None if self.labels is None else list(self.labels.values())

    @property
    def num_labels(self) -> int:
        """Number of classes; 1 for regression."""
        return 1 if self.labels is None else len(self.labels)

    @property
    def label_ids(self) -> dict[str, int] | None:
        """Label ids by the label as written in the file; None for regression."""
        return None if self.labels is None else {label: i for i, label in enumerate(self.labels)}

    @property
    def text_columns(self) -> tuple[Column, ...]:
        """The columns of the text, or of the two texts of a pair; none for a text that is joined from several columns."""
        train = self.files.get("train")
        if not isinstance(train, ExampleFile):
            return ("sentence",)
        return () if train.joined else train.text_columns


# --- the table of tasks -----------------------------------------------------------------------------------------------

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data"
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data"
FAST_AI_URL = "https://s3.amazonaws.com/fast-ai-nlp"

SENTENCE: tuple[Column, ...] = ("sentence",)
SENTENCE_PAIR: tuple[Column, ...] = ("sentence1", "sentence2")
QUESTION_PAIR: tuple[Column, ...] = ("question1", "question2")
QUESTION_ANSWER: tuple[Column, ...] = ("question", "sentence")
MRPC_PAIR: tuple[Column, ...] = ("#1 String", "#2 String")

BINARY = {"0": "0", "1": "1"}
SENTIMENT = {"0": "negative", "1": "positive"}
ACCEPTABILITY = {"0": "unacceptable", "1": "acceptable"}
PARAPHRASE = {"0": "not_equivalent", "1": "equivalent"}
DUPLICATE = {"0": "not_duplicate", "1": "duplicate"}
ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}
NLI = {"contradiction": "contradiction", "entailment": "entailment", "neutral": "neutral"}
POLARITY = {"1": "negative", "2": "positive"}
STARS = {"1": "1 star", "2": "2 stars", "3": "3 stars", "4": "4 stars", "5": "5 stars"}
AG_NEWS = {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}
DBPEDIA = {"1": "Company", "2": "EducationalInstitution", "3": "Artist", "4": "Athlete", "5": "OfficeHolder",
           "6": "MeanOfTransportation", "7": "Building", "8": "NaturalPlace", "9": "Village", "10": "Animal", "11": "Plant",
           "12": "Album", "13": "Film", "14": "WrittenWork"}  # fmt: skip


def _tsv(name: str, text_columns: tuple[Column, ...], label_column: Column | None = None) -> ExampleFile:
    return ExampleFile(Path(f"{name}.tsv"), text_columns, label_column)


def _glue_files(text_columns: tuple[Column, ...], label_column: Column) -> dict[str, ExampleFile]:
    """GLUE's usual files: tsv with a header."""
    return {split: _tsv(split, text_columns, label_column) for split in ("train", "dev")}


def _glue_archive(name: str, checksum: str) -> tuple[Archive, ...]:
    return (Archive(f"{GLUE_URL}/{name}.zip", checksum),)


def _zhang_files(n_text_columns: int) -> dict[str, ExampleFile]:
    """The csv files of Zhang et al. (2015): class, title (in some), text. The paper reports test accuracy: dev is test.csv."""
    columns = tuple(range(1, 1 + n_text_columns))
    joined = n_text_columns > 1
    files = {"train": Path("train.csv"), "dev": Path("test.csv")}
    return {split: ExampleFile(path, columns, 0, joined=joined, escaped=True) for split, path in files.items()}


def _zhang_archive(name: str, size: int) -> tuple[Archive, ...]:
    return (Archive(f"{FAST_AI_URL}/{name}_csv.tgz", f"size:{size}"),)


def _copy_diagnostics(downloads: Path, unpacked: Path) -> None:
    """Puts GLUE's diagnostic set beside MNLI's other files."""
    shutil.copy(downloads / "AX.tsv", _find_folder(unpacked, "test_matched.tsv") or unpacked)


def _find_folder(folder: Path, name: str) -> Path | None:
    """The folder with a file of this name, at any depth; the one nearest to the top if there are several."""
    matches = sorted(folder.rglob(name), key=lambda path: (len(path.parts), path))
    return matches[0].parent if matches else None


# Batch sizes and epochs: table 8 of the paper. Learning rates: the README of github.com/laiguokun/Funnel-Transformer (1e-5
# for SST-2, CoLA and MNLI, 2e-5 for QNLI and QQP); for the other tasks the middle of the paper's grid {1e-5, 2e-5, 3e-5}.
# WNLI is not in the paper; it has RTE's settings. Metrics: as GLUE reports them. Checksums: as published by TensorFlow
# Datasets and torchtext; for fast.ai's archives only sizes are published. The learning rates are for pretrained weights.
# Positional numbers: batch size, epochs, learning rate, maximum length (default 128).
_TASKS = (
    # Two epochs of seven blocks on the weights in the package take less than two minutes on two CPU cores.
    Task("demo", "demo", SENTIMENT, ("accuracy", "f1"), 64, 2, 2e-5),
    # CoLA's files have no header: source, label, the author's original mark, sentence.
    Task("cola", "CoLA", ACCEPTABILITY, ("matthews", "accuracy"), 16, 10, 1e-5,
         files=_glue_files((3,), 1), tests={"CoLA": _tsv("test", SENTENCE)},
         archives=_glue_archive("CoLA", "sha256:f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff")),
    Task("sst2", "SST-2", SENTIMENT, ("accuracy", "f1"), 32, 5, 1e-5,
         files=_glue_files(SENTENCE, "label"), tests={"SST-2": _tsv("test", SENTENCE)},
         archives=_glue_archive("SST-2", "sha256:d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa")),
    Task("mrpc", "MRPC", PARAPHRASE, ("accuracy", "f1"), 16, 10, 2e-5,
         files=_glue_files(MRPC_PAIR, "Quality"), tests={"MRPC": _tsv("test", MRPC_PAIR)}, build=build_mrpc,
         archives=(
             Archive(f"{MRPC_URL}/msr_paraphrase_train.txt",
                     "sha256:60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
             Archive(f"{MRPC_URL}/msr_paraphrase_test.txt",
                     "sha256:a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"),
             Archive(f"{GLUE_URL}/mrpc_dev_ids.tsv",
                     "sha256:971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"))),
    Task("stsb", "STS-B", None, REGRESSION_METRICS, 16, 10, 2e-5,
         files=_glue_files(SENTENCE_PAIR, "score"), tests={"STS-B": _tsv("test", SENTENCE_PAIR)},
         archives=_glue_archive("STS-B", "md5:d573676be38f1a075a5702b90ceab3de")),
    Task("qqp", "QQP", DUPLICATE, ("accuracy", "f1"), 64, 5, 2e-5,
         files=_glue_files(QUESTION_PAIR, "is_duplicate"), tests={"QQP": _tsv("test", QUESTION_PAIR)},
         archives=_glue_archive("QQP-clean", "sha256:40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0")),
    Task("mnli", "MNLI", NLI, ("accuracy",), 64, 3, 1e-5, build=_copy_diagnostics,
         files={"train": _tsv("train", SENTENCE_PAIR, "gold_label"),
                "dev": _tsv("dev_matched", SENTENCE_PAIR, "gold_label"),
                "dev_mismatched": _tsv("dev_mismatched", SENTENCE_PAIR, "gold_label")},
         tests={"MNLI-m": _tsv("test_matched", SENTENCE_PAIR), "MNLI-mm": _tsv("test_mismatched", SENTENCE_PAIR),
                "AX": _tsv("AX", SENTENCE_PAIR)},
         archives=(
             Archive(f"{GLUE_URL}/MNLI.zip", "sha256:e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
             Archive(f"{GLUE_URL}/AX.tsv", "sha256:0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd"))),
    Task("qnli", "QNLI", ENTAILMENT, ("accuracy",), 32, 3, 2e-5,
         files=_glue_files(QUESTION_ANSWER, "label"), tests={"QNLI": _tsv("test", QUESTION_ANSWER)},
         archives=_glue_archive("QNLIv2", "sha256:e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5")),
    Task("rte", "RTE", ENTAILMENT, ("accuracy",), 16, 10, 2e-5,
         files=_glue_files(SENTENCE_PAIR, "label"), tests={"RTE": _tsv("test", SENTENCE_PAIR)},
         archives=_glue_archive("RTE", "sha256:6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee")),
    Task("wnli", "WNLI", BINARY, ("accuracy",), 16, 10, 2e-5,
         files=_glue_files(SENTENCE_PAIR, "label"), tests={"WNLI": _tsv("test", SENTENCE_PAIR)},
         archives=_glue_archive("WNLI", "sha256:ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46")),
    Task("imdb", "IMDB", {"neg": "negative", "pos": "positive"}, ("accuracy",), 32, 5, 2e-5, 512,
         files={split: ExampleFile(Path(folder), label_folders=("neg", "pos"))
                for split, folder in (("train", "train"), ("dev", "test"))},
         archives=(Archive("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
                           "sha256:c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"),)),
    Task("ag", "AG News", AG_NEWS, ("accuracy",), 32, 3, 2e-5,
         files=_zhang_files(2), archives=_zhang_archive("ag_news", 11784419)),
    Task("dbpedia", "DBpedia", DBPEDIA, ("accuracy",), 64, 3, 2e-5,
         files=_zhang_files(2), archives=_zhang_archive("dbpedia", 68341743)),
    Task("yelp2", "Yelp-2", POLARITY, ("accuracy",), 128, 3, 2e-5, 512,
         files=_zhang_files(1), archives=_zhang_archive("yelp_review_polarity", 166373201)),
    Task("yelp5", "Yelp-5", STARS, ("accuracy",), 128, 3, 2e-5, 512,
         files=_zhang_files(1), archives=_zhang_archive("yelp_review_full", 196146755)),
    Task("amazon2", "Amazon-2", POLARITY, ("accuracy",), 128, 3, 2e-5, 512,
         files=_zhang_files(2), archives=_zhang_archive("amazon_review_polarity", 688339454)),
    Task("amazon5", "Amazon-5", STARS, ("accuracy",), 128, 3, 2e-5, 512,
         files=_zhang_files(2), archives=_zhang_archive("amazon_review_full", 643695014)),
)  # fmt: skip
TASKS = {task.name: task for task in _TASKS}


# --- from a name to files ---------------------------------------------------------------------------------------------


def task_key(name: str) -> str:
    """A task's name or title in the form of the keys of `TASKS`."""
    return name.lower().replace("-", "").replace("_", "")


def get_task(name: str) -> Task:
    """The task with this name, ignoring case, hyphens and underscores.

    Raises:
        FunnelError: there is no such task.
    """
    key = task_key(name)
    if key not in TASKS:
        raise FunnelError(f"unknown task {name!r}; choose from {', '.join(TASKS)}", "task")
    return TASKS[key]


def locate_files(task: Task, folder: Path | None) -> Task:
    """The task with the paths of its files filled in.

    Args:
        folder: contains the task's files, directly or in a subfolder with the task's title (as a copy of GLUE does). None
            for the cache, into which missing files are downloaded. The demo task is part of the package.

    Raises:
        FunnelError: a file is missing or cannot be downloaded.
    """
    if task.name == "demo":
        if folder is not None:
            raise FunnelError(f"data {folder}: the demo task has no files; choose another task", "data")
        train, dev = demo.examples()
        return replace(task, files={"train": train, "dev": dev})
    files = {split: file for split, file in task.files.items() if isinstance(file, ExampleFile)}
    if folder is None:
        folder = _download(task)
    elif not os.path.isdir(folder):
        raise FunnelError(f"data {folder}: no such folder; expected the folder with {task.title}'s files", "data")
    elif not (folder / files["train"].path).exists() and (folder / task.title / files["train"].path).exists():
        folder = folder / task.title
    for file in files.values():
        if not (folder / file.path).exists():
            raise FunnelError(f"data {folder}: no {file.path}; expected the folder with {task.title}'s files", "data")
    return replace(
        task,
        files={split: file.in_folder(folder) for split, file in files.items()},
        tests={name: file.in_folder(folder) for name, file in task.tests.items()},
    )


def _download(task: Task) -> Path:
    """The folder in the cache with a task's files, which are downloaded if necessary."""
    train = task.files["train"]
    assert isinstance(train, ExampleFile)
    folder = cache_dir() / "data" / task.name
    unpacked = fetch(task.archives, folder, task.build)
    files = _find_folder(unpacked, train.path.name)
    if files is None:
        raise FunnelError(f"{unpacked}: {task.title}'s archive has no {train.path}; delete {folder} and try again")
    return files


# --- options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskArgs:
    """The options that select a task and its files.

    Raises:
        FunnelError: a value is invalid, the task is unknown, `dev` is combined with `dev_share`, an option for custom files is
            set for another task, or the metric does not apply to the task (that of custom files is checked by `load_task`).
    """

    task: str | None = option(
        None, f"one of {', '.join(TASKS)}; default: demo, or a custom task if data is given", metavar="NAME"
    )
    data: Path | None = option(
        None,
        "folder with the task's files as published (default: download them), or, without a task, your own .csv, .tsv, "
        ".jsonl, .json or .parquet file, or a folder with a train and a dev file",
        metavar="PATH",
    )
    dev: Path | None = option(None, "your own file to evaluate on (default: a random split of the data)", metavar="FILE")
    dev_share: float | None = option(
        None,
        f"fraction of your own data to evaluate on, stratified by class (default: {DEFAULT_DEV_SHARE})",
        bounds="(0, 1)",
        metavar="SHARE",
    )
    text_column: str | None = option(
        None, "column of the texts in your own data; 0, 1, … if it has no header (default: text or sentence)", metavar="NAME"
    )
    text_pair_column: str | None = option(
        None, "column of the second texts, for tasks on pairs (default: none)", metavar="NAME"
    )
    label_column: str | None = option(None, "column of the labels in your own data (default: label)", metavar="NAME")
    problem: str | None = option(None, "kind of task (default: inferred from the labels)", choices=PROBLEMS)
    metric: str | None = option(
        None,
        "metric that selects the best checkpoint: accuracy, f1, 'f1 (macro)', 'f1 (LABEL)', matthews, pearson, spearman, rmse "
        "or loss (default: the task's; your own data: accuracy or pearson)",
        metavar="NAME",
    )
    positive_label: str | None = option(
        None, "class of your own data whose F1 is computed (default: the mean F1 of all classes)", metavar="LABEL"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.task is not None:
            get_task(self.task)
        if self.dev is not None and self.dev_share is not None:
            raise FunnelError("dev_share cannot be combined with a dev file; use one of them", "dev_share")
        if self.task is None and self.data is not None:
            return
        for name in ("dev", "dev_share", "text_column", "text_pair_column", "label_column", "problem", "positive_label"):
            if getattr(self, name) is not None:
                reason = f"task {self.task} defines its own" if self.task else "none is given"
                raise FunnelError(f"{name} only applies to your own data; {reason}", name)
        if self.metric is not None:
            _with_metric(get_task(self.task or "demo"), self.metric)


def load_task(args: TaskArgs) -> Task:
    """The selected task with its files located, downloaded if necessary. Custom files are summarized in `description`.

    Raises:
        FunnelError: a file is missing, malformed or cannot be downloaded, or the metric does not apply to the task.
    """
    task = _locate_task(args)
    return task if args.metric is None else _with_metric(task, args.metric)


def _locate_task(args: TaskArgs) -> Task:
    if args.task is None and args.data is not None:
        return _custom_task(args, args.data)
    if args.data is not None and os.path.isfile(args.data):
        found = f"expected a folder as data, found a file ({args.data.name})"
        raise FunnelError(f"task {args.task}: {found}; to train on your own file, pass no task", "task")
    return locate_files(get_task(args.task or "demo"), args.data)


def _with_metric(task: Task, metric: str) -> Task:
    """The task with `metric` as the one that selects the best checkpoint.

    Args:
        metric: "f1" stands for the task's F1, whichever it is.

    Raises:
        FunnelError: the metric does not apply to the task.
    """
    if task.label_names is None:
        names = ["pearson", "spearman", "rmse", "loss"]
    else:
        names = ["accuracy", "matthews", "loss", "f1 (macro)", *(f"f1 ({label})" for label in task.label_names)]
    own_f1 = next((name for name in task.metrics if name.startswith("f1")), None)
    chosen = own_f1 if metric == "f1" and own_f1 else metric
    if chosen not in {*names, own_f1}:
        choices = format_list(["f1", *names] if own_f1 else names)
        raise FunnelError(f"metric {metric!r} does not apply to {task.title}; choose from {choices}", "metric")
    return replace(task, metrics=tuple(dict.fromkeys([chosen, *task.metrics])))


def _custom_task(args: TaskArgs, data: Path) -> Task:
    """A task made of the user's own files; its hyperparameters are those of QNLI and AG News."""
    paths = find_files(data) if os.path.isdir(data) else {"train": data}
    if args.dev is not None:
        paths["dev"] = args.dev
    if args.dev_share is not None and "dev" in paths:
        raise FunnelError(f"dev_share cannot be combined with the dev file {paths['dev']}; use one of them", "dev_share")
    for path in paths.values():
        check_file(path, "dev" if path == args.dev else "data")  # before either is read
    train = open_examples(paths["train"], ColumnChoice(args.text_column, args.text_pair_column, args.label_column))
    files = {"train": train}
    if "dev" in paths:
        files["dev"] = open_dev_file(paths["dev"], train, "data" if args.dev is None else "dev")
    labels = infer_labels(train, args.problem)
    metrics = REGRESSION_METRICS if labels.names is None else CLASSIFICATION_METRICS
    if args.positive_label is not None:
        metrics = ("accuracy", f"f1 ({_check_positive_label(args.positive_label, labels.names)})")
    lines = [*dict.fromkeys(file.description for file in files.values()), labels.description]
    task = Task(CUSTOM, data.resolve().name, labels.names, metrics, 32, 3, 2e-5, files=files, warnings=labels.warnings)
    return replace(task, description="\n".join(lines))


def _check_positive_label(label: str, names: Mapping[str, str] | None) -> str:
    """Returns the label, if it is one of the classes."""
    if names is None:
        raise FunnelError(f"positive_label {label!r}: the labels are scores, not classes; omit it", "positive_label")
    if label not in names.values():
        raise FunnelError(f"unknown positive_label {label!r}; choose from {format_list(names.values())}", "positive_label")
    if label == "macro":
        raise FunnelError(
            "positive_label 'macro': 'f1 (macro)' is the mean over all classes; rename the label", "positive_label"
        )
    return label

"""The tasks: their files, columns, labels, metrics and default hyperparameters.

To add a task, add an entry to `_TASKS`. The user's own files become a task too (`CUSTOM`; see `funnel.problems.task_args`).
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from funnel.data import demo
from funnel.data.choices import ChoiceFile
from funnel.data.download import Archive, fetch
from funnel.data.files import Column, ExampleFile, InMemoryExamples, SourceFile
from funnel.data.mrpc import build_mrpc
from funnel.data.squad import SquadFile
from funnel.data.tagged import TaggedFile
from funnel.errors import FunnelError
from funnel.io import cache_dir

CUSTOM = "custom"  # name of a task made of the user's own files
REGRESSION_METRICS = ("pearson", "spearman", "rmse")
SPAN_METRICS = ("f1", "exact")
SPAN_METRICS_WITH_UNANSWERABLE = (*SPAN_METRICS, "has-answer f1", "no-answer f1")
TOKEN_METRICS = ("f1", "precision", "recall", "accuracy")  # of entities; accuracy is that of all tags


@dataclass(frozen=True)
class Task:
    """A task: its files, labels and default hyperparameters.

    Attributes:
        name: identifier.
        title: the benchmark's name, for messages; also the name of the task's folder in a copy of GLUE.
        labels: label names by the label as written in the file, in the order of their ids; None without classes.
        metrics: names as in `Problem.metrics`. The first one selects the best checkpoint.
        batch_size, epochs, learning_rate, max_length: default hyperparameters for pretrained weights.
        problem: kind of problem, a key of `funnel.problems.registry.PROBLEMS`; default: by whether there are labels.
        steps: default number of training steps, instead of `epochs`.
        warmup, layer_lr_decay: further default hyperparameters.
        files: labeled examples by split: "train" and "dev", and further sets to evaluate on ("dev_mismatched"). Custom
            tasks may lack "dev". Paths are relative to the task's folder until `locate_files` has found it.
        tests: unlabeled files, by the file name that the GLUE server expects for their predictions.
        archives: what to download.
        build: adds files to the unpacked archives, as in `funnel.data.download.fetch`.
        encoding: settings of the problem's encoder that differ from its defaults, by name.
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
    problem: str = ""
    steps: int | None = None
    warmup: float = 0.1
    layer_lr_decay: float = 1.0
    files: Mapping[str, SourceFile | InMemoryExamples] = field(default_factory=dict)
    tests: Mapping[str, ExampleFile] = field(default_factory=dict)
    archives: tuple[Archive, ...] = ()
    build: Callable[[Path, Path], None] | None = None
    encoding: Mapping[str, int] = field(default_factory=dict)
    description: str = ""
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.problem:
            object.__setattr__(self, "problem", "regression" if self.labels is None else "classification")

    @property
    def label_names(self) -> list[str] | None:
        """The names of the classes in the order of their ids; None without classes."""
        return None if self.labels is None else list(self.labels.values())

    @property
    def label_ids(self) -> dict[str, int] | None:
        """Label ids by the label as written in the file; None without classes."""
        return None if self.labels is None else {label: i for i, label in enumerate(self.labels)}

    @property
    def text_columns(self) -> tuple[Column, ...]:
        """The columns of the text, or of the two texts of a pair; none for a text that is joined from several columns."""
        train = self.files.get("train")
        if train is None or isinstance(train, InMemoryExamples):
            return ("sentence",)
        return () if isinstance(train, ExampleFile) and train.joined else train.text_columns


# --- the table of tasks -----------------------------------------------------------------------------------------------

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data"
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data"
FAST_AI_URL = "https://s3.amazonaws.com/fast-ai-nlp"
SQUAD_URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
WNUT17_URL = "https://raw.githubusercontent.com/leondz/emerging_entities_17/master"

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
WNUT17 = ("O", *(f"{prefix}-{kind}" for kind in ("corporation", "creative-work", "group", "location", "person", "product")
                 for prefix in "BI"))  # fmt: skip
RACE_FOLDERS = {"train": "train", "dev": "dev", "dev_middle": "dev/middle", "dev_high": "dev/high"}


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


def _squad(name: str, title: str, metrics: tuple[str, ...], checksums: tuple[str, str]) -> Task:
    """A version of SQuAD, with the settings of github.com/laiguokun/Funnel-Transformer."""
    version = "v2.0" if name == "squad2" else "v1.1"
    names = {split: f"{split}-{version}.json" for split in ("train", "dev")}
    return Task(
        name, title, None, metrics, 48, 0, 3e-5, 512, problem="answer-spans", steps=8000, warmup=0.125, layer_lr_decay=0.75,
        files={split: SquadFile(Path(file)) for split, file in names.items()}, build=_copy_json,
        archives=tuple(
            Archive(f"{SQUAD_URL}/{file}", f"sha256:{checksum}")
            for file, checksum in zip(names.values(), checksums, strict=True)
        ),
    )  # fmt: skip


def _copy_json(downloads: Path, unpacked: Path) -> None:
    """Puts files that are not archives beside the unpacked ones."""
    unpacked.mkdir(parents=True, exist_ok=True)
    for path in downloads.glob("*.json"):
        shutil.copy(path, unpacked)


def _copy_diagnostics(downloads: Path, unpacked: Path) -> None:
    """Puts GLUE's diagnostic set beside MNLI's other files."""
    shutil.copy(downloads / "AX.tsv", _find_folder(unpacked, "test_matched.tsv") or unpacked)


def _copy_wnut17(downloads: Path, unpacked: Path) -> None:
    """Puts WNUT-17's files, which are not in an archive, where unpacked files are."""
    unpacked.mkdir(exist_ok=True)
    for file in get_task("wnut17").files.values():
        assert isinstance(file, TaggedFile)
        shutil.copy(downloads / file.path, unpacked)


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
    # Settings of the authors' README (TensorFlow, "Finetuning on RACE") and tensorflow/race.py. "dev" is both levels.
    Task("race", "RACE", None, ("accuracy",), 16, 4.4, 2e-5, 512, problem="multiple-choice", steps=24_000,
         files={split: ChoiceFile(Path(folder)) for split, folder in RACE_FOLDERS.items()},
         archives=(Archive("http://www.cs.cmu.edu/~glai1/data/race/RACE.tar.gz", "size:25443609"),)),
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
    _squad("squad", "SQuAD 1.1", SPAN_METRICS,
           ("3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
            "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9")),
    _squad("squad2", "SQuAD 2.0", SPAN_METRICS_WITH_UNANSWERABLE,
           ("68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002",
            "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8")),
    # Published results on WNUT-17 are F1 on test. Batch size, epochs, learning rate: from the grid in BERT's appendix A.3.
    Task("wnut17", "WNUT-17", {tag: tag for tag in WNUT17}, TOKEN_METRICS, 16, 4, 5e-5, problem="token-labels",
         build=_copy_wnut17,
         files={"train": TaggedFile(Path("wnut17train.conll")), "dev": TaggedFile(Path("emerging.dev.conll")),
                "test": TaggedFile(Path("emerging.test.annotated"))},
         archives=(
             Archive(f"{WNUT17_URL}/wnut17train.conll",
                     "sha256:731820e13f71af324c6b55a1575ec2ce59fbaa2a0806f8f0400b98d56cd6a7a5"),
             Archive(f"{WNUT17_URL}/emerging.dev.conll",
                     "sha256:e053b752b8155113ca66e7db08af5f2f5f43ab993694e4774f1ec5bad42312d8"),
             Archive(f"{WNUT17_URL}/emerging.test.annotated",
                     "sha256:2aa79b764e56ec9264a1b30fdd9b70195bd00ff400b62edd8f399d5f13c178f0"))),
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
    files = {split: file for split, file in task.files.items() if not isinstance(file, InMemoryExamples)}
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
    assert not isinstance(train, InMemoryExamples)
    folder = cache_dir() / "data" / task.name
    unpacked = fetch(task.archives, folder, task.build)
    files = _find_folder(unpacked, train.path.name)
    if files is None:
        raise FunnelError(f"{unpacked}: {task.title}'s archive has no {train.path}; delete {folder} and try again")
    return files

"""The tasks by name: where their files are, columns, labels, metrics, and the paper's hyper-parameters (its table 8)."""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from funnel.data import demo
from funnel.data.dataset import InMemoryExamples, to_score
from funnel.data.download import Archive, download, locked, unpack
from funnel.data.files import Column, ExampleFile, check_format, file_format, read_column_names, read_lines
from funnel.errors import FunnelError, error_reason, format_list
from funnel.io import cache_dir, is_dir

Files = Mapping[str, ExampleFile | InMemoryExamples]


@dataclass(frozen=True)
class Task:
    """What is to know of a task.

    Attributes:
        name: as --task has it.
        title: as the benchmark has it; also the name of the folder with its files, where these are GLUE's.
        labels: names of the labels by what stands in the file, in the order of their ids; None for scores.
        metrics: names in metrics.METRICS; the first one says which checkpoint is the best.
        batch_size, epochs, learning_rate, max_length: defaults of training; sources beside the tables below.
        files: by split: "train", and "dev" with what else is evaluated on, as "dev_mismatched". Their paths lie in the
            task's folder until `locate_files` has found that.
        tests: files without labels, by the name that GLUE's server wants for the answers.
        archives: what to download.
    """

    name: str
    title: str
    labels: dict[str, str] | None
    metrics: tuple[str, ...]
    batch_size: int
    epochs: float
    learning_rate: float
    max_length: int = 128
    files: Files = field(default_factory=dict)
    tests: Mapping[str, ExampleFile] = field(default_factory=dict)
    archives: tuple[Archive, ...] = ()

    @property
    def label_ids(self) -> dict[str, int] | None:
        """Label ids by what stands in the file; None for scores."""
        return None if self.labels is None else {written: i for i, written in enumerate(self.labels)}

    @property
    def columns(self) -> tuple[Column, ...]:
        """The text columns of its files."""
        first = self.files.get("train")
        return first.texts if isinstance(first, ExampleFile) else ("sentence",)


def glue(
    name: str,
    title: str,
    texts: tuple[str, ...],
    label: str,
    labels: dict[str, str] | None,
    metrics: tuple[str, ...],
    settings: tuple[int, float, float],
    checksum: str,
    archive: str = "",
) -> Task:
    """A task with GLUE's files: train.tsv, dev.tsv and test.tsv, with a line of column names each."""
    files = {split: ExampleFile(Path(f"{split}.tsv"), texts, label) for split in ("train", "dev")}
    tests = {title: ExampleFile(Path("test.tsv"), texts)}
    address = f"https://dl.fbaipublicfiles.com/glue/data/{archive or title}.zip"
    return Task(name, title, labels, metrics, *settings, files=files, tests=tests, archives=(Archive(address, checksum),))


def zhang(
    name: str, title: str, texts: int, labels: list[str], settings: tuple[int, float, float, int], archive: str, size: int
) -> Task:
    """A task of Zhang et al. (2015): train.csv and test.csv: a class from 1 on, a title in some, and a text.

    The paper reports accuracy on their test set, so that is what is evaluated on.
    """
    columns = tuple(range(1, 1 + texts))
    files = {
        split: ExampleFile(Path(file), columns, 0, joined=texts > 1, escaped=True)
        for split, file in (("train", "train.csv"), ("dev", "test.csv"))
    }
    names = {str(number): label for number, label in enumerate(labels, 1)}
    address = f"https://s3.amazonaws.com/fast-ai-nlp/{archive}.tgz"
    return Task(name, title, names, ("accuracy",), *settings, files, archives=(Archive(address, f"size:{size}"),))


PAIR = ("sentence1", "sentence2")
BINARY = {"0": "0", "1": "1"}
SENTIMENT = {"0": "negative", "1": "positive"}
ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}
EQUIVALENCE = {"0": "not_equivalent", "1": "equivalent"}
STARS = [f"{n} star{'s' * (n > 1)}" for n in range(1, 6)]
AG_NEWS = ["World", "Sports", "Business", "Sci/Tech"]
DBPEDIA = ["Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder", "MeanOfTransportation", "Building",
           "NaturalPlace", "Village", "Animal", "Plant", "Album", "Film", "WrittenWork"]  # fmt: skip

# Three numbers: batch size, epochs, learning rate. Batch sizes and epochs: paper, table 8. Learning rates: what the README
# of github.com/laiguokun/Funnel-Transformer recommends (1e-5 for SST-2, CoLA and MNLI, 2e-5 for QNLI and QQP); the paper
# searches {1e-5, 2e-5, 3e-5}, and where nothing is recommended the middle one stands here. WNLI, which the paper leaves
# out, is set as RTE is. Checksums: as TensorFlow Datasets and torchtext publish them; of fast.ai's archives only the sizes
# are published. Metrics: as GLUE reports them.
COLA = ExampleFile(Path("train.tsv"), (3,), 1)  # no line of names: source, label, its author's mark, sentence
MRPC = ExampleFile(Path("train.tsv"), ("#1 String", "#2 String"), "Quality")
MNLI = ExampleFile(Path("train.tsv"), PAIR, "gold_label")
IMDB = ExampleFile(Path("train"), (), "neg pos")
MRPC_TEXTS = "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_"
GLUE = "https://dl.fbaipublicfiles.com/glue/data"

_TASKS = (
    # The demo's numbers are our own: the best of those tried for a model that starts from nothing.
    Task("demo", "demo", SENTIMENT, ("accuracy", "f1"), 64, 2, 5e-4),
    Task("cola", "CoLA", {"0": "unacceptable", "1": "acceptable"}, ("matthews", "accuracy"), 16, 10, 1e-5,
         files={"train": COLA, "dev": replace(COLA, path=Path("dev.tsv"))},
         tests={"CoLA": ExampleFile(Path("test.tsv"), ("sentence",))},
         archives=(Archive(f"{GLUE}/CoLA.zip", "sha256:f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),)),
    glue("sst2", "SST-2", ("sentence",), "label", SENTIMENT, ("accuracy", "f1"), (32, 5, 1e-5),
         "sha256:d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    Task("mrpc", "MRPC", EQUIVALENCE, ("accuracy", "f1"), 16, 10, 2e-5,
         files={"train": MRPC, "dev": replace(MRPC, path=Path("dev.tsv"))},
         tests={"MRPC": ExampleFile(Path("test.tsv"), MRPC.texts)},
         archives=(
             Archive(f"{MRPC_TEXTS}train.txt", "sha256:60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
             Archive(f"{MRPC_TEXTS}test.txt", "sha256:a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"),
             Archive(f"{GLUE}/mrpc_dev_ids.tsv", "sha256:971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"))),
    glue("stsb", "STS-B", PAIR, "score", None, ("pearson", "spearman"), (16, 10, 2e-5),
         "md5:d573676be38f1a075a5702b90ceab3de"),
    glue("qqp", "QQP", ("question1", "question2"), "is_duplicate", {"0": "not_duplicate", "1": "duplicate"},
         ("accuracy", "f1"), (64, 5, 2e-5),
         "sha256:40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0", "QQP-clean"),
    Task("mnli", "MNLI", {name: name for name in ("contradiction", "entailment", "neutral")}, ("accuracy",), 64, 3, 1e-5,
         files={"train": MNLI, "dev": replace(MNLI, path=Path("dev_matched.tsv")),
                "dev_mismatched": replace(MNLI, path=Path("dev_mismatched.tsv"))},
         tests={"MNLI-m": ExampleFile(Path("test_matched.tsv"), PAIR), "AX": ExampleFile(Path("AX.tsv"), PAIR),
                "MNLI-mm": ExampleFile(Path("test_mismatched.tsv"), PAIR)},
         archives=(Archive(f"{GLUE}/MNLI.zip", "sha256:e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
                   Archive(f"{GLUE}/AX.tsv", "sha256:0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd"))),
    glue("qnli", "QNLI", ("question", "sentence"), "label", ENTAILMENT, ("accuracy",), (32, 3, 2e-5),
         "sha256:e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5", "QNLIv2"),
    glue("rte", "RTE", PAIR, "label", ENTAILMENT, ("accuracy",), (16, 10, 2e-5),
         "sha256:6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    glue("wnli", "WNLI", PAIR, "label", BINARY, ("accuracy",), (16, 10, 2e-5),
         "sha256:ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
    Task("imdb", "IMDB", {"neg": "negative", "pos": "positive"}, ("accuracy",), 32, 5, 2e-5, 512,
         files={"train": IMDB, "dev": replace(IMDB, path=Path("test"))},
         archives=(Archive("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
                           "sha256:c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"),)),
    zhang("ag", "AG News", 2, AG_NEWS, (32, 3, 2e-5, 128), "ag_news_csv", 11784419),
    zhang("dbpedia", "DBpedia", 2, DBPEDIA, (64, 3, 2e-5, 128), "dbpedia_csv", 68341743),
    zhang("yelp2", "Yelp-2", 1, ["negative", "positive"], (128, 3, 2e-5, 512), "yelp_review_polarity_csv", 166373201),
    zhang("yelp5", "Yelp-5", 1, STARS, (128, 3, 2e-5, 512), "yelp_review_full_csv", 196146755),
    zhang("amazon2", "Amazon-2", 2, ["negative", "positive"], (128, 3, 2e-5, 512), "amazon_review_polarity_csv", 688339454),
    zhang("amazon5", "Amazon-5", 2, STARS, (128, 3, 2e-5, 512), "amazon_review_full_csv", 643695014),
)  # fmt: skip
TASKS = {task.name: task for task in _TASKS}
CUSTOM = "own"  # the name of a task that the user's files make
MOST_CLASSES = 50  # whole numbers as labels are scores if there are more different ones
FEW_CLASSES = 10  # more of them need two texts each, to be taken for classes


def get_task(name: str) -> Task:
    """The task of that name; capitals and hyphens do not matter.

    Raises:
        FunnelError: there is none.
    """
    key = name.lower().replace("-", "").replace("_", "")
    if key not in TASKS:
        raise FunnelError(f"--task {name!r}: no such task; there are {', '.join(TASKS)}")
    return TASKS[key]


def locate_files(task: Task, folder: Path | None) -> Task:
    """The task with its files where they are.

    Args:
        folder: has them, or has a folder of the task's title that does (as GLUE's folder has SST-2). None: the cache, into
            which they are downloaded first where they are not there. The demo has its sentences built in.

    Raises:
        FunnelError: a file is missing, or cannot be downloaded.
    """
    if task.name == "demo":
        if folder is not None:
            raise FunnelError(f"--data {folder}: the demo task has its own sentences; name the task with --task")
        train, dev = demo.examples()
        return replace(task, files={"train": train, "dev": dev})
    if folder is None:
        folder = _downloaded(task)
    elif not is_dir(folder):
        raise FunnelError(f"--data {folder}: no such folder; it takes one that has the files of {task.title}, or a file "
                          "of your own (then without --task)")  # fmt: skip
    paths = {split: file.path for split, file in task.files.items() if isinstance(file, ExampleFile)}
    places = [place for place in (folder, folder / task.title) if (place / paths["train"]).exists()]
    place = places[0] if places else folder
    for path in paths.values():
        if not (place / path).exists():
            raise FunnelError(f"{place / path}: no such file; --data takes the folder that has {task.title}'s files")
    files = {split: file.at(place) for split, file in task.files.items() if isinstance(file, ExampleFile)}
    return replace(task, files=files, tests={name: file.at(place) for name, file in task.tests.items()})


def _downloaded(task: Task) -> Path:
    """The folder in the cache that has a task's files, after they were downloaded if need be."""
    first = task.files["train"]
    assert isinstance(first, ExampleFile)
    folder = cache_dir() / "data" / task.name
    unpacked = folder / "unpacked"
    if not unpacked.exists():
        with locked(folder):
            _fill(task, folder, unpacked)
    found = sorted(unpacked.rglob(first.path.name), key=lambda path: (len(path.parts), path))
    if not found:
        raise FunnelError(f"{unpacked}: the archive of {task.title} has no {first.path}; remove {folder} and start again")
    if (folder / "AX.tsv").is_file() and not (found[0].parent / "AX.tsv").exists():
        shutil.copy(folder / "AX.tsv", found[0].parent)
    return found[0].parent


def _fill(task: Task, folder: Path, unpacked: Path) -> None:
    """Downloads a task's archives into a folder and unpacks them there, unless another process just has."""
    if unpacked.exists():
        return
    for path in [download(archive, folder) for archive in task.archives]:
        if path.suffix in (".zip", ".tgz", ".gz"):
            unpack(path, unpacked)
    if task.name == "mrpc":
        make_mrpc(folder, unpacked)


def make_mrpc(folder: Path, out: Path) -> None:
    """Makes GLUE's train.tsv, dev.tsv and test.tsv of MRPC's own files and GLUE's list of the pairs in dev.

    Args:
        folder: has msr_paraphrase_train.txt, msr_paraphrase_test.txt and mrpc_dev_ids.tsv.
        out: the folder to make.

    Raises:
        FunnelError: a file is missing or has another form.
    """
    dev_ids = {tuple(line.split()) for line in read_lines(folder / "mrpc_dev_ids.tsv")}
    parts: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for name in ("train", "test"):
        path = folder / f"msr_paraphrase_{name}.txt"
        for number, line in enumerate(read_lines(path), 1):
            fields = line.rstrip("\r\n").split("\t")
            if len(fields) != 5:
                raise FunnelError(f"{path}, line {number}: {len(fields)} fields, not the 5 of MRPC's files")
            if number == 1:
                parts[name].append("index\t" * (name == "test") + "\t".join(fields[name == "test" :]))
            elif name == "test":
                parts["test"].append("\t".join([str(number - 2), *fields[1:]]))
            else:
                parts["dev" if (fields[1], fields[2]) in dev_ids else "train"].append("\t".join(fields))
    parts["dev"].insert(0, parts["train"][0])
    part = out.with_name(out.name + ".part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        for name, lines in parts.items():
            (part / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        part.replace(out)
    except OSError as error:
        raise FunnelError(f"{out}: cannot be written ({error_reason(error)})") from None


def load_task(
    name: str | None = None,
    data: str | Path | None = None,
    dev: str | Path | None = None,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    problem: str | None = None,
) -> Task:
    """The task that `train.py`'s arguments of these names ask for, with its files where they are.

    Of the user's own file it is printed what was found in it.

    Args:
        name: of a task; None for the demo, or for the user's own where `data` is a file.
        data: as in `locate_files`, or a file of the user's own.
        dev, text, pair, label, problem: as in `load_custom_task`.

    Raises:
        FunnelError: there is no such task, or a file is missing or cannot be used, or arguments do not go main_process_first.
    """
    data, dev = (None if path is None else Path(path) for path in (data, dev))
    if data is not None and name is None:
        if is_dir(data):
            raise FunnelError(f"--data {data}: is a folder; say with --task which task's files it has")
        check_format("--data", data)
    if data is None or not file_format(data) or is_dir(data):
        for flag, value in {"--dev": dev, "--label-column": label, "--problem": problem}.items():
            if value is not None:
                raise FunnelError(f"{flag}: belongs to a file of your own; name it with --data FILE")
        return locate_files(get_task(name or "demo"), data)
    if name:
        raise FunnelError(f"--task {name}: takes a folder for --data; for a file of your own leave --task out")
    task, said = load_custom_task(data, dev, text, pair, label, problem)
    print(f"{data}: {said}")
    return task


def load_custom_task(
    train: Path, dev: Path | None, text: str | None, pair: str | None, label: str | None, problem: str | None
) -> tuple[Task, str]:
    """A task made of the user's own files, and a sentence on what was found in them.

    Batch size, epochs and learning rate are those of most of the paper's tasks with as many examples (32, 3, 2e-5).

    Args:
        train, dev: .tsv, .csv or .jsonl files, each also .gz; without dev the caller splits train.
        text, pair, label: columns; None for those called "text" or "sentence", none, and "label".
        problem: "classification" or "regression"; None for what the labels look like: scores if all are numbers, and one
            of them has a fraction or there are more than `MOST_CLASSES` different ones.

    Raises:
        FunnelError: a file, a column, or the labels cannot be used.
    """
    check_format("--data", train)
    if dev is not None:
        check_format("--dev", dev)
    names = read_column_names(train)
    text = text or next((name for name in ("text", "sentence") if name in names), None)
    if text is None:
        raise FunnelError(f"{train}: which column is the text? name it with --text-column; there are {format_list(names)}")
    if label is None and "label" not in names:
        raise FunnelError(f"{train}: which column is the label? name it with --label-column; there are {format_list(names)}")
    file = ExampleFile(train, (text,) if pair is None else (text, pair), label or "label")
    for column, count in Counter(file.columns).items():
        if count > 1:
            raise FunnelError(f"{train}: the column {column!r} is asked for twice; text, second text and label are one each")
    counts: Counter[str] = Counter()
    lines: dict[str, int | str] = {}
    for row in file.rows():
        written = row.label or ""
        if not written.strip():
            raise file.error(row.line, f"{file.label!r} is empty; give the row its label, or remove it")
        counts[written] += 1
        lines.setdefault(written, row.line)
    labels, said = classes(counts, problem, lambda label, message: file.error(lines[label], message))
    if labels is not None and len(labels) < 2:
        raise FunnelError(f"{train}: every label is {next(iter(labels))!r}; a classifier needs two classes at least")
    texts = sum(counts.values())
    if labels is not None and len(labels) > max(FEW_CLASSES, texts / 2) and problem is None:
        raise FunnelError(f"{train}: {len(labels):,} classes for {texts:,} texts; is {file.label!r} the column of labels? "
                          "(--problem classification takes them)")  # fmt: skip
    files: dict[str, ExampleFile | InMemoryExamples] = {"train": file}
    if dev is not None:
        files["dev"] = replace(file, path=dev)
    metrics = ("pearson", "spearman") if labels is None else ("accuracy", "f1" if len(labels) == 2 else "macro_f1")
    return Task(CUSTOM, train.name, labels, metrics, 32, 3, 2e-5, files=files), said


def classes(
    counts: Mapping[str, int], problem: str | None, error: Callable[[str, str], FunnelError]
) -> tuple[dict[str, str] | None, str]:
    """The labels of the user's own data, as `Task.labels`, and a sentence that says so.

    Args:
        counts: how often each label stands in the file.
        problem: as in `load_custom_task`.
        error: makes an error of a label and what is wrong with it.

    Raises:
        FunnelError: a label is no number, and regression was asked for, or most others are scores.
    """
    numbers = {label: number for label in counts if (number := to_score(label)) is not None}
    odd = next((label for label in counts if label not in numbers), None)
    looks_like_scores = len(numbers) > MOST_CLASSES or any(number != round(number) for number in numbers.values())
    looks_like_scores &= sum(counts[label] for label in numbers) > sum(counts.values()) / 2
    if problem == "regression" or (problem is None and looks_like_scores):
        if odd is not None:
            others = "" if problem else ", and most others are scores; --problem classification takes all as classes"
            raise error(odd, f"label {odd!r} is no number that float32 holds{others}")
        low, high = min(numbers.values()), max(numbers.values())
        return None, f"scores from {low:g} to {high:g}: regression (--problem classification takes them as classes)"
    ordered = sorted(counts, key=lambda label: (numbers[label], label)) if odd is None else sorted(counts)
    names = [label if label == " ".join(label.split()) else repr(label) for label in ordered[:20]]
    shown = ", ".join(f"{name} ({counts[label]:,})" for name, label in zip(names, ordered, strict=False))
    more = ", …" if len(ordered) > 20 else ""
    also = " (--problem regression takes them as scores)" if odd is None and problem is None else ""
    return {label: label for label in ordered}, f"{len(ordered)} classes: {shown}{more}{also}"

"""A trained classifier at work: texts in, labels with probabilities out; from Python, or from file to file.

classify = Classifier.load("runs/sst2-2,2,2-seed0")
classify("a gorgeous , witty film")                     # Prediction(label='positive', probability=0.98, ...)
"""

import argparse
import csv
import gzip
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TextIO, cast, overload

from torch import Tensor
from tqdm import tqdm

from funnel.data.dataset import Dataset
from funnel.data.files import Column, ExampleFile, check_format, decode_lines, file_format, is_gzipped, read_column_names
from funnel.data.tasks import Task
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, error_reason, format_list
from funnel.io import read_json
from funnel.model import checkpoint
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training import optim as training

CHUNK = 4096  # texts that are in memory at a time


class Prediction(NamedTuple):
    """What a classifier says of a text.

    Attributes:
        label: name of the most probable class, or the score.
        probability: of that class; None with scores.
        probabilities: of every class by its name; empty with scores.
    """

    label: str | float
    probability: float | None
    probabilities: dict[str, float]


class Classifier:
    """A model with its tokenizer.

    Args:
        model: on its device.
        tokenizer: the one that it was trained with.
        max_length: tokens of a text at most.
        dtype: of matrix products, a name in `training.DTYPES`.
        columns: of the texts that it was trained on, where these have names.

    Attributes:
        cut: how many texts so far had more than `max_length` tokens and were cut.
    """

    def __init__(
        self,
        model: FunnelForSequenceClassification,
        tokenizer: FunnelTokenizer,
        max_length: int = 512,
        dtype: str = "fp32",
        columns: Sequence[str] = (),
    ) -> None:
        self.model, self.tokenizer, self.max_length, self.dtype = model.eval(), tokenizer, max_length, dtype
        self.columns = tuple(columns)
        self.cut = 0
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None, dtype: str | None = None) -> "Classifier":
        """Loads a run's best checkpoint, or a checkpoint folder.

        Args:
            folder: of a run or of a checkpoint. Texts are cut at the length that the run was trained with (512 where
                there is no run).
            device, dtype: as `train.py --device` and `--dtype`; None for the fastest there.

        Raises:
            FunnelError: the folder has no classifier, or the device is not there.
        """
        path = Path(folder)
        run = path if (path / "run.json").is_file() else path.parent
        path = checkpoint.of_run(path)
        max_length, columns = 512, []
        if (run / "run.json").is_file():
            with suppress(KeyError, TypeError, ValueError, OverflowError):
                settings = read_json(run / "run.json")["settings"]
                max_length = int(settings["max_length"])
                columns = [column for column in settings["columns"] if isinstance(column, str)]
        saved = checkpoint.load(path)
        if saved.architecture != FunnelForSequenceClassification.__name__:
            raise FunnelError(f"{path}: holds a {saved.architecture}, not a classifier; train.py makes one of it")
        model = FunnelForSequenceClassification(saved.config)
        checkpoint.load_weights(model, saved.weights, str(path))
        place = training.choose_device(device)
        tokenizer = FunnelTokenizer.load(path).fitting(saved.config.vocab_size, path)
        return cls(model.to(place), tokenizer, max_length, training.choose_dtype(dtype, place, saved.config.d_model), columns)

    @overload
    def __call__(self, texts: str, pairs: str | None = None) -> Prediction: ...
    @overload
    def __call__(self, texts: list[str], pairs: list[str] | None = None) -> list[Prediction]: ...
    def __call__(self, texts: str | list[str], pairs: str | list[str] | None = None) -> Prediction | list[Prediction]:
        """Predicts for a text, or for a list of them in its order; `pairs` are second texts."""
        if pairs is not None and isinstance(pairs, str) != isinstance(texts, str):
            raise FunnelError("a text takes one second text, a list of texts a list of them")
        if isinstance(texts, str):
            return self([texts], [pairs] if isinstance(pairs, str) else None)[0]
        if pairs is not None and len(pairs) != len(texts):
            raise FunnelError(f"{len(texts)} texts and {len(pairs)} second texts: each has one, or none has")
        if not texts:
            return []
        return [self.prediction(row) for row in self.logits(texts, None if pairs is None else list(pairs))]

    def logits(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Tensor:
        """[texts, outputs], float32 on the CPU; texts of one length go through the model main_process_first."""
        dataset = Dataset.of(texts, pairs, self.tokenizer, self.max_length)
        self.cut += dataset.cut.texts
        return training.predict(self.model, dataset, self.device, self.dtype)

    def check_pairs(self, are_pairs: bool) -> None:
        """Stops where it was trained on pairs and is to read single texts, or the other way round, if that is known.

        Raises:
            FunnelError: it does not take these.
        """
        if self.columns and are_pairs != (len(self.columns) == 2):
            trained = "single texts" if are_pairs else "pairs"
            way_out = "leave second texts out" if are_pairs else "give second texts, too (--pair TEXT)"
            raise FunnelError(f"the classifier was trained on {trained} ({', '.join(self.columns)}); {way_out}")

    def prediction(self, logits: Tensor) -> Prediction:
        """What one text's logits, [outputs], mean."""
        config = self.model.config
        if config.problem_type == "regression":
            return Prediction(float(logits[0]), None, {})
        probabilities = {config.id2label[i]: p for i, p in enumerate(logits.double().softmax(0).tolist())}
        best = config.id2label[int(logits.argmax())]
        return Prediction(best, probabilities[best], probabilities)

    def of_file(self, source: ExampleFile) -> Iterator[Prediction]:
        """Predictions for a file of texts, row by row.

        Raises:
            FunnelError: the file has a mistake.
        """
        rows = source.rows()
        with tqdm(desc=source.path.name, unit="text", disable=None, dynamic_ncols=True) as bar:
            while chunk := list(itertools.islice(rows, CHUNK)):
                pairs = None if chunk[0].pair is None else [row.pair or "" for row in chunk]
                for row in self.logits([row.text for row in chunk], pairs):
                    yield self.prediction(row)
                bar.update(len(chunk))


def open_text_file(
    path: Path,
    columns: Sequence[Column],
    text: str | None = None,
    pair: str | None = None,
    flag: str = "--file",
    way_out: str = "name it with",
) -> ExampleFile:
    """A file of texts to predict for.

    Args:
        columns: of the texts that the classifier was trained on; where the file does not have them, "text" or "sentence".
        text, pair: columns instead of these.
        flag: what the file was given with.
        way_out: what to say before the option that names a column which is missing.

    Raises:
        FunnelError: the file is not there, its name says no format, or a column is missing.
    """
    check_format(flag, path)
    names = read_column_names(path)
    known = [column for column in columns if isinstance(column, str)]  # the columns of some tasks have no names
    first = text or next((name for name in (*known[:1], "text", "sentence") if name in names), (*known, "text")[0])
    second = pair or (known[1] if len(known) > 1 else None)
    for column, option in ((first, "--text-column"), (second, "--text-pair-column")):
        if column is not None and column not in names:
            raise FunnelError(f"{path}: no column {column!r}; {way_out} {option}; there are {format_list(names)}")
    return ExampleFile(path, (first,) if second is None else (first, second))


def write_predictions(predictions: Iterator[Prediction], path: Path) -> int:
    """Writes predictions with all probabilities into a .csv, .tsv or .jsonl file (.gz behind it packs it).

    A row a text, in the texts' order, with its number from 0 on. Returns how many there are.

    Raises:
        FunnelError: the file cannot be written, or its name says no format.
    """
    kind = file_format(path)
    if not kind:
        raise FunnelError(f"{path}: predictions go to a .csv, .tsv or .jsonl file")
    part = path.with_name(f".{path.name}.part")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with cast(TextIO, (gzip.open if is_gzipped(path) else open)(part, "wt", encoding="utf-8", newline="")) as file:
            put = _json_writer(file) if kind == "jsonl" else _table_writer(file, kind)
            for count, prediction in enumerate(predictions, 1):
                put(count - 1, prediction)
        part.replace(path)
    except OSError as error:
        raise FunnelError(f"{path}: cannot be written ({error_reason(error)})") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return count


def _json_writer(file: TextIO) -> Callable[[int, Prediction], None]:
    def put(number: int, prediction: Prediction) -> None:
        values = {"index": number, "label": prediction.label}
        more = {} if prediction.probability is None else {"probabilities": prediction.probabilities}
        file.write(json.dumps(values | more, ensure_ascii=False) + "\n")

    return put


def _table_writer(file: TextIO, kind: str) -> Callable[[int, Prediction], None]:
    writer = csv.writer(file, lineterminator="\n")

    def write(fields: list[str]) -> None:
        if kind == "csv":
            writer.writerow(fields)
        else:  # no quoting there
            file.write("\t".join(" ".join(field.split()) for field in fields) + "\n")

    def put(number: int, prediction: Prediction) -> None:
        if number == 0:
            write(["index", "label", *(f"probability of {name}" for name in prediction.probabilities)])
        label = prediction.label if isinstance(prediction.label, str) else f"{prediction.label:.6g}"
        write([str(number), label, *(f"{p:.6f}" for p in prediction.probabilities.values())])

    return put


def write_submission(classifier: Classifier, task: Task, folder: Path) -> list[Path]:
    """Writes a task's answers for its unlabelled files as the GLUE server takes them, all or none, and returns the files.

    Raises:
        FunnelError: a file of texts is missing or has a mistake, or the answers cannot be written.
    """
    written = None if task.labels is None else dict(zip(task.labels.values(), task.labels, strict=True))
    contents = {}
    for name, source in task.tests.items():
        answers = ["index\tprediction"]
        for number, prediction in enumerate(classifier.of_file(source)):
            score = prediction.label if written is None else written[str(prediction.label)]
            answer = f"{min(max(float(score), 0), 5):.3f}" if written is None else score  # STS-B's go from 0 to 5
            answers.append(f"{number}\t{answer}")
        contents[folder / f"{name}.tsv"] = "\n".join(answers) + "\n"
    parts = {path: path.with_name(f".{path.name}.part") for path in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in contents.items():
            parts[path].write_text(content, encoding="utf-8")
        for path, part in parts.items():
            part.replace(path)
    except OSError as error:
        for part in parts.values():
            with suppress(OSError):
                part.unlink(missing_ok=True)
        raise FunnelError(f"--glue-submission {folder}: cannot be written ({error_reason(error)})") from None
    return list(contents)


def predict_command(args: argparse.Namespace) -> None:
    """`python -m funnel predict`; its arguments are in __main__.py.

    Raises:
        FunnelError: the classifier cannot be loaded, or a file has a mistake.
    """
    given = [name for name, value in (("TEXT", args.texts), ("--file", args.file)) if value]
    if len(given) == 2:
        raise FunnelError("predict: takes texts or --file, not both")
    for flag, value in {
        "--out": args.out,
        "--text-column": args.text_column,
        "--text-pair-column": args.text_pair_column,
    }.items():
        if value is not None and args.file is None:
            raise FunnelError(f"{flag}: belongs to --file")
    if args.pair is not None and len(args.pair) != len(args.texts):
        raise FunnelError(f"--pair: given {len(args.pair)} times for {len(args.texts)} texts; each has one, or none has")
    classifier = Classifier.load(args.run, args.device, args.dtype)
    try:
        _predict(classifier, args)
    finally:
        warn_truncated(classifier)


def warn_truncated(classifier: Classifier) -> None:
    """Says on standard error how many texts were cut, if any were."""
    if classifier.cut:
        texts = "1 text has" if classifier.cut == 1 else f"{classifier.cut:,} texts have"
        print(f"warning: {texts} more than {classifier.max_length} tokens; what is behind them was not read", file=sys.stderr)


def _predict(classifier: Classifier, args: argparse.Namespace) -> None:
    if args.file is not None:
        source = open_text_file(args.file, classifier.columns, args.text_column, args.text_pair_column)
        classifier.check_pairs(len(source.texts) == 2)
        out = args.out or args.run / f"predictions-{args.file.name}"
        if out.exists() and out.samefile(args.file):
            raise FunnelError(f"--out {out}: is the file of texts itself; name another one")
        print(f"{write_predictions(classifier.of_file(source), out):,} predictions in {out}")
        return
    takes_pairs = len(classifier.columns) == 2
    if args.texts:
        classifier.check_pairs(args.pair is not None)
        _print(classifier, args.texts, args.pair)
        return
    lines = _standard_input(takes_pairs)
    if sys.stdin.isatty():
        print("a text a line; Ctrl-D ends", file=sys.stderr)
    while chunk := list(itertools.islice(lines, 1 if sys.stdin.isatty() else CHUNK)):
        if takes_pairs:
            parts = [line.partition("\t") for line in chunk]
            _print(classifier, [first for first, _, _ in parts], [second for _, _, second in parts])
        else:
            _print(classifier, chunk, None)


def _standard_input(pairs: bool) -> Iterator[str]:
    """Its lines.

    Raises:
        FunnelError: one is not text, or has no tab, or several, where it should be a pair.
    """
    for number, line in enumerate(decode_lines(sys.stdin.buffer, "standard input"), 1):
        if pairs and (tabs := line.count("\t")) != 1:
            raise FunnelError(f"standard input, line {number}: has {tabs or 'no'} tab{'s' * (tabs > 1)}; of a pair the second "
                              "text stands behind one tab")  # fmt: skip
        yield line.rstrip("\r\n")


def _print(classifier: Classifier, texts: list[str], pairs: list[str] | None) -> None:
    """A line a text: label, probability, text; with tabs between them and none within."""
    for number, found in enumerate(classifier(texts, pairs)):
        label = found.label if isinstance(found.label, str) else f"{found.label:.4g}"
        probability = [] if found.probability is None else [f"{found.probability:.1%}"]
        fields = [label, *probability, texts[number], *([pairs[number]] if pairs else [])]
        print("\t".join(" ".join(field.split()) for field in fields), flush=True)

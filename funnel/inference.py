"""Inference with a trained classifier, from Python or on files.

classifier = Classifier.load("runs/sst2-2,2,2-seed0")
classifier("a gorgeous , witty film")                     # Prediction(label='positive', probability=0.98, ...)
"""

import contextlib
import csv
import gzip
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast, overload

import torch
from torch import Tensor
from tqdm import tqdm

from funnel.data.custom import ColumnChoice, open_examples
from funnel.data.dataset import Dataset, encode_examples
from funnel.data.files import Example, ExampleFile
from funnel.data.formats import file_format, is_gzipped
from funnel.data.tasks import Task
from funnel.data.tokenizer import DEFAULT_MAX_LENGTH, FunnelTokenizer, list_of_strings
from funnel.errors import FunnelError, format_list
from funnel.io import atomic_write, read_json
from funnel.model.checkpoint import CONFIG, best_checkpoint, load_checkpoint, load_weights
from funnel.model.config import FunnelConfig
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training.device import autocast, choose_device, choose_dtype
from funnel.training.error_analysis import analyze_errors
from funnel.training.evaluate import BATCH_SIZE, check_finite_logits, compute_metrics, predict_logits

CHUNK_SIZE = 4096  # examples of a file held in memory at a time
OUTPUT_FORMATS = ("csv", "tsv", "jsonl")  # of predictions
RUN_FILE = "run.json"
STSB_RANGE = (0.0, 5.0)  # the GLUE server rejects scores outside it


class Prediction(NamedTuple):
    """The prediction for one text or pair of texts.

    Attributes:
        label: name of the most probable class; for regression, the score.
        probability: probability of that class; None for regression.
        probabilities: probability of every class, by name; empty for regression.
    """

    label: str | float
    probability: float | None
    probabilities: dict[str, float]


def run_folder(folder: Path) -> Path | None:
    """The folder of a run, given it or one of the run's checkpoints; None if it is neither."""
    return next((path for path in (folder, folder.parent) if (path / RUN_FILE).is_file()), None)


def run_record(folder: Path, name: str = "settings") -> dict[str, Any]:
    """An object in the run.json of a run, given its folder or one of its checkpoints; empty if there is none."""
    run = run_folder(folder)
    values = None if run is None else read_json(run / RUN_FILE).get(name)
    return values if isinstance(values, dict) else {}


class InputFormat(NamedTuple):
    """How a classifier's training texts were read and encoded.

    Attributes:
        max_length: longer texts are truncated to this number of tokens.
        columns: names of the text columns; two for text pairs, none if unknown.
    """

    max_length: int = DEFAULT_MAX_LENGTH
    columns: tuple[str, ...] = ()

    @classmethod
    def of_checkpoint(cls, config: FunnelConfig, folder: Path) -> "InputFormat":
        """The format that a checkpoint's config records, or else the run of the folder, as in version 0.1.

        The maximum length is limited by the model's position embeddings.
        """
        if config.model_max_length is not None:
            recorded = cls(config.model_max_length, config.text_columns)
        else:
            recorded = cls.of_run(folder)
        return recorded._replace(max_length=config.limit_length(recorded.max_length))

    @classmethod
    def of_run(cls, folder: Path) -> "InputFormat":
        """The format that a run's settings record; the default without a run."""
        settings = run_record(folder)
        max_length, columns = settings.get("max_length"), settings.get("columns")
        return cls(
            max_length if isinstance(max_length, int) and max_length > 0 else cls().max_length,
            tuple(name for name in columns if isinstance(name, str)) if isinstance(columns, list) else (),
        )


class Classifier:
    """A sequence classification model with its tokenizer.

    Args:
        model: on the device to run on.
        tokenizer: the one that the model was trained with.
        inputs: how its training texts were read and encoded.
        dtype: dtype of matrix products, a key of `funnel.training.device.DTYPES`.

    Attributes:
        n_truncated: number of examples so far that were longer than `inputs.max_length` tokens.
    """

    def __init__(
        self,
        model: FunnelForSequenceClassification,
        tokenizer: FunnelTokenizer,
        inputs: InputFormat | None = None,
        dtype: str = "fp32",
    ) -> None:
        config = model.config
        if config.problem_type == "multi_label_classification":
            raise FunnelError("multi-label prediction is not supported; fine-tune the model on single labels or scores")
        if config.problem_type == "regression" and config.num_labels > 1:
            raise FunnelError(f"a regression with {config.num_labels} outputs is not supported; expected one output")
        self.model, self.tokenizer, self.dtype = model.eval(), tokenizer, dtype
        self.inputs = inputs or InputFormat()
        self.device = next(model.parameters()).device
        self.n_truncated = 0

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None, dtype: str | None = None) -> "Classifier":
        """Loads a run's best checkpoint, or a checkpoint folder.

        Args:
            folder: a run folder or a checkpoint folder. Texts are truncated as in training, or to 512 tokens if it is
                unknown how.
            device: "cpu", "cuda" or "mps"; default: the fastest available one.
            dtype: "fp32", "bf16" or "fp16"; default: bf16 if the device supports it natively, else fp32.

        Raises:
            FunnelError: the folder does not contain a classifier, or the device is not available.
        """
        folder = Path(folder)
        path = best_checkpoint(folder)
        if path == folder and folder.is_dir() and not (folder / CONFIG).is_file():
            raise FunnelError(f"{folder}: neither a run nor a checkpoint; {_describe_content(folder)}")
        checkpoint = load_checkpoint(path)
        if checkpoint.architecture != FunnelForSequenceClassification.__name__:
            raise FunnelError(
                f"{path}: expected a FunnelForSequenceClassification, found a {checkpoint.architecture}; fine-tune it first"
            )
        tokenizer = FunnelTokenizer.load(path)
        tokenizer.check_vocab_size(checkpoint.config.vocab_size, path)
        model = FunnelForSequenceClassification(checkpoint.config)
        load_weights(model, checkpoint.weights, str(path))
        inputs = InputFormat.of_checkpoint(checkpoint.config, folder)
        chosen = choose_device(device)
        return cls(model.to(chosen), tokenizer, inputs, choose_dtype(dtype, chosen, checkpoint.config.d_model))

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a string is an iterable of strings, too
        self, texts: str, pairs: str | None = None
    ) -> Prediction: ...
    @overload
    def __call__(self, texts: Iterable[str], pairs: Iterable[str] | None = None) -> list[Prediction]: ...
    def __call__(self, texts: str | Iterable[str], pairs: str | Iterable[str] | None = None) -> Prediction | list[Prediction]:
        """Classifies one text, or several: a list, a NumPy array, a pandas Series or any other iterable of strings.

        Args:
            pairs: the second text of each pair, for a classifier of text pairs.

        Raises:
            FunnelError: a text is not a string, or texts and pairs do not match.
        """
        if pairs is not None and isinstance(pairs, str) != isinstance(texts, str):
            raise FunnelError("texts and pairs must both be strings or both be lists of strings", "pairs")
        self.check_pairs(pairs is not None)
        if isinstance(texts, str):
            return self([texts], [pairs] if isinstance(pairs, str) else None)[0]
        texts = list_of_strings(texts, "texts")
        pairs = None if pairs is None else list_of_strings(pairs, "pairs")
        return [self.to_prediction(row) for row in self.logits(texts, pairs)]

    def logits(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Tensor:
        """Returns the logits of texts in their order, [n_texts, n_outputs], float32 on the CPU; updates `n_truncated`.

        Raises:
            FunnelError: as `FunnelTokenizer.encode`.
        """
        if not texts:
            return torch.empty(0, self.model.config.num_labels)
        dataset = Dataset.from_texts(texts, pairs, self.tokenizer, self.inputs.max_length)
        self.n_truncated += dataset.truncation.texts
        with autocast(self.device, self.dtype):
            return predict_logits(self.model, dataset)

    def to_prediction(self, logits: Tensor) -> Prediction:
        """Converts the logits of one text, [n_outputs]."""
        config = self.model.config
        if config.problem_type == "regression":
            return Prediction(float(logits[0]), None, {})
        probabilities = {config.id2label[i]: p for i, p in enumerate(logits.double().softmax(0).tolist())}
        label = config.id2label[int(logits.argmax())]
        return Prediction(label, probabilities[label], probabilities)

    def check_pairs(self, has_pairs: bool) -> None:
        """Raises FunnelError if the training texts are known to have been pairs and these are not, or vice versa."""
        if not self.inputs.columns or has_pairs == (len(self.inputs.columns) == 2):
            return
        columns = format_list(self.inputs.columns)
        if has_pairs:
            raise FunnelError(f"the classifier was trained on single texts ({columns}), not on pairs; omit the second texts")
        raise FunnelError(f"the classifier was trained on text pairs ({columns}); pair is required", "pair")

    def open_file(self, path: Path, choice: ColumnChoice) -> ExampleFile:
        """Finds the columns of a file to classify. The text columns default to those of the training texts.

        Raises:
            FunnelError: the file cannot be read, a column is missing, or the classifier does not accept (or requires) pairs.
        """
        file = open_examples(path, replace(choice, trained=self.inputs.columns), "file")
        self.check_pairs(len(file.text_columns) == 2)
        return file

    def predict_file(self, source: ExampleFile) -> Iterator[tuple[Example, Prediction]]:
        """Yields the examples of a file with their predictions, in order, with a progress bar on standard error.

        Raises:
            FunnelError: the file is malformed.
        """
        rows = source.rows()
        with tqdm(desc=source.path.name, unit="text", disable=None, dynamic_ncols=True) as progress:
            while chunk := list(itertools.islice(rows, CHUNK_SIZE)):
                pairs = None if chunk[0].pair is None else [row.pair or "" for row in chunk]
                for row, logits in zip(chunk, self.logits([row.text for row in chunk], pairs), strict=True):
                    yield row, self.to_prediction(logits)
                progress.update(len(chunk))

    def evaluate_file(
        self, source: ExampleFile, metrics: Sequence[str], labels: Mapping[str, str] | None = None
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Evaluates the classifier on a labeled file, with a progress bar on standard error; updates `n_truncated`.

        Args:
            metrics: names, as in `funnel.training.metrics.get_metric`.
            labels: names of the labels by another spelling in the file, as in `Task.labels`; ignored if the classifier has
                other labels.

        Returns:
            Loss and metrics by name, and the result of `analyze_errors`. Correlations may be NaN.

        Raises:
            FunnelError: the file is malformed or has a label that the classifier lacks, or a metric is unknown.
        """
        config = self.model.config
        label_ids = None if config.problem_type == "regression" else {name: i for i, name in config.id2label.items()}
        if labels and label_ids and set(labels.values()) == set(label_ids):
            label_ids = {spelling: label_ids[name] for spelling, name in labels.items()} | label_ids
        dataset = encode_examples(source, label_ids, self.tokenizer, self.inputs.max_length)
        self.n_truncated += dataset.truncation.texts
        n_batches = math.ceil(len(dataset) / BATCH_SIZE)
        progress = tqdm(desc=source.path.name, total=n_batches, unit="batch", disable=None, dynamic_ncols=True)

        def advance() -> None:
            progress.update()

        with progress, autocast(self.device, self.dtype):
            logits = predict_logits(self.model, dataset, poll=advance)
        check_finite_logits(logits, source.path.name, self.dtype)
        scores = compute_metrics(logits, dataset, metrics, list(config.id2label.values()))
        return scores, analyze_errors(logits, dataset, config, self.tokenizer)


def _describe_content(folder: Path) -> str:
    """What a folder that is not a checkpoint contains, for an error message."""
    if runs := sorted(record.parent.name for record in folder.glob(f"*/{RUN_FILE}")):
        return f"choose one of the runs in it: {format_list(runs)}"
    return f"it contains {format_list(sorted(path.name for path in folder.iterdir())) or 'nothing'}"


def write_predictions(predictions: Iterable[tuple[Example, Prediction]], source: ExampleFile, path: Path) -> int:
    """Writes predictions to a .csv, .tsv or .jsonl file, gzipped if the name ends in .gz, and returns their number.

    Every row has the example's index from 0, the label, the probability of every class, the text or both texts, and the
    values of the source's `extra_columns`. The latter have the names of the source's columns, preceded by "input " where a
    column of the predictions has the same name. csv and tsv files are quoted as in RFC 4180. The file is written atomically.

    Raises:
        FunnelError: the file cannot be written, or its name has none of these suffixes.
    """
    format = file_format(path)
    if format not in OUTPUT_FORMATS:
        raise FunnelError(f"{path}: unknown format; predictions are written to .csv, .tsv or .jsonl files")
    columns = [str(column) for column in (*source.text_columns, *source.extra_columns)]
    open_text = gzip.open if is_gzipped(path) else open
    with atomic_write(path) as temporary, cast(TextIO, open_text(temporary, "wt", encoding="utf-8", newline="")) as file:
        if format == "jsonl":
            return _write_json_lines(predictions, columns, file)
        writer = csv.writer(file, delimiter="," if format == "csv" else "\t", lineterminator="\n")
        return _write_table(predictions, columns, writer)


def _write_json_lines(predictions: Iterable[tuple[Example, Prediction]], columns: list[str], file: TextIO) -> int:
    columns = _rename_columns(columns, {"index", "label", "probabilities"})
    count = 0
    for example, prediction in predictions:
        values: dict[str, object] = {"index": count, "label": prediction.label}
        if prediction.probabilities:
            values["probabilities"] = prediction.probabilities
        values |= zip(columns, _copied_values(example), strict=True)
        file.write(json.dumps(values, ensure_ascii=False) + "\n")
        count += 1
    return count


def _write_table(predictions: Iterable[tuple[Example, Prediction]], columns: list[str], writer: Any) -> int:
    count = 0
    for example, prediction in predictions:
        if count == 0:
            names = ["index", "label", *(f"probability of {name}" for name in prediction.probabilities)]
            writer.writerow(map(_quotable, [*names, *_rename_columns(columns, set(names))]))
        label = prediction.label if isinstance(prediction.label, str) else f"{prediction.label:.9g}"
        probabilities = [f"{probability:.6f}" for probability in prediction.probabilities.values()]
        writer.writerow(map(_quotable, [str(count), label, *probabilities, *_copied_values(example)]))
        count += 1
    return count


def _quotable(field: str) -> str:
    """The field with lone carriage returns replaced, because csv.writer does not quote them."""
    return re.sub(r"\r(?!\n)", "\n", field)


def _copied_values(example: Example) -> list[str]:
    """The fields of the input that are copied to the output."""
    return [example.text, *([] if example.pair is None else [example.pair]), *example.extra]


def _rename_columns(columns: Iterable[str], taken: set[str]) -> list[str]:
    """Makes names distinct from those of the predictions."""
    renamed = []
    for name in columns:
        while name in taken:
            name = f"input {name}"
        taken.add(name)
        renamed.append(name)
    return renamed


def write_glue_submission(classifier: Classifier, task: Task, folder: Path) -> list[Path]:
    """Writes predictions for a task's unlabeled test files in the GLUE server's format, all files or none.

    Args:
        task: with its `tests` located.

    Returns:
        The files written.

    Raises:
        FunnelError: the classifier's labels differ from the task's, a test file is missing or malformed, or the folder
            cannot be written.
    """
    answers = None  # what the server expects, by label name; None for scores
    if task.labels is not None:
        answers = {name: answer for answer, name in task.labels.items()}
        labels = classifier.model.config.id2label.values()
        if set(labels) != set(answers):
            raise FunnelError(f"the classifier's labels are {format_list(labels)}, but {task.title} has {format_list(answers)}")
    contents = {}
    for name, source in task.tests.items():
        lines = ["index\tprediction"]
        for index, (_, prediction) in enumerate(classifier.predict_file(source)):
            lines.append(f"{index}\t{_glue_answer(prediction, answers)}")
        contents[folder / f"{name}.tsv"] = "\n".join(lines) + "\n"
    with contextlib.ExitStack() as stack:  # no file is moved into place before all are written
        for path, content in contents.items():
            stack.enter_context(atomic_write(path)).write_text(content, encoding="utf-8")
    return list(contents)


def _glue_answer(prediction: Prediction, answers: dict[str, str] | None) -> str:
    if answers is not None:
        return answers[str(prediction.label)]
    low, high = STSB_RANGE
    return f"{min(max(float(prediction.label), low), high):.3f}"

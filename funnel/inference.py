"""Inference with a trained classifier, from Python or on files.

classifier = Classifier.load("runs/sst2-2,2,2-seed0")
classifier("a gorgeous , witty film")                     # Prediction(label='positive', probability=0.98, ...)
"""

import contextlib
import csv
import gzip
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO, cast, overload

from torch import Tensor
from tqdm import tqdm

from funnel.data.dataset import Dataset
from funnel.data.files import ExampleFile, check_file, file_format, is_gzipped, read_column_names
from funnel.data.tasks import Task
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, format_list, plural
from funnel.io import atomic_write, read_json
from funnel.model.checkpoint import best_checkpoint, load_checkpoint, load_weights
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training.device import autocast, choose_device, choose_dtype
from funnel.training.evaluate import predict_logits

CHUNK_SIZE = 4096  # examples of a file held in memory at a time
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


class InputFormat(NamedTuple):
    """How a classifier's training texts were read and encoded.

    Attributes:
        max_length: longer texts are truncated to this number of tokens.
        columns: names of the text columns; two for text pairs, none if unknown.
    """

    max_length: int = 512
    columns: tuple[str, ...] = ()

    @classmethod
    def of_run(cls, folder: Path) -> "InputFormat":
        """Reads the format from a run's run.json; the default if that file is missing or lacks the settings."""
        if not (folder / RUN_FILE).is_file():
            return cls()
        settings = read_json(folder / RUN_FILE).get("settings")
        if not isinstance(settings, dict):
            return cls()
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
        self.model, self.tokenizer, self.dtype = model.eval(), tokenizer, dtype
        self.inputs = inputs or InputFormat()
        self.device = next(model.parameters()).device
        self.n_truncated = 0

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None, dtype: str | None = None) -> "Classifier":
        """Loads a run's best checkpoint, or a checkpoint folder.

        Args:
            folder: a run folder or a checkpoint folder. Texts are truncated as in training, or to 512 tokens if the
                checkpoint does not belong to a run.
            device: "cpu", "cuda" or "mps"; default: the fastest available one.
            dtype: "fp32", "bf16" or "fp16"; default: bf16 if the device supports it natively, else fp32.

        Raises:
            FunnelError: the folder does not contain a classifier, or the device is not available.
        """
        folder = Path(folder)
        inputs = InputFormat.of_run(folder if (folder / RUN_FILE).is_file() else folder.parent)
        path = best_checkpoint(folder)
        checkpoint = load_checkpoint(path)
        if checkpoint.architecture != FunnelForSequenceClassification.__name__:
            raise FunnelError(
                f"{path}: expected a FunnelForSequenceClassification, found a {checkpoint.architecture}; fine-tune it first"
            )
        tokenizer = FunnelTokenizer.load(path)
        tokenizer.check_vocab_size(checkpoint.config.vocab_size, path)
        model = FunnelForSequenceClassification(checkpoint.config)
        load_weights(model, checkpoint.weights, str(path))
        chosen = choose_device(device)
        return cls(model.to(chosen), tokenizer, inputs, choose_dtype(dtype, chosen, checkpoint.config.d_model))

    @overload
    def __call__(self, texts: str, pairs: str | None = None) -> Prediction: ...
    @overload
    def __call__(self, texts: list[str], pairs: list[str] | None = None) -> list[Prediction]: ...
    def __call__(self, texts: str | list[str], pairs: str | list[str] | None = None) -> Prediction | list[Prediction]:
        """Classifies one text, or a list of texts.

        Args:
            pairs: the second text of each pair, for a classifier of text pairs.
        """
        if pairs is not None and isinstance(pairs, str) != isinstance(texts, str):
            raise FunnelError("texts and pairs must both be strings or both be lists of strings", "pairs")
        if isinstance(texts, str):
            return self([texts], [pairs] if isinstance(pairs, str) else None)[0]
        if pairs is not None and len(pairs) != len(texts):
            found = f"{plural(len(texts), 'text')} but {plural(len(pairs), 'pair')}"
            raise FunnelError(f"{found}: each text needs one second text", "pairs")
        if not texts:
            return []
        return [self.to_prediction(row) for row in self.logits(texts, None if pairs is None else list(pairs))]

    def logits(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Tensor:
        """Returns the logits of texts in their order, [n_texts, n_outputs], float32 on the CPU."""
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

    def open_file(self, path: Path, text_column: str | None = None, text_pair_column: str | None = None) -> ExampleFile:
        """Finds the text columns of a .tsv, .csv or .jsonl file to classify.

        Args:
            text_column: default: the column of the training texts, or else "text" or "sentence".
            text_pair_column: column of the second texts; default: that of the training texts, if these were pairs.

        Raises:
            FunnelError: the file cannot be read, a column is missing, or the classifier does not accept (or requires) pairs.
        """
        check_file(path, "file")
        names = read_column_names(path)
        trained = self.inputs.columns
        candidates = (*trained[:1], "text", "sentence")
        text = text_column or next((name for name in candidates if name in names), candidates[0])
        pair = text_pair_column or (trained[1] if len(trained) > 1 else None)
        for parameter, column in (("text_column", text), ("text_pair_column", pair)):
            if column is not None and column not in names:
                raise FunnelError(f"{path}: no column {column!r}; choose {parameter} from {format_list(names)}", parameter)
        self.check_pairs(pair is not None)
        return ExampleFile(path, (text,) if pair is None else (text, pair))

    def predict_file(self, source: ExampleFile) -> Iterator[Prediction]:
        """Yields the predictions for a file, in its order, with a progress bar on standard error.

        Raises:
            FunnelError: the file is malformed.
        """
        rows = source.rows()
        with tqdm(desc=source.path.name, unit="text", disable=None, dynamic_ncols=True) as progress:
            while chunk := list(itertools.islice(rows, CHUNK_SIZE)):
                pairs = None if chunk[0].pair is None else [row.pair or "" for row in chunk]
                for logits in self.logits([row.text for row in chunk], pairs):
                    yield self.to_prediction(logits)
                progress.update(len(chunk))


def write_predictions(predictions: Iterable[Prediction], path: Path) -> int:
    """Writes predictions to a .csv, .tsv or .jsonl file, gzipped if the name ends in .gz, and returns their number.

    Every row has the example's index from 0, the label, and the probability of every class. The file is written atomically.

    Raises:
        FunnelError: the file cannot be written, or its name has none of these suffixes.
    """
    format = file_format(path)
    if not format:
        raise FunnelError(f"{path}: unknown format; predictions are written to .csv, .tsv or .jsonl files")
    open_text = gzip.open if is_gzipped(path) else open
    with atomic_write(path) as temporary, cast(TextIO, open_text(temporary, "wt", encoding="utf-8", newline="")) as file:
        return _write_json_lines(predictions, file) if format == "jsonl" else _write_table(predictions, file, format)


def _write_json_lines(predictions: Iterable[Prediction], file: TextIO) -> int:
    count = 0
    for index, prediction in enumerate(predictions):
        values: dict[str, object] = {"index": index, "label": prediction.label}
        if prediction.probabilities:
            values["probabilities"] = prediction.probabilities
        file.write(json.dumps(values, ensure_ascii=False) + "\n")
        count += 1
    return count


def _write_table(predictions: Iterable[Prediction], file: TextIO, format: str) -> int:
    if format == "csv":
        writer = csv.writer(file, lineterminator="\n")
    else:  # .tsv files have no quoting, so fields must not contain tabs or line breaks
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
    count = 0
    for index, prediction in enumerate(predictions):
        if index == 0:
            header = ["index", "label", *(f"probability of {name}" for name in prediction.probabilities)]
            writer.writerow(header if format == "csv" else map(_normalize_whitespace, header))
        label = prediction.label if isinstance(prediction.label, str) else f"{prediction.label:.6g}"
        label = label if format == "csv" else _normalize_whitespace(label)
        writer.writerow([index, label, *(f"{probability:.6f}" for probability in prediction.probabilities.values())])
        count += 1
    return count


def _normalize_whitespace(text: str) -> str:
    return " ".join(text.split())


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
        for index, prediction in enumerate(classifier.predict_file(source)):
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

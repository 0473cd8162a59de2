"""What all predictors have in common: loading a trained model, and running it on a dataset."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor
from tqdm import tqdm

from funnel.data.dataset import Dataset
from funnel.data.tokenizer import DEFAULT_MAX_LENGTH, FunnelTokenizer
from funnel.errors import FunnelError, format_list, plural
from funnel.io import RUN_FILE, read_json
from funnel.model.checkpoint import CONFIG, best_checkpoint, load_checkpoint, load_weights, parse_config, read_architecture
from funnel.model.config import FunnelConfig
from funnel.model.heads import FunnelPreTrainedModel
from funnel.problems.registry import problem_of
from funnel.training.device import autocast, choose_device, choose_dtype
from funnel.training.evaluate import BATCH_SIZE, WHOLE_SET, Pass, check_finite, predict

AnyPredictor = TypeVar("AnyPredictor", bound="Predictor")


def run_folder(folder: Path) -> Path | None:
    """The folder of a run, given it or one of the run's checkpoints; None if it is neither."""
    return next((path for path in (folder, folder.parent) if (path / RUN_FILE).is_file()), None)


def run_record(folder: Path, name: str = "settings") -> dict[str, Any]:
    """An object in the run.json of a run, given its folder or one of its checkpoints; empty if there is none."""
    run = run_folder(folder)
    values = None if run is None else read_json(run / RUN_FILE).get(name)
    return values if isinstance(values, dict) else {}


def problem_name(folder: Path) -> str:
    """The kind of problem of a run's or checkpoint's model, read from its config; "" if it cannot be read."""
    try:
        path = best_checkpoint(folder) / CONFIG
        values = read_json(path)
        return problem_of(read_architecture(values), parse_config(values, path)).name
    except FunnelError:  # loading the model reports it
        return ""


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


class Predictor:
    """A trained model with its tokenizer. Can be pickled, to run in worker processes.

    Args:
        model: on the device to run on.
        tokenizer: the one that the model was trained with.
        inputs: how its training texts were read and encoded.
        dtype: dtype of matrix products, a key of `funnel.training.device.DTYPES`.

    Attributes:
        problems: names of the kinds of problem that the class handles.
        title: for messages.
        n_truncated: number of examples so far that were longer than `inputs.max_length` tokens.
    """

    problems: ClassVar[tuple[str, ...]]
    title: ClassVar[str]

    def __init__(
        self,
        model: FunnelPreTrainedModel,
        tokenizer: FunnelTokenizer,
        inputs: InputFormat | None = None,
        dtype: str = "fp32",
    ) -> None:
        self.model, self.tokenizer, self.dtype = model.eval(), tokenizer, dtype
        self.problem = problem_of(type(model).__name__, model.config)
        self.inputs = inputs or InputFormat()
        self.device = next(model.parameters()).device
        self.n_truncated = 0

    @classmethod
    def load(cls: type[AnyPredictor], folder: str | Path, device: str | None = None, dtype: str | None = None) -> AnyPredictor:
        """Loads a run's best checkpoint, or a checkpoint folder.

        Args:
            folder: a run folder or a checkpoint folder. Texts are truncated as in training, or to 512 tokens if it is
                unknown how.
            device: "cpu", "cuda" or "mps"; default: the fastest available one.
            dtype: "fp32", "bf16" or "fp16"; default: bf16 if the device supports it natively, else fp32.

        Raises:
            FunnelError: the folder does not contain a model of the right kind, or the device is not available.
        """
        folder = Path(folder)
        path = best_checkpoint(folder)
        if path == folder and folder.is_dir() and not (folder / CONFIG).is_file():
            raise FunnelError(f"{folder}: neither a run nor a checkpoint; {_describe_content(folder)}")
        checkpoint = load_checkpoint(path)
        kind = problem_of(checkpoint.architecture, checkpoint.config, str(path))
        if kind.name not in cls.problems:
            raise FunnelError(f"{path}: expected a {cls.title}, found a {kind.title}")
        tokenizer = FunnelTokenizer.load(path)
        tokenizer.check_vocab_size(checkpoint.config.vocab_size, path)
        model = kind.model_class(checkpoint.config)
        load_weights(model, checkpoint.weights, str(path))
        inputs = InputFormat.of_checkpoint(checkpoint.config, folder)
        chosen = choose_device(device)
        return cls(model.to(chosen), tokenizer, inputs, choose_dtype(dtype, chosen, checkpoint.config.d_model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The results for one example or several; subclasses define the arguments."""
        raise NotImplementedError

    def stream(self, inputs: Iterable[Any], batch_size: int = BATCH_SIZE) -> Iterator[Any]:
        """Yields one result per input, in order. Reads at most `batch_size` inputs ahead, so `inputs` may be endless.

        Args:
            inputs: texts, or tuples with the arguments of a call for one example: (text, second text), (question, context) or
                (question, choices).
            batch_size: number of inputs that run through the model at a time.

        Raises:
            FunnelError: `batch_size` is not positive, `inputs` is a single text or mixes tuples of different lengths, or an
                input is invalid.
        """
        if batch_size < 1:
            raise FunnelError(f"invalid batch_size {batch_size}: expected a positive number", "batch_size")
        if isinstance(inputs, str):
            raise FunnelError("inputs is a string: expected an iterable of texts", "inputs")
        return self._stream(iter(inputs), batch_size)

    def _stream(self, inputs: Iterator[Any], batch_size: int) -> Iterator[Any]:
        while chunk := list(itertools.islice(inputs, batch_size)):
            rows = [row if isinstance(row, tuple) else (row,) for row in chunk]
            if len({len(row) for row in rows}) > 1:
                raise FunnelError("inputs mixes texts and tuples, or tuples of different lengths", "inputs")
            yield from self(*(list(column) for column in zip(*rows, strict=True)))

    @property
    def truncation_note(self) -> str:
        """How many examples were truncated so far; "" if none."""
        return describe_truncation(self.n_truncated, "text", self.inputs.max_length)

    def run(self, dataset: Dataset, how: Pass = WHOLE_SET) -> Tensor:
        """What the problem keeps of the model's outputs for all rows, [n, ...]; updates `n_truncated`."""
        self.n_truncated += dataset.truncation.texts
        with autocast(self.device, self.dtype):
            return predict(self.model, self.problem, dataset, how)

    def evaluate(self, dataset: Dataset, metrics: Sequence[str], name: str) -> tuple[dict[str, float], dict[str, Any]]:
        """Evaluates the model on a labeled dataset, with a progress bar on standard error; updates `n_truncated`.

        Args:
            metrics: names, as in `Problem.metric_functions`.
            name: the dataset's, for messages.

        Returns:
            Loss and metrics by name, and the error analysis. Correlations may be NaN.

        Raises:
            FunnelError: a metric is unknown, or outputs are not finite.
        """
        results = self.run_with_progress(dataset, name)
        return self.problem.score(results, dataset, metrics), self.problem.analyze(results, dataset, self.tokenizer)

    def run_checked(self, dataset: Dataset, name: str = "the input", how: Pass = WHOLE_SET) -> Tensor:
        """As `run`.

        Args:
            name: the dataset's, for the message.

        Raises:
            FunnelError: outputs are not finite.
        """
        results = self.run(dataset, how)
        check_finite(results, name, self.dtype)
        return results

    def run_with_progress(self, dataset: Dataset, name: str) -> Tensor:
        """As `run_checked`, with a progress bar on standard error."""
        n_batches = math.ceil(len(dataset) / BATCH_SIZE)
        progress = tqdm(desc=name, total=n_batches, unit="batch", disable=None, dynamic_ncols=True)

        def advance() -> None:
            progress.update()

        with progress:
            return self.run_checked(dataset, name, Pass(poll=advance))


def describe_truncation(count: int, what: str, limit: int) -> str:
    """ "2 texts were truncated to 128 tokens"; "" if there are none."""
    verb = "was" if count == 1 else "were"
    return f"{plural(count, what)} {verb} truncated to {limit} tokens" if count else ""


def _describe_content(folder: Path) -> str:
    """What a folder that is not a checkpoint contains, for an error message."""
    if runs := sorted(record.parent.name for record in folder.glob(f"*/{RUN_FILE}")):
        return f"choose one of the runs in it: {format_list(runs)}"
    return f"it contains {format_list(sorted(path.name for path in folder.iterdir())) or 'nothing'}"

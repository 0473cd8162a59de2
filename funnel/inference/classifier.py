"""Classifying and scoring texts and pairs of texts."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from tqdm import tqdm

from funnel.data.custom import ColumnChoice, open_examples
from funnel.data.dataset import Dataset
from funnel.data.encoding import TextEncoder, encode_examples, encode_texts
from funnel.data.files import Example, ExampleFile
from funnel.data.tokenizer import FunnelTokenizer, list_of_strings
from funnel.errors import FunnelError, format_list
from funnel.inference.predictor import InputFormat, Predictor
from funnel.model.heads import FunnelForSequenceClassification
from funnel.problems.multi_label import MultiLabel

CHUNK_SIZE = 4096  # examples of a file held in memory at a time


class Prediction(NamedTuple):
    """The prediction for one text or pair of texts.

    Attributes:
        label: name of the most probable class; for regression, the score; for a multi-label classifier, the list of all
            classes whose probability exceeds the decision threshold.
        probability: probability of the class; None for regression and multi-label classifiers.
        probabilities: probability of every class, by name; empty for regression.
    """

    label: str | float | list[str]
    probability: float | None
    probabilities: dict[str, float]

    def top_k(self, k: int) -> list[tuple[str, float]]:
        """The k most probable classes with their probabilities, the most probable first; all classes if there are fewer.

        Raises:
            FunnelError: k is not positive, or the model predicts a score.
        """
        if k < 1:
            raise FunnelError(f"invalid top_k {k}: expected a positive number", "top_k")
        if not self.probabilities:
            raise FunnelError("top_k: the model predicts a score, not classes", "top_k")
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[:k]


class Classifier(Predictor):
    """Classifies or scores texts, or pairs of texts. Arguments and attributes as in `Predictor`."""

    problems = ("classification", "regression", "multi-label")
    title = "text classifier"

    def __init__(
        self,
        model: FunnelForSequenceClassification,
        tokenizer: FunnelTokenizer,
        inputs: InputFormat | None = None,
        dtype: str = "fp32",
    ) -> None:
        config = model.config
        if config.problem_type == "regression" and config.num_labels > 1:
            raise FunnelError(f"a regression with {config.num_labels} outputs is not supported; expected one output")
        super().__init__(model, tokenizer, inputs, dtype)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a string is an iterable of strings, too
        self, texts: str, pairs: str | None = None, top_k: None = None
    ) -> Prediction: ...
    @overload
    def __call__(self, texts: Iterable[str], pairs: Iterable[str] | None = None, top_k: None = None) -> list[Prediction]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, texts: str, pairs: str | None = None, *, top_k: int
    ) -> list[tuple[str, float]]: ...
    @overload
    def __call__(
        self, texts: Iterable[str], pairs: Iterable[str] | None = None, *, top_k: int
    ) -> list[list[tuple[str, float]]]: ...
    def __call__(self, texts: str | Iterable[str], pairs: str | Iterable[str] | None = None, top_k: int | None = None) -> Any:
        """Classifies one text, or several: a list, a NumPy array, a pandas Series or any other iterable of strings.

        Args:
            pairs: the second text of each pair, for a classifier of text pairs.
            top_k: return only this number of classes with their probabilities, as `Prediction.top_k`. Without it, a
                prediction has the probabilities of all classes.

        Raises:
            FunnelError: a text is not a string, texts and pairs do not match, `top_k` is invalid, or logits are not finite.
        """
        if pairs is not None and isinstance(pairs, str) != isinstance(texts, str):
            raise FunnelError("texts and pairs must both be strings or both be lists of strings", "pairs")
        self.check_pairs(pairs is not None)
        is_single = isinstance(texts, str)
        texts = [texts] if isinstance(texts, str) else list_of_strings(texts, "texts")
        pairs = [pairs] if isinstance(pairs, str) else None if pairs is None else list_of_strings(pairs, "pairs")
        predictions = [self.to_prediction(row) for row in self.logits(texts, pairs)]
        results = predictions if top_k is None else [prediction.top_k(top_k) for prediction in predictions]
        return results[0] if is_single else results

    def logits(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Tensor:
        """Returns the logits of texts in their order, [n_texts, n_outputs], float32 on the CPU; updates `n_truncated`.

        Raises:
            FunnelError: as `FunnelTokenizer.encode`, or the logits are not finite.
        """
        if not texts:
            return torch.empty(0, self.model.config.num_labels)
        return self.run_checked(encode_texts(texts, pairs, self.tokenizer, self.inputs.max_length))

    def to_prediction(self, logits: Tensor) -> Prediction:
        """Converts the logits of one text, [n_outputs]."""
        config = self.model.config
        if config.problem_type == "regression":
            return Prediction(float(logits[0]), None, {})
        if isinstance(self.problem, MultiLabel):
            all_probabilities = dict(zip(self.problem.labels, logits.double().sigmoid().tolist(), strict=True))
            chosen = [name for name, p in all_probabilities.items() if p > self.problem.decision_threshold]
            return Prediction(chosen, None, all_probabilities)
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
            FunnelError: the file is malformed, or logits are not finite.
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
            metrics: names, as in `Problem.metric_functions`.
            labels: names of the labels by another spelling in the file, as in `Task.labels`; ignored if the classifier has
                other labels.

        Returns:
            Loss and metrics by name, and the error analysis. Correlations may be NaN.

        Raises:
            FunnelError: the file is malformed or has a label that the classifier lacks, or a metric is unknown.
        """
        return self.evaluate(self.encode_file(source, labels), metrics, source.path.name)

    def encode_file(self, source: ExampleFile, labels: Mapping[str, str] | None = None) -> Dataset:
        """Encodes a labeled file; arguments and errors as in `evaluate_file`."""
        label_ids = {name: i for i, name in enumerate(self.problem.labels)} if self.problem.has_classes else None
        if labels and label_ids and set(labels.values()) == set(label_ids):
            label_ids = {spelling: label_ids[name] for spelling, name in labels.items()} | label_ids
        encoder = TextEncoder(label_ids, isinstance(self.problem, MultiLabel))
        return encode_examples(source, encoder, self.tokenizer, self.inputs.max_length)

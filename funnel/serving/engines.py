"""The models that are served: loaded from runs, or from ONNX exports that onnxruntime runs.

Shapes: b texts, l tokens, k outputs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from funnel.analysis.onnx_report import open_session, run_graph
from funnel.analysis.rollout import explain
from funnel.data.custom import ColumnChoice
from funnel.data.dataset import Dataset
from funnel.data.encoding import flatten_ids, measure_truncation, text_rows
from funnel.data.files import ExampleFile
from funnel.data.tokenizer import Encoding, FunnelTokenizer, truncate_pair
from funnel.errors import FunnelError
from funnel.inference.classifier import Classifier, Prediction
from funnel.inference.predictor import InputFormat, problem_name, run_folder
from funnel.io import read_json
from funnel.model.checkpoint import CONFIG
from funnel.model.config import FunnelConfig
from funnel.model.heads import FunnelForSequenceClassification
from funnel.model.pooling import block_lengths
from funnel.problems.registry import PROBLEMS
from funnel.training.device import choose_device
from funnel.training.evaluate import WHOLE_SET, Pass
from funnel.weights.export import INPUTS

ONNX_FILE = "model.onnx"
NOT_FINITE = "the model's outputs are not finite; serve it with float32, or train it again"
WARM_UP_LENGTHS = (4, 16, 64)  # words


class Input(NamedTuple):
    """A text, or a pair of texts."""

    text: str
    pair: str | None = None


class OnnxClassifier(Classifier):
    """A text classifier in a folder written by `funnel convert` in ONNX format, run by onnxruntime on the CPU.

    `model` has the export's config, but no weights.

    Raises:
        FunnelError: onnxruntime is not installed, or the folder does not contain an export of a text classifier.
    """

    def __init__(self, folder: Path) -> None:
        self.session = open_session(folder / ONNX_FILE, spin=False)  # other models need the cores
        config = FunnelConfig.from_dict(read_json(folder / CONFIG), str(folder / CONFIG))
        shapes = [len(node.shape) for node in (*self.session.get_inputs(), *self.session.get_outputs())]
        if shapes != [2] * (len(INPUTS) + 1):  # [b, l] each, and [b, k]; models of tokens and choices have three dimensions
            raise FunnelError(f"{folder}: {_not_served('a model of another kind')}")
        tokenizer = FunnelTokenizer.load(folder)
        tokenizer.check_vocab_size(config.vocab_size, folder)
        with torch.device("meta"):
            model = FunnelForSequenceClassification(config)
        super().__init__(model, tokenizer, InputFormat.of_checkpoint(config, folder))

    def run(self, dataset: Dataset, how: Pass = WHOLE_SET) -> Tensor:
        """As `Predictor.run`, without progress."""
        self.n_truncated += dataset.truncation.texts
        return run_graph(self.session, self.problem, dataset)


class ServedModel:
    """A classifier and the name under which it is served.

    Args:
        name: unique on the server.
        classifier: its methods are called by one thread at a time, `encode` and `open_file` by several.
    """

    def __init__(self, name: str, classifier: Classifier) -> None:
        self.name, self.classifier = name, classifier
        self.config = classifier.model.config
        self.engine = "onnx" if isinstance(classifier, OnnxClassifier) else "pytorch"
        self.can_explain = self.engine == "pytorch"
        self.device_type = classifier.device.type if self.can_explain else "cpu"

    @classmethod
    def load(cls, folder: Path, name: str, device: str | None = None, dtype: str | None = None) -> "ServedModel":
        """Loads a run, a checkpoint, or an ONNX export.

        Args:
            device: as in `Classifier.load`; an ONNX export always runs on the CPU.
            dtype: as there, but float32 by default on a CPU: other dtypes would convert the weights for each batch.

        Raises:
            FunnelError: the folder cannot be loaded, or has a model for another kind of problem.
        """
        if (folder / ONNX_FILE).is_file():
            return cls(name, OnnxClassifier(folder))
        kind = problem_name(folder)
        if kind and kind not in Classifier.problems:
            raise FunnelError(f"{folder}: {_not_served(f'a {PROBLEMS[kind].title}')}")
        if dtype is None and choose_device(device).type == "cpu":
            dtype = "fp32"
        return cls(name, Classifier.load(folder, device, dtype))

    @property
    def takes_pairs(self) -> bool | None:
        """Whether the model was trained on pairs of texts; None if unknown."""
        columns = self.classifier.inputs.columns
        return len(columns) == 2 if columns else None

    def describe(self) -> dict[str, Any]:
        """What /v1/models says about the model."""
        classifier = self.classifier
        kind = classifier.problem.name
        return {
            "name": self.name,
            "problem": kind,
            "labels": [] if kind == "regression" else classifier.problem.labels,
            "pairs": self.takes_pairs,
            "columns": list(classifier.inputs.columns),
            "max_length": classifier.inputs.max_length,
            "blocks": self.config.layout,
            "d_model": self.config.d_model,
            "parameters": sum(parameter.numel() for parameter in classifier.model.parameters()),
            "engine": self.engine,
            "can_explain": self.can_explain,
        }

    def encode(self, inputs: Sequence[Input]) -> list[Encoding]:
        """Tokenizes texts.

        Raises:
            FunnelError: a text cannot be encoded, or the model needs pairs, or does not take them.
        """
        encodings: dict[int, Encoding] = {}
        tokenizer, max_length = self.classifier.tokenizer, self.classifier.inputs.max_length
        for has_pairs in (False, True):
            rows = [row for row, item in enumerate(inputs) if (item.pair is not None) == has_pairs]
            if rows:
                self.classifier.check_pairs(has_pairs)
                pairs = [inputs[row].pair or "" for row in rows] if has_pairs else None
                encoded = tokenizer.encode([inputs[row].text for row in rows], pairs, max_length)
                encodings.update(zip(rows, encoded, strict=True))
        return [encodings[row] for row in range(len(inputs))]

    def logits(self, encodings: Sequence[Encoding]) -> Tensor:
        """The model's outputs for one batch of texts, [b, k], float32 on the CPU."""
        n = len(encodings)
        rows = text_rows(encodings, np.full(n, -1, np.int32), np.zeros(n, np.uint64))
        pad_id = self.classifier.tokenizer.pad_id
        return self.classifier.run(Dataset(flatten_ids(encodings), rows, pad_id, measure_truncation(encodings)))

    def to_json(self, prediction: Prediction, encoding: Encoding) -> dict[str, Any]:
        """A prediction as the API returns it."""
        n_tokens = len(encoding.input_ids)
        return {
            "label": prediction.label,
            "probability": prediction.probability,
            "probabilities": prediction.probabilities,
            "n_tokens": n_tokens,
            "truncated": encoding.full_length > n_tokens,
            "lengths": block_lengths(n_tokens, self.config),
        }

    def explain(self, item: Input) -> dict[str, Any]:
        """The explanation of one prediction, as the API returns it.

        No other PyTorch model may run at the same time: attention weights are captured process-wide.

        Raises:
            FunnelError: as `encode`.
        """
        (encoding,) = self.encode([item])
        explanation = explain(self.classifier, item.text, item.pair)
        tokens = [
            {"text": text, "contribution": contribution, **place}
            for text, contribution, place in zip(
                explanation.tokens, explanation.contributions, self._token_places(item), strict=True
            )
        ]
        return {
            "prediction": self.to_json(explanation.prediction, encoding),
            "tokens": tokens,
            "blocks": [[position._asdict() for position in block] for block in explanation.blocks],
        }

    def _token_places(self, item: Input) -> list[dict[str, int | None]]:
        """Where each token comes from: text (segment 0) or pair (1), and its characters there; None for special tokens."""
        tokenizer, max_length = self.classifier.tokenizer, self.classifier.inputs.max_length
        texts = [item.text] if item.pair is None else [item.text, item.pair]
        offsets = [pairs.tolist() for _, pairs in tokenizer.encode_with_offsets(texts)]
        separators = 1 if item.pair is None else tokenizer.separators
        if item.pair is None:
            kept = [max_length - 2]
        else:
            kept = [*truncate_pair(len(offsets[0]), len(offsets[1]), max_length - 2 - separators)]
        places: list[dict[str, int | None]] = [{"start": None, "end": None, "segment": 0}]
        for segment, text in enumerate(texts):
            for start, end in offsets[segment][: kept[segment]]:
                start += len(text[start:end]) - len(text[start:end].lstrip())  # without the space before a word
                places.append({"start": start, "end": end, "segment": segment})
            places += [{"start": None, "end": None, "segment": segment}] * (1 if segment else separators)
        return places

    def open_file(self, path: Path, text_column: str | None, pair_column: str | None) -> ExampleFile:
        """Finds the columns of a file to classify.

        Raises:
            FunnelError: as `Classifier.open_file`.
        """
        return self.classifier.open_file(path, ColumnChoice(text_column, pair_column, labeled=False))

    def warm_up_inputs(self) -> list[Input]:
        """Texts of several lengths."""
        texts = [" ".join(["warm"] * length) for length in WARM_UP_LENGTHS]
        return [Input(text, text if self.takes_pairs else None) for text in texts]


def load_models(folders: Sequence[Path], device: str | None = None, dtype: str | None = None) -> list[ServedModel]:
    """Loads the models to serve, each named after its folder.

    Raises:
        FunnelError: as `ServedModel.load`.
    """
    models: list[ServedModel] = []
    for folder in folders:
        name = base = (run_folder(folder) or folder).resolve().name or "model"
        number = 1
        while any(model.name == name for model in models):
            number += 1
            name = f"{base}-{number}"
        models.append(ServedModel.load(folder, name, device, dtype))
    return models


def _not_served(found: str) -> str:
    return f"expected a model for one of {', '.join(Classifier.problems)}; {found} cannot be served"

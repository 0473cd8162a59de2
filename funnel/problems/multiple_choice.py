"""One of several choices per question."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from funnel.data.choices import FIELDS, RACE_FIELDS, ChoiceEncoder, ChoiceFile, choice_name
from funnel.data.custom import DEV_NAMES, check_dev_share, find_files
from funnel.data.dataset import Dataset
from funnel.data.encoding import Encoder
from funnel.data.formats import DIALECTS, file_format, read_column_names, read_object
from funnel.data.tasks import CUSTOM, Task, get_task
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model.heads import FunnelForMultipleChoice
from funnel.problems.base import Problem
from funnel.problems.error_analysis import MAX_TEXT_LENGTH, compare_predictions, count_confusions, list_mistakes
from funnel.problems.metrics import Metric, accuracy

if TYPE_CHECKING:
    from funnel.problems.task_args import TaskArgs

NAME = "multiple-choice"
COLUMN_OPTIONS = ("text_column", "text_pair_column", "label_column", "positive_label")  # of other problems


class MultipleChoice(Problem):
    """One of several choices per question; cross-entropy over the choices.

    The model has a single output, the score of a choice, whatever the number of choices. It is what the config's `id2label`
    describes; choices are named by their letters.
    """

    name = NAME
    title = "multiple-choice model"
    model_class = FunnelForMultipleChoice
    has_classes = False  # a choice's position is not a class

    @classmethod
    def outputs(cls, task: Task) -> Sequence[str]:
        return ["score"]

    @classmethod
    def encoder(cls, task: Task) -> Encoder:
        return ChoiceEncoder()

    def prepare(self, train_set: Dataset, options: Any) -> None:
        if options.class_weights:
            message = "class_weights has no effect for multiple choice: the choices of a question are not classes; omit it"
            raise FunnelError(message, "class_weights")
        self.label_smoothing = options.label_smoothing

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float(), labels, label_smoothing=self.label_smoothing)

    def mean_loss(self, results: Tensor, dataset: Dataset) -> float:
        return float(F.cross_entropy(results, torch.from_numpy(dataset.labels).long()))

    @classmethod
    def metric_functions(cls, labels: Sequence[str]) -> Mapping[str, Metric]:
        return {"accuracy": accuracy}

    def predict(self, results: Tensor, dataset: Dataset) -> np.ndarray:
        """Indices of the chosen choices, [n]."""
        return results.argmax(1).numpy()

    def analyze(self, results: Tensor, dataset: Dataset, tokenizer: FunnelTokenizer) -> dict[str, Any]:
        labels, n_choices = dataset.labels, results.shape[1]
        predictions, probabilities, cost, calibration = compare_predictions(results, labels)

        def describe(row: int) -> dict[str, Any]:
            choices = [int(labels[row]), int(predictions[row])]
            texts = [tokenizer.decode(dataset.input_ids(row, choice)) for choice in choices]
            context, *_ = texts[0].rpartition(" | ")
            label, predicted = (
                f"{choice_name(choice)}: {text.rpartition(' | ')[2]}" for choice, text in zip(choices, texts, strict=True)
            )
            probability = [float(probabilities[row, choice]) for choice in choices]
            return {"text": context[:MAX_TEXT_LENGTH], "label": label, "predicted": predicted, "probability": probability}

        return {
            "examples": len(dataset),
            "unit": dataset.unit,
            "labels": [choice_name(choice) for choice in range(n_choices)],
            "confusion": count_confusions(labels, predictions, n_choices).tolist(),
            "calibration": calibration,
            "mistakes": list_mistakes(cost, describe, dataset, tokenizer),
        }


# --- the user's own files ---------------------------------------------------------------------------------------------


def has_choices(args: "TaskArgs", data: Path) -> bool:
    """Whether the user's own data has multiple choice: the problem is set to it, or else its first file looks like it.

    Never raises an error; what is wrong with a file is reported when it is read.
    """
    if args.problem is not None:
        return args.problem == NAME
    try:
        path = find_splits(data)["train"]
        if os.path.isdir(path):
            first = next(path.rglob("*.txt"), None)
            return first is not None and set(RACE_FIELDS) <= read_object(first).keys()
        return file_format(path) not in ("", *DIALECTS) and set(FIELDS) <= set(read_column_names(path))
    except (FunnelError, OSError):
        return False


def find_splits(data: Path) -> dict[str, Path]:
    """The files or folders "train" and "dev" of a folder; the training set alone for anything else.

    Raises:
        FunnelError: a folder has no training file.
    """
    if not os.path.isdir(data):
        return {"train": data}
    if (data / "train").is_dir():
        dev = next((data / name for name in DEV_NAMES if (data / name).is_dir()), None)
        return {"train": data / "train"} | ({} if dev is None else {"dev": dev})
    if next(data.rglob("*.txt"), None) is not None:
        return {"train": data}
    return find_files(data)


def open_task(args: "TaskArgs", data: Path) -> Task:
    """A task made of the user's own files; its hyperparameters are those of RACE, for three epochs.

    Raises:
        FunnelError: a file is missing or malformed, or an option for files with columns is set.
    """
    for name in COLUMN_OPTIONS:
        if getattr(args, name) is not None:
            raise FunnelError(f"{name} has no effect for multiple choice, whose fields have fixed names; omit it", name)
    if not os.path.exists(data):
        raise FunnelError(f"data {data}: no such file or folder", "data")
    paths = find_splits(data)
    if args.dev is not None:
        if not os.path.exists(args.dev):
            raise FunnelError(f"dev {args.dev}: no such file or folder", "dev")
        paths["dev"] = args.dev
    check_dev_share(args.dev_share, paths, "set")
    files = {split: ChoiceFile(path) for split, path in paths.items()}
    first = next(files["train"].rows())
    race = get_task("race")
    return Task(
        CUSTOM,
        data.resolve().name,
        None,
        race.metrics,
        race.batch_size,
        3,
        race.learning_rate,
        race.max_length,
        problem=NAME,
        files=files,
        description=f"{paths['train'].name}: questions with {len(first.choices)} choices",
    )

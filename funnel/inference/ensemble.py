"""Averaged predictions of several classifiers, such as those of a cross-validation."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funnel.data.dataset import Dataset
from funnel.data.files import ExampleFile
from funnel.errors import FunnelError, format_list
from funnel.inference.classifier import Classifier
from funnel.io import RUN_FILE
from funnel.problems.multi_label import MultiLabel
from funnel.training.evaluate import WHOLE_SET, Pass


class Ensemble(Classifier):
    """Classifies or scores texts with several classifiers; used like a `Classifier`.

    The probabilities are the means of those of the classifiers; for regression, the scores. The decision threshold of a
    multi-label ensemble is the mean of the thresholds. Layouts, tokenizers and maximum lengths may differ.

    Args:
        classifiers: with the same kind of problem, labels and text columns.

    Attributes:
        classifiers: as given.

    Raises:
        FunnelError: there are none, or they do not agree.
    """

    def __init__(self, classifiers: Sequence[Classifier]) -> None:
        if not classifiers:
            raise FunnelError("an ensemble needs at least one classifier")
        first, *others = classifiers
        for number, other in enumerate(others, 2):
            check_agreement(first, other, number)
        super().__init__(first.model, first.tokenizer, first.inputs, first.dtype)  # type: ignore[arg-type]
        self.classifiers = list(classifiers)
        if isinstance(self.problem, MultiLabel):
            thresholds = [c.problem.decision_threshold for c in classifiers if isinstance(c.problem, MultiLabel)]
            self.problem.threshold = sum(thresholds) / len(thresholds)

    @classmethod
    def load(cls, folder: str | Path | Sequence[str | Path], device: str | None = None, dtype: str | None = None) -> "Ensemble":
        """Loads the best checkpoints of several runs.

        Args:
            folder: the folders of runs or checkpoints; one that contains runs, such as that of a sweep, stands for all of them.
                Each run is used once.
            device, dtype: as in `Classifier.load`.

        Raises:
            FunnelError: a classifier cannot be loaded, or they do not agree.
        """
        folders = [Path(path) for path in ([folder] if isinstance(folder, str | Path) else folder)]
        runs = [run for path in folders for run in sorted(record.parent for record in path.glob(f"*/{RUN_FILE}")) or [path]]
        return cls([Classifier.load(run, device, dtype) for run in dict.fromkeys(run.resolve() for run in runs)])

    @property
    def truncation_note(self) -> str:
        """How many examples were truncated so far by the classifier that truncated most; "" if none."""
        return max(self.classifiers, key=lambda classifier: classifier.n_truncated).truncation_note

    def logits(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Tensor:
        """Logits of which the probabilities are the means of those of the classifiers, or the mean scores.

        Returns:
            [n_texts, n_outputs], float64 on the CPU.

        Raises:
            FunnelError: as in `Classifier.logits`.
        """
        return self.average([classifier.logits(texts, pairs) for classifier in self.classifiers])

    def average(self, logits: Sequence[Tensor]) -> Tensor:
        """Combines the logits of the classifiers, [n_texts, n_outputs] each; result as in `logits`."""
        stacked = torch.stack(list(logits)).double()
        if self.problem.name == "regression":
            return stacked.mean(0)
        if isinstance(self.problem, MultiLabel):
            return F.logsigmoid(stacked).logsumexp(0) - F.logsigmoid(-stacked).logsumexp(0)
        return stacked.log_softmax(2).logsumexp(0) - math.log(len(stacked))

    def run(self, dataset: Dataset, how: Pass = WHOLE_SET) -> Tensor:
        """Raises FunnelError, as does `evaluate`: the ids of a dataset are those of one tokenizer."""
        raise FunnelError("an ensemble cannot run on an encoded dataset; use its logits or evaluate_file", "dataset")

    def evaluate_file(
        self, source: ExampleFile, metrics: Sequence[str], labels: Mapping[str, str] | None = None
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """As in `Classifier.evaluate_file`."""
        name = source.path.name
        datasets = [classifier.encode_file(source, labels) for classifier in self.classifiers]
        pairs = zip(self.classifiers, datasets, strict=True)
        results = self.average([classifier.run_with_progress(dataset, name) for classifier, dataset in pairs]).float()
        scores = self.problem.score(results, datasets[0], metrics)
        return scores, self.problem.analyze(results, datasets[0], self.tokenizer)


def check_agreement(first: Classifier, other: Classifier, number: int) -> None:
    """Raises FunnelError if two classifiers of an ensemble differ in their outputs or text columns.

    Args:
        number: of the second classifier, for the message.
    """
    checks = {"kind": ([first.problem.title], [other.problem.title])}
    if first.problem.name != "regression":
        checks["labels"] = (first.problem.labels, other.problem.labels)
    if first.inputs.columns and other.inputs.columns:  # otherwise unknown
        checks["columns"] = (list(first.inputs.columns), list(other.inputs.columns))
    for what, (expected, found) in checks.items():
        if expected != found:
            names = f"{what} as the first one, {format_list(expected)}; found {format_list(found)}"
            raise FunnelError(f"ensemble: classifier {number}: expected the same {names}", "ensemble")

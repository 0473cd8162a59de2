"""The tasks by name: where their files are, columns, labels, metrics, and the paper's hyper-parameters (its table 8)."""

from dataclasses import dataclass
from pathlib import Path

from funnel import demo
from funnel.checkpoint import is_folder
from funnel.data import Examples, read_tsv
from funnel.errors import FunnelError


@dataclass(frozen=True)
class Task:
    """What is to know of a task.

    Attributes:
        labels: names of the labels by what stands in the file, in the order of their ids.
        metrics: names in metrics.METRICS; the first one says which checkpoint is the best.
        batch_size, epochs, learning_rate, max_length: defaults of training; sources beside the table below.
    """

    name: str
    text_columns: tuple[str, ...]
    label_column: str
    labels: dict[str, str]
    metrics: tuple[str, ...]
    batch_size: int
    epochs: float
    learning_rate: float
    max_length: int = 128

    def load(self, folder: Path | None) -> tuple[Examples, Examples]:
        """Reads the training and the dev examples.

        Args:
            folder: has train.tsv and dev.tsv. The demo task has its sentences built in and takes none.

        Raises:
            FunnelError: no folder was given, or a file is missing or has a mistake in it.
        """
        if self.name == "demo":
            if folder is not None:
                raise FunnelError(f"--data {folder}: the demo task has its own sentences; name the task with --task")
            return demo.examples()
        if folder is None:
            raise FunnelError(f"--task {self.name}: name the folder that has train.tsv and dev.tsv with --data DIR")
        if not is_folder(folder):
            raise FunnelError(f"--data {folder}: no such folder; it takes one that has train.tsv and dev.tsv")
        ids = {written: i for i, written in enumerate(self.labels)}
        train, dev = (read_tsv(folder / name, self.text_columns, self.label_column, ids) for name in ("train.tsv", "dev.tsv"))
        return train, dev


SENTIMENT = {"0": "negative", "1": "positive"}

# Batch size and epochs: paper, table 8. Learning rates: the original's recommendation (github.com/laiguokun/
# Funnel-Transformer). The demo's are our own: the best of those tried for a model that starts from nothing.
TASKS = {
    task.name: task
    for task in (
        Task("demo", ("sentence",), "label", SENTIMENT, ("accuracy", "f1"), 64, 2, 5e-4),
        Task("sst2", ("sentence",), "label", SENTIMENT, ("accuracy", "f1"), 32, 5, 1e-5),
    )
}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        FunnelError: there is none.
    """
    if name.lower() not in TASKS:
        raise FunnelError(f"--task {name!r}: no such task; there are {', '.join(TASKS)}")
    return TASKS[name.lower()]

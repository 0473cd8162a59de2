"""What a run prints: its progress bar, a banner at the start, a summary at the end."""

import contextlib
import time
from collections.abc import Iterator, Mapping

import numpy as np
from tqdm import tqdm

from funnel.data.dataset import Dataset
from funnel.data.tasks import Task
from funnel.errors import format_list, plural
from funnel.training.evaluate import Evaluation, single_class_warning
from funnel.training.run_dir import RunDir
from funnel.training.state import TrainComponents, TrainState


class Progress:
    """A progress bar and a clock that stops during evaluations and checkpoints. Only rank 0 prints."""

    def __init__(self, run: RunDir, state: TrainState, total_steps: int) -> None:
        self.run, self.state = run, state
        self.examples = 0
        self.warning: str | None = None
        self._started = time.perf_counter()
        disable = None if run.is_main else True  # None: no bar unless standard error is a terminal
        self.bar = tqdm(total=total_steps, initial=state.step, unit="step", disable=disable, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self.bar.close()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock while the body runs."""
        paused_at = time.perf_counter()
        yield
        self._started += time.perf_counter() - paused_at

    @property
    def examples_per_second(self) -> float:
        """Training throughput since the start of this process."""
        return self.examples / (time.perf_counter() - self._started)

    def update(self, n_examples: int) -> None:
        """Counts one step."""
        self.examples += n_examples
        self.bar.update()

    def log_train(self, lr: float, memory_mib: float | None) -> None:
        """Logs the running mean of the loss, which waits for the device; nothing before this process's first step."""
        if not self.examples or self.state.mean_loss is None:
            return
        loss, rate = float(self.state.mean_loss), self.examples_per_second
        self.run.log(step=self.state.step, split="train", loss=loss, lr=lr, examples_per_second=rate, memory_mib=memory_mib)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:.0f} examples/s", refresh=False)

    def log_evaluation(self, results: Mapping[str, Evaluation], eval_sets: Mapping[str, Dataset], task: Task) -> None:
        """Logs and prints an evaluation; remembers a warning if the classifier predicts a single class."""
        if task.label_names is not None:
            self.warning = single_class_warning(results["dev"].logits, eval_sets["dev"].labels, task.label_names)
        for split, (_, scores) in results.items():
            self.run.log(step=self.state.step, split=split, **scores)
            if self.run.is_main:
                text = format_scores({"step": self.state.step, **scores})
                self.bar.write(text + ("" if split == "dev" else f" ({split})"))

    def print_summary(self) -> None:
        """Prints the last and the best evaluation, the training time, and where the results are."""
        if not self.examples:
            print("nothing left to do: the run had already reached its last step")
        print(f"\nlast on dev: {format_scores(self.state.last)}\nbest on dev: {format_scores(self.state.best)}")
        rate = f"{self.seconds / 60:.1f} minutes of training, {self.examples / self.seconds:.0f} examples/s"
        print(f"{rate}; checkpoints and metrics.jsonl are in {self.run.folder}")
        if self.warning:
            print(f"warning: {self.warning}")


def format_scores(scores: Mapping[str, float]) -> str:
    """One line: "step 1,200: loss 0.3012, accuracy 0.8830"."""
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "step")
    return f"step {scores['step']:,}: {metrics}"


def print_data(task: Task, train_set: Dataset, eval_sets: Mapping[str, Dataset]) -> None:
    """Prints the sizes of the datasets; warns of truncated texts and of classes that dev lacks."""
    if task.description:
        print(task.description)
    sizes = ", ".join(f"{len(dataset):,} in {split}" for split, dataset in eval_sets.items())
    print(f"{task.title}: {plural(len(train_set), 'training example')}, {sizes}")
    truncations = {dataset.truncation: split for split, dataset in {**eval_sets, "train": train_set}.items()}
    for truncation, split in truncations.items():  # a dev set split off the training set has the same entry
        if truncation.texts:
            print(f"warning: {split}: {truncation}")
    if task.label_names is not None:
        missing = np.setdiff1d(train_set.labels, eval_sets["dev"].labels)
        if len(missing):
            names = format_list(task.label_names[i] for i in missing)
            print(f"warning: {plural(len(missing), 'class')} without an example in dev: {names}")


def print_banner(run: RunDir, state: TrainState, components: TrainComponents, origin: str) -> None:
    """Prints what is trained, how, and where."""
    config, settings, dist = components.model.config, run.settings, components.dist
    parameters = sum(parameter.numel() for parameter in components.model.parameters())
    device = dist.device.type + (f" x {dist.world_size} processes" if dist.world_size > 1 else "")
    print(f"model: blocks {config.layout}, d_model {config.d_model}, {parameters:,} parameters, from {origin}")
    print(
        f"training: {plural(settings['steps'], 'step')} of {plural(settings['batch_size'], 'example')}, "
        f"learning rate {settings['lr']:g}, "
        f"{components.dtype} on {device}; writing to {run.folder}"
    )
    if run.is_resumed:
        print(f"resumed at step {state.step:,}" if state.step else "no checkpoint to resume from: starting at step 0")

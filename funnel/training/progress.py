"""What a run prints: its progress bar, a banner at the start, a summary at the end."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

from tqdm import tqdm

from funnel.data.checks import compare_sets
from funnel.data.dataset import Dataset
from funnel.data.tasks import CUSTOM, Task
from funnel.errors import plural
from funnel.io import read_json
from funnel.options import RANDOM
from funnel.problems.base import Problem
from funnel.problems.error_analysis import EVALUATION_FILE, single_class_warning
from funnel.training.evaluate import Evaluation
from funnel.training.freezing import describe_frozen
from funnel.training.run_dir import RunDir
from funnel.training.state import TrainComponents, TrainState


class Progress:
    """A progress bar and a clock that stops during evaluations and checkpoints. Only rank 0 prints.

    Args:
        label_std: standard deviation of a regression's labels; the training loss is shown in their units.
        names: of the values in `state.mean_loss`.
    """

    def __init__(self, run: RunDir, state: TrainState, label_std: float = 1.0, names: Sequence[str] = ("loss",)) -> None:
        self.run, self.state, self.label_std, self.names = run, state, label_std, names
        self.examples = 0
        self._started = time.perf_counter()
        disable = None if run.is_main else True  # None: no bar unless standard error is a terminal
        self.bar = tqdm(total=state.total_steps, initial=state.step, unit="step", disable=disable, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self.bar.close()
        self.run.close(failed=error is not None)

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
        """Logs running means of the loss and the other values, which waits for the device; nothing before this process's
        first step."""
        if not self.examples or self.state.mean_loss is None:
            return
        values = (self.state.mean_loss * self.label_std**2).reshape(-1).tolist()
        losses, rate = dict(zip(self.names, values, strict=True)), self.examples_per_second
        self.run.log(step=self.state.step, split="train", **losses, lr=lr, examples_per_second=rate, memory_mib=memory_mib)
        self.bar.set_postfix_str(f"{format_scores(losses)}, {rate:.0f} examples/s", refresh=False)

    def log_evaluation(self, results: Mapping[str, Evaluation]) -> None:
        """Logs and prints an evaluation."""
        for split, (_, scores) in results.items():
            self.log_scores(split, scores)

    def log_scores(self, split: str, scores: Mapping[str, float]) -> None:
        """Logs and prints the scores on one dataset."""
        self.run.log(step=self.state.step, split=split, **scores)
        if self.run.is_main:
            text = format_scores({"step": self.state.step, **scores})
            self.bar.write(text + ("" if split == "dev" else f" ({split})"))

    def print_summary(self, graphs: str = "") -> None:
        """Prints the last and the best evaluation, the training time, and where the results are; only on rank 0.

        Args:
            graphs: number and memory of the CUDA graphs, if there were any.
        """
        if not self.run.is_main:
            return  # rank 0 may still be writing the files
        if self.state.stopped_early:
            print(f"\nstopped early: {plural(self.state.not_better, 'evaluation')} without a better one", end="")
        print(f"\nlast on dev: {format_scores(self.state.last)}")
        if self.state.best:
            print(f"best on dev: {format_scores(self.state.best)}")
        files = f"checkpoints and metrics.jsonl are in {self.run.folder} ({self.run.size() / 1e6:,.1f} MB)"
        if self.examples:
            rate = f"{self.examples / self.seconds:.0f} examples/s{graphs and f' with {graphs}'}"
            print(f"{self.seconds / 60:.1f} minutes of training, {rate}; {files}")
        else:
            print(files)
        self._warn_about_single_class()

    def _warn_about_single_class(self) -> None:
        """Warns if the model in best/, which later commands use, predicts the same class for all examples."""
        path = self.run.folder / "best" / EVALUATION_FILE
        warning = single_class_warning(read_json(path)) if path.is_file() else None
        if warning is not None:
            # Random weights have learned nothing yet; pretrained ones may have been destroyed.
            rate = "higher" if self.run.settings["weights"] == RANDOM else "lower"
            print(
                f"warning: the best checkpoint (step {self.state.best['step']:,}) {warning}. "
                f"The model has not learned the task: try more epochs or a {rate} learning rate"
            )


def format_scores(scores: Mapping[str, float]) -> str:
    """One line: "loss 0.3012, accuracy 0.8830", preceded by "step 1,200: " if the scores have a step."""
    step = f"step {scores['step']:,}: " if "step" in scores else ""
    metrics = ", ".join(f"{name} {_format_score(value)}" for name, value in scores.items() if name != "step")
    return step + " ".join(metrics.split())  # the name of a class may contain a line break


def _format_score(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value:.6g}"  # the squared error of large labels
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3g}"


def print_data(task: Task, problem: Problem, sets: Mapping[str, Dataset]) -> None:
    """Prints the sizes of the datasets, "train" among them, and warnings about them."""
    if task.description:
        print(task.description)
    train_set, eval_sets = sets["train"], {split: dataset for split, dataset in sets.items() if split != "train"}
    sizes = ", ".join(f"{len(dataset):,} in {split}" for split, dataset in eval_sets.items())
    print(f"{task.title}: {plural(len(train_set), f'training {train_set.unit}')}, {sizes}")
    for warning in task.warnings:
        print(f"warning: {warning}")
    for split, dataset in sets.items():
        if split not in task.files:
            continue  # split off the training file, whose warnings cover it
        name = "train" if "dev" in task.files else "train and dev"
        for warning in [str(dataset.truncation)] * (dataset.truncation.texts > 0) + list(dataset.warnings):
            print(f"warning: {name if split == 'train' else split}: {warning}")
    if task.name == CUSTOM:
        for warning in compare_sets(task, train_set, eval_sets):
            print(f"warning: {warning}")
    for warning in problem.compare_classes(train_set, eval_sets["dev"]):
        print(f"warning: {warning}")


def print_banner(run: RunDir, components: TrainComponents, origin: str, note: str = "") -> None:
    """Prints what is trained, how, and where.

    Args:
        origin: one-line description of the initial weights.
        note: advice about the model, on a line of its own.
    """
    config, settings, dist = components.model.config, run.settings, components.dist
    parameters = sum(parameter.numel() for parameter in components.model.parameters())
    device = dist.device.type + (f" x {dist.world_size} processes" if dist.world_size > 1 else "")
    print(f"model: blocks {config.layout}, d_model {config.d_model}, {parameters:,} parameters, from {origin}")
    if frozen := describe_frozen(components.model, settings.get("freeze_layers")):
        print(frozen)
    if note:
        print(f"note: {note}")
    print(
        f"training: {plural(settings['steps'], 'step')} of {plural(settings['batch_size'], 'example')}, "
        f"learning rate {settings['lr']:g}, "
        f"{components.dtype} on {device}; writing to {run.folder}"
    )
    if (config.label_mean, config.label_std) != (0, 1):
        print(f"labels: mean {config.label_mean:.6g}, standard deviation {config.label_std:.6g}; standardized for training")
    if settings.get("teacher"):
        weight = f", weight {settings['teacher_weight']:g}" if "teacher_weight" in settings else ""
        print(f"teacher: {settings['teacher']}{weight}")
    if run.resume_note:
        print(run.resume_note)

"""Reads finished and unfinished runs: settings, log, best checkpoint, error analysis, cost."""

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from funnel.data.tasks import CUSTOM
from funnel.errors import FunnelError, error_reason, plural
from funnel.io import LOG_FILE, RUN_FILE, os_errors, read_json
from funnel.model.checkpoint import best_checkpoint, load_config
from funnel.model.config import FunnelConfig
from funnel.model.flops import ModuleCost, count_parameters, module_costs, total_flops
from funnel.problems.error_analysis import EVALUATION_FILE
from funnel.problems.metrics import LOWER_IS_BETTER, selection_key

MAX_CONFUSIONS = 20
SEED_DEPENDENT = ("seed", "train_examples", "dev_examples", "mean_tokens")  # settings that differ between repetitions


@dataclass
class Run:
    """The contents of a run's folder.

    Attributes:
        folder: the run's folder.
        command: the command that started the run.
        settings: from run.json.
        log: lines of metrics.jsonl.
        evaluation: error analysis of the best checkpoint (`Problem.analyze`); empty if there is none.
        config: config of the best checkpoint.
    """

    folder: Path
    command: str
    settings: dict[str, Any]
    log: list[dict[str, Any]]
    evaluation: dict[str, Any]
    config: FunnelConfig

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def task(self) -> str:
        """The task's name, or the data file's for a custom task."""
        name = str(self.settings["task"])
        return Path(str(self.settings.get("data"))).name if name == CUSTOM else name

    @cached_property
    def dev_log(self) -> list[dict[str, Any]]:
        """Evaluations on dev."""
        return [line for line in self.log if line.get("split") == "dev"]

    @cached_property
    def train_log(self) -> list[dict[str, Any]]:
        return [line for line in self.log if line.get("split") == "train"]

    @property
    def repetition(self) -> tuple[Any, Any]:
        """Seed and fold; None without cross-validation."""
        return self.settings["seed"], self.settings.get("fold")

    @property
    def metrics(self) -> list[str]:
        """Names of the task's metrics; the first one selects the best checkpoint."""
        if "metrics" in self.settings:
            return list(map(str, self.settings["metrics"]))
        return [name for name in self.dev_log[-1] if name not in ("step", "split", "loss")]

    @property
    def final(self) -> dict[str, Any]:
        """The last evaluation on dev."""
        return self.dev_log[-1]

    @property
    def best(self) -> dict[str, Any]:
        """The best evaluation on dev, whose checkpoint is in best/."""
        if "metrics" not in self.settings:  # from a version that kept the first of equal evaluations
            return max(self.dev_log, key=lambda line: to_number(line.get(self.metrics[0])))
        return max(self.dev_log, key=lambda line: selection_key(line, self.metrics[0]))

    @property
    def duration(self) -> str:
        """The number of epochs or of steps that was asked for."""
        epochs = self.settings.get("epochs")
        return f"{self.settings['steps']:,} steps" if epochs is None else f"{epochs:g}"

    @property
    def is_finished(self) -> bool:
        return bool(self.final["step"] >= self.settings.get("stopped_at", self.settings["steps"]))

    @property
    def seconds(self) -> float:
        """Training time without evaluations and interruptions; NaN if unknown."""
        rates = [line["examples_per_second"] for line in self.train_log if line.get("examples_per_second")]
        return float(self.final["step"] * self.settings["batch_size"] / statistics.median(rates)) if rates else math.nan

    @property
    def peak_memory(self) -> float:
        """Peak memory in MiB; -inf if unknown."""
        return max((to_number(line.get("memory_mib")) for line in self.train_log), default=-math.inf)

    @property
    def length(self) -> int:
        """Mean number of tokens per example."""
        return max(1, round(self.settings.get("mean_tokens") or self.settings["max_length"]))

    @cached_property
    def flops(self) -> int:
        """FLOPs of a forward pass for an example of mean length."""
        return total_flops(self.config, self.length, self.settings["batch_size"])

    @cached_property
    def blocks(self) -> list[ModuleCost]:
        """The cost of each block."""
        return [module for module in module_costs(self.config, self.length, self.settings["batch_size"]) if module.layers]

    @cached_property
    def flops_ratio(self) -> float:
        """FLOPs relative to a model with the same number of layers and no pooling."""
        unpooled = self.config.replace(blocks=str(sum(block.runs for block in self.blocks)))
        return self.flops / total_flops(unpooled, self.length, self.settings["batch_size"])

    @cached_property
    def n_parameters(self) -> int:
        return count_parameters(self.config)

    @property
    def lacks_calibration(self) -> bool:
        """Whether an earlier version wrote the error analysis of a classifier, without calibration."""
        return "calibration" not in self.evaluation and not {"classes", "labels"}.isdisjoint(self.evaluation)

    @property
    def confusions(self) -> list[tuple[int, str, str]]:
        """The most frequent kinds of errors: count, label, prediction."""
        return top_confusions(self.evaluation)

    def summary(self) -> list[tuple[str, str]]:
        """The run's main figures: description and formatted value."""
        metric, best, calibration = self.metrics[0], self.best, self.evaluation.get("calibration")
        figures = [(f"final dev {with_unit(name)}", format_score(name, self.final.get(name))) for name in self.metrics]
        figures += [
            (f"best dev {with_unit(metric)} (step {best['step']:,})", format_score(metric, best.get(metric))),
            ("training time, minutes", f"{self.seconds / 60:.1f}"),
            ("parameters", f"{self.n_parameters / 1e6:.3g} M"),
            (f"FLOPs of a forward pass ({plural(self.length, 'token')})", f"{self.flops / 1e6:.3g} M"),
            ("of the FLOPs without pooling", f"{self.flops_ratio:.0%}"),
        ]
        if calibration is not None:
            figures.insert(-4, ("expected calibration error (dev), %", f"{100 * calibration['ece']:.1f}"))
        if math.isfinite(self.peak_memory):
            figures.append(("peak memory", f"{self.peak_memory / 1024:.1f} GiB"))
        return figures


def top_confusions(evaluation: Mapping[str, Any]) -> list[tuple[int, str, str]]:
    """The most frequent kinds of errors in an error analysis: count, label, prediction."""
    labels, matrix = evaluation["labels"], evaluation["confusion"]
    pairs = itertools.permutations(range(len(labels)), 2)
    confusions = [(matrix[i][j], labels[i], labels[j]) for i, j in pairs if matrix[i][j]]
    return sorted(confusions, key=lambda confusion: -confusion[0])[:MAX_CONFUSIONS]


def worst_classes(evaluation: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The classes in an error analysis with the lowest F1, of those with examples; among equals, those with most examples."""
    present = [row for row in evaluation["classes"] if row["examples"]]
    return sorted(present, key=lambda row: (row["f1"], -row["examples"]))[:count]


def to_number(value: Any) -> float:
    """A logged value; -inf if it is missing or not finite (null in the log)."""
    return value if isinstance(value, int | float) and not math.isnan(value) else -math.inf


def is_percentage(metric: str) -> bool:
    """Whether reports show a metric in percent; errors, such as rmse, are shown as they are."""
    return metric not in LOWER_IS_BETTER


def with_unit(metric: str) -> str:
    """ "accuracy, %", "rmse"."""
    return f"{metric}, %" if is_percentage(metric) else metric


def format_score(metric: str, value: Any) -> str:
    """85.2 for an accuracy of 0.852."""
    if not math.isfinite(to_number(value)):
        return "not finite"
    return f"{100 * value:.1f}" if is_percentage(metric) else f"{value:.4g}"


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The folders of runs among `paths` and directly inside them.

    Raises:
        FunnelError: a path neither is a run's folder nor contains one.
    """
    folders = []
    for path in paths:
        found = [path] if (path / RUN_FILE).is_file() else sorted(record.parent for record in path.glob(f"*/{RUN_FILE}"))
        if not found:
            raise FunnelError(f"{path}: contains no run (expected a run.json in it or in one of its subfolders)")
        folders += found
    return list(dict.fromkeys(folder.resolve() for folder in folders))


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
        FunnelError: a file is missing or damaged, or the run has no evaluation yet.
    """
    record, best = read_json(folder / RUN_FILE), best_checkpoint(folder)
    if "objective" in (record.get("arguments") or {}):
        raise FunnelError(f"{folder}: a pretraining run; reports are about fine-tuning runs. Its losses are in metrics.jsonl")
    with os_errors(folder / LOG_FILE):
        lines = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    log = [line for line in map(_parse_log_line, lines) if line]
    if not any(line["split"] == "dev" for line in log):
        raise FunnelError(f"{folder}: no evaluation yet; wait for the run's first one")
    evaluation = read_json(best / EVALUATION_FILE) if (best / EVALUATION_FILE).is_file() else {}
    if "texts" in evaluation:
        evaluation["examples"] = evaluation.pop("texts")  # the name in version 0.1
    config = load_config(best)
    try:
        run = Run(folder, str(record["command"]), dict(record["settings"]), log, evaluation, config)
        run.summary()  # fails if any of the values above has the wrong type
    except FunnelError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        raise FunnelError(f"{folder}: files are damaged or from another version ({error_reason(error)})") from None
    return run


def _parse_log_line(line: str) -> dict[str, Any] | None:
    """None for the incomplete last line of a run that was killed."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and {"step", "split"} <= values.keys() else None


def group_by_settings(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups runs that differ only in their seed and fold. A second run with the same seed and fold starts a new group."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        settings = {name: value for name, value in run.settings.items() if name not in SEED_DEPENDENT}
        settings["fold"] = str(settings.get("fold") or "").partition("/")[2]  # the number of folds
        key = json.dumps(settings, sort_keys=True)
        for copy in itertools.count():
            group = groups.setdefault((key, copy), [])
            if all(other.repetition != run.repetition for other in group):
                group.append(run)
                break
    return list(groups.values())


def count_repetitions(group: Sequence[Run]) -> str:
    """The number of seeds of a group and of folds, if there are any: "3", "5 folds", "3 x 5 folds"."""
    seeds, folds = (len({run.repetition[i] for run in group}) for i in (0, 1))
    if group[0].repetition[1] is None:
        return str(seeds)
    return plural(folds, "fold") if seeds == 1 else f"{seeds} x {plural(folds, 'fold')}"

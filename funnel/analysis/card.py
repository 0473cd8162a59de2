"""Model cards: what a run's model is, how it was trained, how good it is and how to use it (template: card.md).

A card is Markdown after a YAML header, as the Hugging Face Hub reads it. It contains no paths of the machine that the model was
trained on. What a run does not know, such as a license, is marked for the author to fill in.
"""

import math
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from funnel.analysis.report import short_command
from funnel.analysis.runs import Run, format_score, to_number, with_unit
from funnel.data.tasks import CUSTOM, TASKS
from funnel.errors import FunnelError, error_reason, requires_extra
from funnel.inference.predictor import run_record
from funnel.io import read_json
from funnel.model.checkpoint import CONFIG, Checkpoint, best_checkpoint, read_architecture
from funnel.model.flops import total_flops
from funnel.options import RANDOM, TINY
from funnel.problems.base import Problem
from funnel.problems.metrics import LOSS
from funnel.problems.registry import problem_of
from funnel.weights.export import check_transformers
from funnel.weights.load import read_source_config, resolve

REPO_ID = "OWNER/NAME"  # stands for the id of the repository
MAX_LABELS = 40
PATH_OPTIONS = frozenset("data dev out weights teacher layout-plan".split())  # whose values are, or may be, local paths
DEMO_TITLE = "sentence polarity dataset (Pang and Lee 2005)"


class Use(NamedTuple):
    """How a kind of model is used: the task's name on the hub, transformers' model class, our predictor."""

    task: str
    auto_class: str
    predictor: str


TEXT_USE = Use("text-classification", "AutoModelForSequenceClassification", "Classifier")
USES = {  # by kind of problem
    "classification": TEXT_USE,
    "regression": TEXT_USE,
    "multi-label": TEXT_USE,
    "token-labels": Use("token-classification", "AutoModelForTokenClassification", "TokenClassifier"),
    "answer-spans": Use("question-answering", "AutoModelForQuestionAnswering", "QuestionAnswerer"),
    "multiple-choice": Use("multiple-choice", "AutoModelForMultipleChoice", "MultipleChoice"),
}
# The data of published tasks on the hub. All of it is English.
GLUE = "nyu-mll/glue"
DATASETS = {
    **dict.fromkeys(("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"), GLUE),
    "demo": "cornell-movie-review-data/rotten_tomatoes",
    "imdb": "stanfordnlp/imdb",
    "ag": "fancyzhx/ag_news",
    "dbpedia": "fancyzhx/dbpedia_14",
    "yelp2": "fancyzhx/yelp_polarity",
    "yelp5": "Yelp/yelp_review_full",
    "amazon2": "fancyzhx/amazon_polarity",
    "race": "ehovy/race",
    "squad": "rajpurkar/squad",
    "squad2": "rajpurkar/squad_v2",
    "wnut17": "leondz/wnut_17",
}
BASE_OF_TINY = "sentence-transformers/all-MiniLM-L6-v2"
METRIC_TYPES = {  # words in the names of metrics -> the hub's ids
    "accuracy": "accuracy",
    "f1": "f1",
    "precision": "precision",
    "recall": "recall",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "exact": "exact_match",
}


class Score(NamedTuple):
    """A metric on one set of examples: names, the value of the best checkpoint, its formatted value and that of the last."""

    split: str
    metric: str
    value: float
    best: str
    last: str


@dataclass(frozen=True)
class Card:
    """What the template needs.

    Attributes:
        run: the run.
        problem: what its best checkpoint solves.
        not_in_transformers: why transformers cannot load the model; "" if it can.
    """

    run: Run
    problem: Problem
    not_in_transformers: str

    @property
    def use(self) -> Use:
        """How the model is used."""
        return USES[self.problem.name]

    @property
    def is_own_data(self) -> bool:
        return bool(self.run.settings["task"] == CUSTOM)

    @property
    def title(self) -> str:
        """The name of the data."""
        if self.run.task == "demo":
            return DEMO_TITLE
        return self.run.task or "own data" if self.is_own_data else TASKS[self.run.task].title

    @property
    def starts_random(self) -> bool:
        return bool(self.run.settings["weights"] == RANDOM)

    @property
    def starts_tiny(self) -> bool:
        return bool(self.run.settings["weights"] == TINY)

    @property
    def base_model(self) -> str:
        """The hub id of the weights that training started from; "" if unknown or random."""
        weights = self._argument("weights")  # of a folder, the absolute path
        is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", weights, re.ASCII)
        return BASE_OF_TINY if self.starts_tiny else weights if is_id else ""

    def _argument(self, name: str) -> str:
        """An argument of the run, with absolute paths of files and folders; "" if it was not set."""
        return str(run_record(self.run.folder, "arguments").get(name) or "")

    @property
    def source_cost(self) -> tuple[str, float] | None:
        """The layout of the weights that training started from, and our FLOPs relative to that layout's.

        None if it is the same, or if the weights are not on this machine.
        """
        weights = self._argument("weights")
        if weights != TINY and not os.path.isdir(weights):
            return None
        try:
            layout = read_source_config(resolve(weights)).layout
            flops = total_flops(self.run.config.replace(blocks=layout), self.run.length, self.run.settings["batch_size"])
        except FunnelError:
            return None
        return None if layout == self.run.config.layout else (layout, self.run.flops / flops)

    @property
    def evaluation_set(self) -> str:
        """What the model was evaluated on."""
        if dev := self._argument("dev"):
            return f"the file {as_code(Path(dev).name)}"
        if self.is_own_data:
            is_file = Path(str(self.run.settings["data"])).suffix
            return "held out from the same file" if is_file else "the folder's own"
        if self.run.task == "demo":
            return "every tenth sentence of each class"
        return f"the official {self.split_name('dev')} set"

    def split_name(self, split: str) -> str:
        """The name of a set of examples on the hub; some published tasks are evaluated on their test set."""
        file = None if self.is_own_data else TASKS[self.run.task].files.get(split)
        if getattr(getattr(file, "path", None), "stem", "") == "test":
            return "test"
        return split.replace("dev", "validation")

    @property
    def scores(self) -> list[Score]:
        """All metrics on all evaluated sets."""
        return list(self._scores())

    def _scores(self) -> Iterator[Score]:
        for split in dict.fromkeys(line["split"] for line in self.run.log if line["split"] != "train"):
            lines = [line for line in self.run.log if line["split"] == split]
            best = next((line for line in lines if line["step"] == self.run.best["step"]), {})
            for metric in self.run.metrics:
                value = to_number(best.get(metric))
                yield Score(split, metric, value, *(format_score(metric, line.get(metric)) for line in (best, lines[-1])))

    @property
    def hyperparameters(self) -> list[tuple[str, str]]:
        """Names and values of the settings of the training, without those that have no effect."""
        settings, run = self.run.settings, self.run
        epochs = settings.get("epochs")
        warmup = settings.get("warmup")
        rows = [
            ("steps" if epochs is None else "epochs", f"{settings['steps']:,}" if epochs is None else f"{epochs:g}"),
            ("batch size", f"{settings['batch_size']:,}"),
            (
                "learning rate",
                f"{settings['lr']:g}, linear decay" + (f", warmup over {warmup:.0%} of the steps" if warmup else ""),
            ),
            ("optimizer", f"AdamW, weight decay {settings['weight_decay']:g}, gradients clipped to norm 1"),
            ("dropout", f"{run.config.hidden_dropout:g}, attention {run.config.attention_dropout:g}"),
            ("matrix products", str(settings["dtype"])),
            ("seed", str(settings["seed"])),
        ]
        if not self.starts_random:
            plan = settings.get("layout_plan")
            kind = f"as in {Path(plan).name}" if plan else f"{settings['init']} (the layers that the source does not have)"
            rows.append(("new layers", kind))
        optional = {"layer_lr_decay": 1.0, "label_smoothing": 0.0, "class_weights": None, "patience": None, "grad_accum": 1,
                    "freeze_embeddings": False, "freeze_layers": None}  # fmt: skip
        rows += [
            (name.replace("_", " "), str(settings[name])) for name, off in optional.items() if settings.get(name, off) != off
        ]
        if settings.get("teacher"):
            rows.append(("teacher", f"{Path(settings['teacher']).name}, weight {settings['teacher_weight']:g}"))
        if math.isfinite(run.seconds):
            rows.append(("time", f"{run.seconds / 60:.1f} minutes"))
        return rows

    @property
    def command(self) -> str:
        """The command that started the run, with names instead of local paths."""
        words, option = [], ""
        for word in shlex.split(short_command(self.run.command)):
            if word.startswith("--"):
                option, equals, value = word.partition("=")
                words.append(option + equals + self._without_folders(value, option))
            else:
                words.append(self._without_folders(word, option))
        return shlex.join(words)

    def _without_folders(self, value: str, option: str) -> str:
        is_path = option.lstrip("-") in PATH_OPTIONS or os.path.isabs(value) or value.startswith(("~", "./", "../"))
        return (Path(value).name or ".") if is_path and value != self.base_model else value

    @property
    def has_decoder(self) -> bool:
        """Whether tokens have outputs. transformers' depend on the padding (docs/from-transformers.md)."""
        return self.problem.model_class.has_decoder and len(self.run.config.blocks) > 1

    @property
    def padding(self) -> int:
        """The number of which transformers needs a padded length to be a multiple."""
        if self.run.config.family != "funnel":
            return 1
        return 2 ** (len(self.run.config.blocks) - self.has_decoder)

    @property
    def header(self) -> str:
        """The YAML header, with comments where something has to be filled in."""
        from huggingface_hub import EvalResult, ModelCardData

        run, task = self.run, self.use.task
        dataset = "" if self.is_own_data else DATASETS.get(run.task, "")
        results = [
            EvalResult(
                task_type=task,
                dataset_type=dataset or run.task,
                dataset_name=self.title,
                dataset_config=run.task if dataset == GLUE else None,
                dataset_split=self.split_name(score.split),
                metric_type=metric_type(score.metric),
                metric_name=score.metric,
                metric_value=round(score.value, 4),
            )
            for score in self.scores
            if math.isfinite(score.value)
        ]
        data = ModelCardData(
            license="unknown",
            language=None if self.is_own_data else "en",
            library_name=None if self.not_in_transformers else "transformers",
            pipeline_tag=task,
            tags=["funnel-transformer", self.problem.name],
            base_model=self.base_model or None,
            datasets=[dataset] if dataset else None,
            metrics=list(dict.fromkeys(metric_type(name) for name in run.metrics if name != LOSS)),
            model_name=run.name,
            eval_results=results or None,
        )
        lines = [f"{line}  # to fill in" if line.startswith("license:") else line for line in data.to_yaml().splitlines()]
        unknown = {"language: en": data.language, "datasets: OWNER/NAME": data.datasets}
        if not self.starts_random:
            unknown["base_model: OWNER/NAME"] = data.base_model
        return "\n".join([*lines, *(f"# {line}  # to fill in" for line, value in unknown.items() if not value)])


def render_card(run: Run) -> str:
    """The model card of a run.

    Raises:
        FunnelError: the extra `report` is not installed, or the run's files are damaged.
    """
    with requires_extra("report", "a model card"):
        import jinja2
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(code=as_code, cell=as_cell, unit=with_unit)
    architecture = read_architecture(read_json(best_checkpoint(run.folder) / CONFIG))
    problem = problem_of(architecture, run.config, str(run.folder))
    try:
        check_transformers(Checkpoint(run.config, {}, architecture))
        reason = ""
    except FunnelError as error:
        reason = str(error).split(";")[0]
    try:
        values = {"repo_id": REPO_ID, "max_labels": MAX_LABELS}
        return environment.get_template("card.md").render(card=Card(run, problem, reason), run=run, **values)
    except FunnelError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, jinja2.UndefinedError) as error:
        raise FunnelError(f"{run.folder}: files are damaged or from another version ({error_reason(error)})") from None


def metric_type(name: str) -> str:
    """The hub's id of a metric: "f1 (macro)" -> "f1"; the name itself if there is none."""
    return next((METRIC_TYPES[word] for word in re.findall(r"\w+", name) if word in METRIC_TYPES), name)


def as_code(text: Any) -> str:
    """Text as inline code in Markdown, also in a table."""
    flat = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", flat)), default=0))
    return f"{fence} {flat} {fence}" if len(fence) > 1 or not flat else f"`{flat}`"


def as_cell(text: Any) -> str:
    """Text in a table in Markdown."""
    return re.sub(r"([\\`*_|<\[])", r"\\\1", " ".join(str(text).split()))

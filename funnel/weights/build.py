"""Building a model for a task: pretrained or random weights, in the requested layout, with the head of the problem."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch

from funnel.data.dataset import Dataset
from funnel.data.tasks import Task
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, plural
from funnel.model.checkpoint import load_weights
from funnel.model.config import FunnelConfig, parse_blocks
from funnel.model.flops import check_memory, total_flops
from funnel.model.heads import FunnelForSequenceClassification, FunnelPreTrainedModel
from funnel.options import RANDOM, TINY, check_options, option
from funnel.problems.base import Problem
from funnel.problems.registry import PROBLEMS
from funnel.weights import surgery
from funnel.weights.load import OpenedSource, Source, open_source, resolve
from funnel.weights.surgery import INITS, KEEPS, NEW_DECODER_LAYERS, LayerPlan

# Labels with a small mean and a deviation near 1 are learned as they are: on STS-B (2.7 and 1.5), standardizing gave a Pearson
# correlation of 83.0 instead of 84.0 (MiniLM, 2,2,2, one seed).
MAX_RAW_MEAN, RAW_STDS = 3.0, (0.5, 2.0)
MAX_RECOMMENDED_SHARE = 0.95  # of the FLOPs; a layout that saves less is not worth recommending
CALIBRATION_TEXTS = 64  # from which the LayerNorms of identity layers are calibrated
MAX_RESCALING = 10  # of a regression head, in deviations; beyond it, the new labels are taken to be in another unit
# By `weights`; best of the rates tried on the demo task. The tasks' own rates are for pretrained models with more layers.
LEARNING_RATES = {RANDOM: 5e-4, TINY: 2e-4}
RANDOM_CONFIG = FunnelConfig(blocks=parse_blocks("2,2,2"), num_decoder_layers=0, d_model=128, n_head=4, d_head=32, d_inner=512)


@dataclass(frozen=True)
class WeightsArgs:
    """Options for the initial weights and the layout.

    Raises:
        FunnelError: `blocks` is not a layout, `init` or `keep` is unknown, or `layout_plan` is combined with a non-default
            `init` or `keep`.
    """

    weights: str | None = option(
        None,
        "checkpoint folder in any supported format, run folder, hub id, tiny for the small pretrained model in the package, "
        "or none for a small random model (default: funnel-transformer/small; for the demo task, tiny)",
        metavar="SOURCE",
    )
    blocks: str | None = option(
        None, "layers per block, such as 2,2,2,2 or 6,3x2,3x2 (default: the layout of the weights)", metavar="LAYOUT"
    )
    init: str = option("identity", "how to initialize layers that the weights do not have", choices=INITS)
    keep: str = option("spread", "which layers to keep if the weights have more", choices=KEEPS)
    layout_plan: Path | None = option(
        None, "JSON file with the origin of every layer, instead of init and keep", metavar="FILE"
    )
    decoder_layers: int | None = option(
        None,
        f"layers after upsampling, where tokens have outputs (default: those of the weights, or {NEW_DECODER_LAYERS})",
        metavar="N",
        bounds="[0, 999]",
    )
    escape_special_tokens: bool = option(False, "treat the names of special tokens in texts, such as [SEP], as ordinary text")

    def __post_init__(self) -> None:
        check_options(self)
        if self.blocks is not None:
            parse_blocks(self.blocks)
        if self.layout_plan is not None:
            for name, default in (("init", "identity"), ("keep", "spread")):
                if getattr(self, name) != default:
                    raise FunnelError(
                        f"{name} has no effect with a layout plan, which covers every layer; use only one of them", name
                    )

    def plan_layers(self, old: FunnelConfig, new: FunnelConfig) -> list[LayerPlan]:
        """The origin of every layer of the new layout: from the plan file, if there is one, otherwise from `init` and `keep`.

        Raises:
            FunnelError: as `surgery.read_plan` and `surgery.make_plan`.
        """
        if self.layout_plan is not None:
            return surgery.read_plan(self.layout_plan, old, new)
        return surgery.make_plan(old, new, self.init, self.keep)


class BuiltModel(NamedTuple):
    """A model that is ready for training.

    Attributes:
        model: on the CPU, in evaluation mode.
        tokenizer: the tokenizer of the weights.
        plan: the origin of every layer.
        origin: one-line description of the weights.
        has_new_head: whether the output layer is newly initialized, at least in part.
        note: advice about the layout; "" for none.
    """

    model: FunnelPreTrainedModel
    tokenizer: FunnelTokenizer
    plan: list[LayerPlan]
    origin: str
    has_new_head: bool = False
    note: str = ""

    def write_plan(self, folder: Path) -> None:
        """Writes the plan into a run folder."""
        surgery.write_plan(folder / "layout_plan.json", self.plan)

    def calibrate(self, dataset: Dataset) -> None:
        """Calibrates the LayerNorms of identity layers on the first texts of a dataset."""
        batch = dataset.batch(np.arange(min(CALIBRATION_TEXTS, len(dataset))))
        surgery.calibrate_layer_norms(self.model, self.plan, *(tensor.flatten(0, -2) for tensor in batch.inputs.values()))

    def standardize_labels(self, dataset: Dataset) -> None:
        """Sets a regression's `label_mean` and `label_std` to those of a dataset, or to 0 and 1 if these are small.

        A trained head is rescaled, so that it predicts the same scores; if the new labels are in another unit, it keeps its
        standardized scores instead.
        """
        config, labels = self.model.config, dataset.labels
        if config.problem_type != "regression":
            return
        mean, std = float(labels.mean(dtype=np.float64)), 1.0
        if (labels != labels[0]).any():  # else, rounding can give a tiny deviation
            std = float(labels.std(dtype=np.float64))
        if abs(mean) <= MAX_RAW_MEAN and RAW_STDS[0] <= std <= RAW_STDS[1]:
            mean, std = 0.0, 1.0
        scale, shift = config.label_std / std, (config.label_mean - mean) / std
        is_standardized = (config.label_mean, config.label_std) != (0, 1)  # else the outputs themselves have the labels' unit
        is_same_unit = 1 / MAX_RESCALING < scale < MAX_RESCALING and abs(shift) < MAX_RESCALING
        if not self.has_new_head and (is_same_unit or not is_standardized):
            head = cast(FunnelForSequenceClassification, self.model).classifier.linear_out
            with torch.no_grad():
                head.weight.mul_(scale)
                head.bias.mul_(scale).add_(shift)
        self.model.config = config.replace(label_mean=mean, label_std=std)


class RandomSource:
    """A small randomly initialized model in place of a checkpoint, with a tokenizer trained on the task's texts."""

    def __init__(self, task: Task, kind: type[Problem]) -> None:
        self.kind = kind
        self.tokenizer = FunnelTokenizer.train(task.files["train"].iter_texts())
        decoder = NEW_DECODER_LAYERS if kind.model_class.has_decoder else 0
        self.config = RANDOM_CONFIG.replace(vocab_size=self.tokenizer.vocab_size, num_decoder_layers=decoder)

    def load(self) -> Source:
        """Initializes the weights; uses PyTorch's global random number generator."""
        weights = self.kind.model_class(self.config).state_dict()
        # Published models initialize word embeddings with a standard deviation of 1 and train for a million steps. Adam
        # moves a weight by about the learning rate per step, so only small embeddings change enough in a thousand steps.
        weights["embeddings.word_embeddings.weight"] *= 0.02
        return Source("random", Path(), self.config, weights, self.kind.model_class.__name__, self.tokenizer)


def build_task_model(args: WeightsArgs, task: Task, max_length: int | None = None, bytes_per_weight: int = 4) -> BuiltModel:
    """Builds the model for a task from weights, in the requested layout.

    Everything that can be checked without the weights is checked before they are read.

    Args:
        args: `weights` must be set.
        task: its labels become the model's; if `weights` is "none", a tokenizer is trained on its training texts.
        max_length: the maximum number of tokens of a row, recorded in the config; default: the task's, or the number of
            position embeddings if this is less.
        bytes_per_weight: memory needed per weight: 4 for float32, 16 with gradient and AdamW's state.

    Raises:
        FunnelError: the weights cannot be found or read, the layout is invalid, `max_length` exceeds the weights' position
            embeddings, or the model does not fit into memory.
    """
    if args.weights is None:
        raise FunnelError("missing weights: expected a checkpoint folder, a hub id, or none", "weights")
    is_random = args.weights == RANDOM
    kind = PROBLEMS[task.problem]
    opened: OpenedSource | RandomSource = RandomSource(task, kind) if is_random else open_source(resolve(args.weights))
    config = task_config(opened.config, args, task)
    if max_length is None:
        max_length = config.limit_length(task.max_length)
    config = config.replace(model_max_length=max_length)
    if config.max_positions is not None and max_length > config.max_positions:
        raise FunnelError(
            f"max_length {max_length}: {args.weights} has position embeddings for only {config.max_positions} tokens; "
            f"expected at most {config.max_positions}",
            "max_length",
        )
    plan = args.plan_layers(opened.config, config)
    check_memory(config, bytes_per_weight)

    source = opened.load()
    tokenizer = source.require_tokenizer()
    if args.escape_special_tokens:
        tokenizer = tokenizer.escape_special_tokens()
    model = kind.model_class(config)
    weights, has_new_head, head = surgery.match_labels(source, model)
    weights, has_new_decoder = surgery.add_decoder(source, surgery.apply_plan(weights, plan, model.state_dict()), model)
    has_new_head |= bool(load_weights(model, weights, args.weights))

    kept = [row.source for row in plan if row.start == "keep"]
    num_new = len(plan) - len(kept)
    if is_random:
        origin = f"random weights ({plural(len(config.blocks), 'block')}, {plural(len(plan), 'layer')})"
    else:
        layers = f"blocks {source.config.layout}; {plural(len(kept), 'layer')} "
        is_shared = len(set(kept)) < len(kept)
        layers += f"copied from {plural(len(set(kept)), 'shared layer')}" if is_shared else "kept"
        if num_new:
            layers += f", {num_new} new: {args.layout_plan or args.init}"
        layers += ", new decoder" if has_new_decoder else ""
        head = head or (f"new {kind.head}" if has_new_head else f"{kind.head} of {args.weights}")
        origin = f"{args.weights} ({layers}), {head}"
    note = _pooling_note(config, max_length) if args.blocks is None else ""
    return BuiltModel(model.eval(), tokenizer, plan, origin, has_new_head or is_random, note)


def _pooling_note(config: FunnelConfig, length: int) -> str:
    """Recommends a layout for a model of one block, such as a BERT; "" if the model pools or is too small."""
    blocks = surgery.recommended_blocks(config)
    if blocks == config.blocks:
        return ""
    recommended = config.replace(blocks=blocks)
    share = total_flops(recommended, length) / total_flops(config, length)
    if share > MAX_RECOMMENDED_SHARE:
        return ""
    return (
        f"layout {config.layout} does not pool; blocks {recommended.layout} would use {share:.0%} of its FLOPs at {length} "
        "tokens (docs/layouts.md compares the accuracy)"
    )


def task_config(source: FunnelConfig, args: WeightsArgs, task: Task) -> FunnelConfig:
    """The config of a task's model: widths of the source, its layout unless `args.blocks` is set, the head of the problem.

    Raises:
        FunnelError: `decoder_layers` is set, but the model has no decoder.
    """
    kind = PROBLEMS[task.problem]
    config = surgery.relabel(source, dict(enumerate(kind.outputs(task))), kind.problem_type)
    if args.blocks is not None:
        config = config.replace(blocks=args.blocks)
    if args.decoder_layers is not None and not kind.model_class.has_decoder:
        raise FunnelError(f"decoder_layers has no effect for a {kind.title}, which reads [CLS]; omit it", "decoder_layers")
    layers = surgery.decoder_layers(config, args.decoder_layers) if kind.model_class.has_decoder else 0
    return config.replace(num_decoder_layers=layers, text_columns=tuple(map(str, task.text_columns)))

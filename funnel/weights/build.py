"""Building a classifier: pretrained or random weights, in the requested layout, with a head for the task."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from funnel.data.dataset import Dataset
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, plural
from funnel.model.checkpoint import load_weights
from funnel.model.config import FunnelConfig, parse_blocks
from funnel.model.flops import check_memory
from funnel.model.heads import FunnelForSequenceClassification
from funnel.options import check_options, option
from funnel.weights import surgery
from funnel.weights.load import OpenedSource, Source, open_source, resolve
from funnel.weights.surgery import INITS, KEEPS, LayerPlan

RANDOM = "none"  # the value of `weights` for random weights
DEMO_CONFIG = FunnelConfig(blocks=parse_blocks("2,2,2"), num_decoder_layers=0, d_model=128, n_head=4, d_head=32, d_inner=512)


@dataclass(frozen=True)
class WeightsArgs:
    """Options for the initial weights and the layout.

    Raises:
        FunnelError: `blocks` is not a layout, or `layout_plan` is combined with a non-default `init` or `keep`.
    """

    weights: str | None = option(
        None,
        "checkpoint folder in any supported format, run folder, hub id, or none for a small random model "
        "(default: funnel-transformer/small; for the demo task, none)",
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


class BuiltModel(NamedTuple):
    """A classifier that is ready for training.

    Attributes:
        model: on the CPU, in evaluation mode.
        tokenizer: the tokenizer of the weights.
        plan: the origin of every layer.
        origin: one-line description of the weights.
    """

    model: FunnelForSequenceClassification
    tokenizer: FunnelTokenizer
    plan: list[LayerPlan]
    origin: str

    def calibrate(self, dataset: Dataset, num_texts: int = 64) -> None:
        """Calibrates the LayerNorms of identity layers on the first texts of a dataset."""
        batch = dataset.batch(np.arange(min(num_texts, len(dataset))))
        surgery.calibrate_layer_norms(self.model, self.plan, batch.input_ids, batch.attention_mask, batch.token_type_ids)


class RandomSource:
    """A small randomly initialized model in place of a checkpoint, with a tokenizer trained on the given texts."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.tokenizer = FunnelTokenizer.train(texts)
        self.config = DEMO_CONFIG.replace(vocab_size=self.tokenizer.vocab_size)

    def load(self) -> Source:
        """Initializes the weights; uses PyTorch's global random number generator."""
        weights = FunnelForSequenceClassification(self.config).state_dict()
        # Published models initialize word embeddings with a standard deviation of 1 and train for a million steps. Adam
        # moves a weight by about the learning rate per step, so only small embeddings change enough in a thousand steps.
        weights["embeddings.word_embeddings.weight"] *= 0.02
        return Source("random", Path(), self.config, weights, FunnelForSequenceClassification.__name__, self.tokenizer)


def build_classifier(
    args: WeightsArgs, task_labels: list[str] | None, texts: Iterable[str] = (), bytes_per_weight: int = 4
) -> BuiltModel:
    """Builds a classifier from weights, in the requested layout.

    Everything that can be checked without the weights is checked before they are read.

    Args:
        args: `weights` must be set.
        task_labels: class names; None for regression.
        texts: texts to train a tokenizer on, if `weights` is "none".
        bytes_per_weight: memory needed per weight: 4 for float32, 16 with gradient and AdamW's state.

    Raises:
        FunnelError: the weights cannot be found or read, the layout is invalid, or the model does not fit into memory.
    """
    if args.weights is None:
        raise FunnelError("missing weights: expected a checkpoint folder, a hub id, or none", "weights")
    is_random = args.weights == RANDOM
    opened: OpenedSource | RandomSource = RandomSource(texts) if is_random else open_source(resolve(args.weights))
    config = classifier_config(opened.config, args.blocks, task_labels)
    if args.layout_plan is not None:
        plan = surgery.read_plan(args.layout_plan, opened.config, config)
    else:
        plan = surgery.make_plan(opened.config, config, args.init, args.keep)
    check_memory(config, bytes_per_weight)

    source = opened.load()
    tokenizer = source.require_tokenizer()
    model = FunnelForSequenceClassification(config)
    weights = surgery.apply_plan(source.weights, plan, model.state_dict())
    has_new_head = bool(load_weights(model, weights, args.weights))

    num_added = sum(row.start != "keep" for row in plan)
    origin = "random weights" if is_random else args.weights
    origin += f" (blocks {source.config.layout}; {plural(len(plan) - num_added, 'layer')} kept, {num_added} new: "
    origin += f"{args.layout_plan or args.init})" + (", new classifier" if has_new_head else "")
    return BuiltModel(model.eval(), tokenizer, plan, origin)


def classifier_config(source: FunnelConfig, blocks: str | None, task_labels: list[str] | None) -> FunnelConfig:
    """The config of a classifier with the widths of the source, its layout unless `blocks` is given, and no decoder."""
    return source.replace(
        blocks=source.blocks if blocks is None else parse_blocks(blocks),
        num_decoder_layers=0,
        id2label=dict(enumerate(["score"] if task_labels is None else task_labels)),
        problem_type="regression" if task_labels is None else "single_label_classification",
    )

"""A classifier to train: from weights that are there, in the layout that is wanted."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from funnel.weights import surgery
from funnel.model.checkpoint import load_weights
from funnel.model.config import FunnelConfig, parse_blocks
from funnel.weights.load import resolve, read_config, read_weights_from
from funnel.model.flops import check_memory
from funnel.data.dataset import Dataset
from funnel.model.heads import FunnelForSequenceClassification
from funnel.data.tokenizer import FunnelTokenizer

# What random weights start from, before the layout is changed: small enough to learn the demo task on a CPU.
SMALL = FunnelConfig(block_sizes=(2, 2, 2), num_decoder_layers=0, d_model=128, n_head=4, d_head=32, d_inner=512)


class Built(NamedTuple):
    """What `build_classifier` gives.

    Attributes:
        model: on the CPU, in evaluation mode.
        tokenizer: the one that belongs to the weights.
        plan: where each layer comes from.
        origin: that in a few words.
    """

    model: FunnelForSequenceClassification
    tokenizer: FunnelTokenizer
    plan: list[surgery.LayerPlan]
    origin: str

    def fit(self, dataset: Dataset, texts: int = 64) -> None:
        """Adjusts the LayerNorms of new layers to what the model computes on the first texts (`surgery.calibrate_layer_norms`)."""
        some = dataset.batch(torch.arange(min(texts, len(dataset))).numpy())
        surgery.calibrate_layer_norms(self.model, self.plan, some.input_ids, some.attention_mask, some.token_type_ids)


def build_classifier(
    weights: str,
    labels: list[str] | None,
    blocks: str | None = None,
    init: str = "identity",
    keep: str = "spread",
    plan_file: Path | None = None,
    texts: Iterable[str] = (),
    bytes_per_weight: int = 4,
) -> Built:
    """Reads weights and changes their layout.

    Args:
        weights: a folder or hub id, in any format that `convert_weights.py` reads; "none" draws a small model.
        labels: names of the classes; None for a regression.
        blocks: the layout, as in "2,2,2,2"; None for that of the weights.
        init, keep: as in `surgery.make_plan`.
        plan_file: a plan to follow instead.
        texts: what a tokenizer is trained on where the weights are "none".
        bytes_per_weight: memory that training will take for one.

    Raises:
        FunnelError: the weights cannot be had or read, or do not fit the layout, or the model is larger than the memory.
    """
    folder = None if weights == "none" else resolve(weights)
    if folder is None:
        tokenizer = FunnelTokenizer.train(texts)
        start = SMALL.replace(vocab_size=tokenizer.vocab_size)
    else:
        start = read_config(folder)
    sizes, repeats = (start.block_sizes, start.repeats) if blocks is None else parse_blocks(blocks)
    config = start.replace(
        block_sizes=sizes,
        block_repeats=repeats,
        num_decoder_layers=0,
        id2label=dict(enumerate(["score"] if labels is None else labels)),
        problem_type="regression" if labels is None else "single_label_classification",
    )
    plan = surgery.read_plan(plan_file, start, config) if plan_file else surgery.make_plan(start, config, init, keep)
    check_memory(config, bytes_per_weight)  # before weights are read, as all that is above

    if folder is None:
        old_weights, origin = FunnelForSequenceClassification(start).state_dict(), "random weights"
        # Published models draw word embeddings with a deviation of 1 and train for a million steps. Adam moves a weight
        # by about the learning rate a step, so in a thousand steps only small embeddings get anywhere.
        old_weights["embeddings.word_embeddings.weight"] *= 0.02
    else:
        source = read_weights_from(folder)
        tokenizer = FunnelTokenizer.load(folder).fitting(start.vocab_size, folder)
        old_weights, origin = source.weights, weights
    model = FunnelForSequenceClassification(config)
    fresh = load_weights(model, surgery.apply_plan(old_weights, plan, model.state_dict()), weights)
    added = sum(row.start != "keep" for row in plan)
    origin += f" (blocks {start.layout}; {len(plan) - added} layers kept, {added} new: {plan_file or init})"
    return Built(model.eval(), tokenizer, plan, origin + (", new classifier" if fresh else ""))

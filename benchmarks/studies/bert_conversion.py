"""Distance between a converted BERT and the original before training: compares the final [CLS] state on real texts.

    python -m benchmarks.studies.bert_conversion --data GLUE --source MINILM

Prints two Markdown tables.

1. |funnel - bert| / |bert|, where both are centered by subtracting their mean over texts.
2. Sensitivity to word order: two neighboring tokens of each text are swapped, and the change of [CLS] is compared with the
   change in BERT (mean cosine similarity, ratio of mean norms).

The layout with all layers in one block is the whole BERT without pooling, so its row isolates the effect of positions.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from funnel.data.dataset import Batch, Dataset, encode_examples
from funnel.data.tasks import get_task, locate_files
from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.heads import FunnelBaseModel
from funnel.weights.load import read_source_config

LAYOUTS = ("6", "5,1", "4,2", "3,3", "3,2,1", "2,2,2")
BATCH_SIZE = 32
ClsFunction = Callable[..., Tensor]  # input_ids, attention_mask, token_type_ids -> [b, d]


class ClsStates(NamedTuple):
    """[CLS] of some texts, and its change when two tokens are swapped; [texts, d] each."""

    states: Tensor
    changes: Tensor


def bert_cls(bert: Any, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
    """BERT's [CLS] after the last layer, [b, d]."""
    bert_types = token_type_ids.masked_fill(token_type_ids == 2, 0)  # BERT has no separate type for [CLS]
    states: Tensor = bert(input_ids, attention_mask, bert_types).last_hidden_state
    return states[:, 0]


def funnel_cls(model: FunnelBaseModel, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
    """Funnel's [CLS] after the last layer, [b, d]."""
    states, _ = model.encode(input_ids, attention_mask, token_type_ids)
    return states[-1][:, 0]


@torch.no_grad()
def cls_states(batches: list[Batch], cls_function: ClsFunction) -> ClsStates:
    """Runs a model on texts as they are, and with two tokens swapped; all models get the same swaps."""
    generator = torch.Generator().manual_seed(0)
    states = torch.cat([cls_function(**batch.inputs) for batch in batches])
    swapped = torch.cat([cls_function(**{**batch.inputs, "input_ids": swap_tokens(batch, generator)}) for batch in batches])
    return ClsStates(states, swapped - states)


def swap_tokens(batch: Batch, generator: torch.Generator) -> Tensor:
    """Swaps two different neighboring tokens in the first text of each row, where it has such tokens. [b, l]."""
    ids = batch.input_ids.clone()
    is_first_text = (batch.token_type_ids == 0) & batch.attention_mask.bool()  # [CLS] has type 2; the last one is [SEP]
    for row, sep in enumerate(is_first_text.sum(1).tolist()):
        candidates = (ids[row, 1 : sep - 1] != ids[row, 2:sep]).nonzero()[:, 0] + 1
        if len(candidates):
            i = int(candidates[torch.randint(len(candidates), (1,), generator=generator)])
            ids[row, [i, i + 1]] = ids[row, [i + 1, i]]
    return ids


def distance(funnel: ClsStates, bert: ClsStates) -> str:
    """The table cell of the distance of the states."""
    centered = bert.states - bert.states.mean(0)
    difference = funnel.states - funnel.states.mean(0) - centered
    return f"{float(difference.norm() / centered.norm()):.2f}"


def order_effect(funnel: ClsStates, bert: ClsStates) -> str:
    """The table cell that compares the changes caused by swaps: cosine similarity, ratio of norms."""
    has_changed = bert.changes.norm(dim=1) > 0
    cosine = torch.cosine_similarity(funnel.changes[has_changed], bert.changes[has_changed], dim=1).mean()
    ratio = funnel.changes.norm(dim=1).mean() / bert.changes.norm(dim=1).mean()
    return f"{float(cosine):.2f}, {float(ratio):.2f}"


def load_dev_set(task_name: str, data: Path, tokenizer: FunnelTokenizer, num_texts: int) -> Dataset:
    """The first texts of a task's dev set."""
    task = locate_files(get_task(task_name), data)
    dataset = encode_examples(task.files["dev"], task.label_ids, tokenizer, task.max_length)
    return dataset.subset(np.arange(min(num_texts, len(dataset))))


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder per task, such as CoLA and SST-2")
    parser.add_argument("--source", type=Path, required=True, help="folder of a BERT in transformers' format")
    parser.add_argument("--tasks", nargs="+", default=["cola", "sst2", "stsb", "rte"])
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    parser.add_argument("--texts", type=int, default=256, help="number of dev texts per task (default: %(default)s)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    bert = transformers.BertModel.from_pretrained(args.source, add_pooling_layer=False).eval()
    tokenizer = FunnelTokenizer.load(args.source)
    dev_sets = {name: load_dev_set(name, args.data, tokenizer, args.texts) for name in args.tasks}
    batches = {
        name: [dataset.batch(rows) for rows in np.split(np.arange(len(dataset)), range(BATCH_SIZE, len(dataset), BATCH_SIZE))]
        for name, dataset in dev_sets.items()
    }
    bert_states = {name: cls_states(batches[name], partial(bert_cls, bert)) for name in args.tasks}

    print(f"default layout after conversion: {read_source_config(args.source).layout}\n")
    columns = [f"{name} ({dataset.lengths.mean():.0f} tokens)" for name, dataset in dev_sets.items()]
    header = f"| layout | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|"
    print(header)
    order_rows = []
    for blocks in args.layouts:
        model = FunnelBaseModel.from_pretrained(args.source, blocks=blocks)
        states = {name: cls_states(batches[name], partial(funnel_cls, model)) for name in args.tasks}
        pairs = [(states[name], bert_states[name]) for name in args.tasks]
        print(f"| {blocks} | {' | '.join(distance(*pair) for pair in pairs)} |", flush=True)
        order_rows.append(f"| {blocks} | {' | '.join(order_effect(*pair) for pair in pairs)} |")
    print("", header, *order_rows, sep="\n")


if __name__ == "__main__":
    main()

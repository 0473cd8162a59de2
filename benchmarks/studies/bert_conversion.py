"""What pooling costs a BERT before training: compares the final [CLS] state of layouts with the original's on real texts.

    python -m benchmarks.studies.bert_conversion --data GLUE --source MINILM
    python -m benchmarks.studies.bert_conversion --data GLUE --source MINILM --models runs/distilled     # after distillation

Prints three Markdown tables.

1. |funnel - bert| / |bert|, where both are centered by subtracting their mean over texts.
2. Sensitivity to word order: two neighboring tokens of each text are swapped, and the change of [CLS] is compared with the
   change in BERT (mean cosine similarity, ratio of mean norms).
3. Token states: the upsampled last block plus block 0, which a new decoder passes on normalized, compared with BERT's last
   states, both centered by subtracting their mean over all tokens (mean cosine similarity).

The source is any BERT-like model. As one block it computes the same function as in transformers
(tests/weights/test_bert_family.py), so this is the BERT that the layouts are compared with. All layouts keep its position
embeddings: every difference is due to pooling.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from funnel.data.batches import Batch
from funnel.data.dataset import Dataset
from funnel.data.tasks import get_task, locate_files
from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.heads import FunnelBaseModel, FunnelModel
from funnel.problems.registry import encode_split

LAYOUTS = ("5,1", "4,2", "3,3", "3,2,1", "2,2,2")  # of the six layers of MiniLM
BATCH_SIZE = 32


class ClsStates(NamedTuple):
    """[CLS] of some texts, and its change when two tokens are swapped; [texts, d] each."""

    states: Tensor
    changes: Tensor


@torch.no_grad()
def cls_states(batches: list[Batch], model: FunnelBaseModel) -> ClsStates:
    """Runs a model on texts as they are, and with two tokens swapped; all models get the same swaps."""
    generator = torch.Generator().manual_seed(0)
    states = torch.cat([model(**batch.inputs)[:, 0] for batch in batches])
    swapped = [model(**{**batch.inputs, "input_ids": swap_tokens(batch, generator)})[:, 0] for batch in batches]
    return ClsStates(states, torch.cat(swapped) - states)


@torch.no_grad()
def token_states(batches: list[Batch], model: FunnelModel) -> Tensor:
    """The states of all tokens that are not padding, [tokens, d]."""
    return torch.cat([model(**batch.inputs)[batch.attention_mask != 0] for batch in batches])


def swap_tokens(batch: Batch, generator: torch.Generator) -> Tensor:
    """Swaps two different neighboring tokens in the first text of each row, where it has such tokens. [b, l]."""
    ids = batch.input_ids.clone()
    last_token = batch.input_ids.gather(1, batch.attention_mask.sum(1, keepdim=True) - 1)  # [b, 1], the separator
    for row, sep in enumerate((ids == last_token).int().argmax(1).tolist()):  # position of the first separator
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


def token_similarity(funnel: Tensor, bert: Tensor) -> str:
    """The table cell that compares the states of tokens."""
    return f"{float(torch.cosine_similarity(funnel - funnel.mean(0), bert - bert.mean(0), dim=1).mean()):.2f}"


def load_dev_set(task_name: str, data: Path, tokenizer: FunnelTokenizer, num_texts: int) -> Dataset:
    """The first texts of a task's dev set."""
    task = locate_files(get_task(task_name), data)
    dataset = encode_split(task, "dev", tokenizer, task.max_length)
    return dataset.subset(np.arange(min(num_texts, len(dataset))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder per task, such as CoLA and SST-2")
    parser.add_argument("--source", type=Path, required=True, help="folder of a BERT-like model in transformers' format")
    parser.add_argument("--tasks", nargs="+", default=["cola", "sst2", "stsb", "rte"])
    parser.add_argument("--layouts", nargs="*", default=LAYOUTS)
    parser.add_argument("--models", nargs="*", default=[], metavar="FOLDER", help="models that were trained from the source")
    parser.add_argument("--texts", type=int, default=256, help="number of dev texts per task (default: %(default)s)")
    args = parser.parse_args()
    tokenizer = FunnelTokenizer.load(args.source)
    dev_sets = {name: load_dev_set(name, args.data, tokenizer, args.texts) for name in args.tasks}
    batches = {
        name: [dataset.batch(rows) for rows in np.split(np.arange(len(dataset)), range(BATCH_SIZE, len(dataset), BATCH_SIZE))]
        for name, dataset in dev_sets.items()
    }
    bert = FunnelBaseModel.from_pretrained(args.source)
    bert_states = {name: cls_states(batches[name], bert) for name in args.tasks}
    bert_tokens = {name: token_states(batches[name], FunnelModel.from_pretrained(args.source)) for name in args.tasks}

    print(f"BERT: blocks {bert.config.layout}\n")
    columns = [f"{name} ({dataset.lengths.mean():.0f} tokens)" for name, dataset in dev_sets.items()]
    header = f"| layout | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|"
    print(header)
    order_rows, token_rows = [], []
    rows = [(blocks, args.source, blocks) for blocks in args.layouts] + [(Path(path).name, path, None) for path in args.models]
    for name, folder, blocks in rows:
        model = FunnelBaseModel.from_pretrained(folder, blocks=blocks)
        pairs = [(cls_states(batches[task], model), bert_states[task]) for task in args.tasks]
        print(f"| {name} | {' | '.join(distance(*pair) for pair in pairs)} |", flush=True)
        order_rows.append(f"| {name} | {' | '.join(order_effect(*pair) for pair in pairs)} |")
        with_upsampling = FunnelModel.from_pretrained(folder, blocks=blocks)
        cells = [token_similarity(token_states(batches[task], with_upsampling), bert_tokens[task]) for task in args.tasks]
        token_rows.append(f"| {name} | {' | '.join(cells)} |")
    print("", header, *order_rows, "", header, *token_rows, sep="\n")


if __name__ == "__main__":
    main()

"""How near a converted BERT is to the BERT that it was, before any training: [cls] of the last layer, on real texts.

    python -m benchmarks.conversion --data GLUE --source MINILM

Prints two Markdown tables. The first has |ours - theirs| / |theirs|, both without their mean over texts, since what all texts
have in common tells none apart. The second tells whether word order means the same: two neighbouring tokens of every text
are swapped, and the change of [cls] is compared with BERT's: the mean cosine, and the ratio of their mean lengths. "6" is the
whole BERT without pooling: what lacks there is due to its positions alone.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from funnel.data.dataset import Batch, encode
from funnel.data.tasks import get_task, locate_files
from funnel.model.heads import FunnelForSequenceClassification
from funnel.weights.build import build_classifier
from funnel.weights.load import read_config


def swapped(batch: Batch, generator: torch.Generator) -> Batch:
    """The batch with two neighbouring tokens of the first text of each row swapped, where it has two that differ."""
    ids = batch.input_ids.clone()
    firsts = (batch.token_type_ids == 0) & batch.attention_mask.bool()  # behind [cls]; the last one is [sep]
    for row, sep in enumerate(firsts.sum(1).tolist()):
        differ = (ids[row, 1 : sep - 1] != ids[row, 2:sep]).nonzero()[:, 0] + 1
        if len(differ):
            i = int(differ[torch.randint(len(differ), (1,), generator=generator)])
            ids[row, i], ids[row, i + 1] = batch.input_ids[row, i + 1], batch.input_ids[row, i]
    return batch._replace(input_ids=ids)


@torch.no_grad()
def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder a task, as CoLA and SST-2")
    parser.add_argument("--source", type=Path, required=True, help="folder of a BERT as transformers saves it")
    parser.add_argument("--tasks", nargs="+", default=["cola", "sst2", "stsb", "rte"])
    parser.add_argument("--layouts", nargs="+", default=["6", "5,1", "4,2", "3,3", "3,2,1", "2,2,2"])
    parser.add_argument("--texts", type=int, default=256, help="of each task's dev set (default: %(default)s)")
    args = parser.parse_args()
    bert = transformers.BertModel.from_pretrained(args.source, add_pooling_layer=False).eval()

    def of_bert(part: Batch) -> Tensor:
        types = part.token_type_ids * (part.token_type_ids == 1)  # BERT has no type of its own for [cls]
        states: Tensor = bert(part.input_ids, part.attention_mask, types).last_hidden_state
        return states[:, 0]

    def of_ours(model: FunnelForSequenceClassification, part: Batch) -> Tensor:
        states, _ = model.encode(part.input_ids, part.attention_mask, part.token_type_ids)
        return states[-1][:, 0]

    def both(parts: list[Batch], cls_of: Callable[[Batch], Tensor]) -> tuple[Tensor, Tensor]:
        """[cls] of the texts, and its change where tokens are swapped. [texts, d] each."""
        generator = torch.Generator().manual_seed(0)
        plain = torch.cat([cls_of(part) for part in parts])
        return plain, torch.cat([cls_of(swapped(part, generator)) for part in parts]) - plain

    batches, expected, heads = [], [], []
    tokenizer = build_classifier(str(args.source), ["no", "yes"], "1").tokenizer
    for name in args.tasks:
        task = locate_files(get_task(name), args.data)
        dataset = encode(task.files["dev"], task.label_ids, tokenizer, task.max_length)
        parts = [dataset.batch(index) for index in torch.arange(min(args.texts, len(dataset))).split(32)]
        batches.append(parts)
        expected.append(both(parts, of_bert))
        heads.append(f"{name} ({dataset.lengths[: args.texts].mean():.0f} tokens)")
    print(f"{read_config(args.source).layout} is what conversion makes of it\n")
    head = f"| layout | {' | '.join(heads)} |\n|---{'|---' * len(heads)}|"
    print(head)
    orders = [head]
    for blocks in args.layouts:
        model = build_classifier(str(args.source), ["no", "yes"], blocks).model
        near, order = [], []
        for parts, (theirs, their_change) in zip(batches, expected, strict=True):
            ours, change = both(parts, partial(of_ours, model))
            theirs, moved = theirs - theirs.mean(0), their_change.norm(dim=1) > 0
            near.append(f"{float((ours - ours.mean(0) - theirs).norm() / theirs.norm()):.2f}")
            cosine = torch.cosine_similarity(change[moved], their_change[moved], dim=1).mean()
            order.append(f"{float(cosine):.2f}, {float(change.norm(dim=1).mean() / their_change.norm(dim=1).mean()):.2f}")
        print(f"| {blocks} | {' | '.join(near)} |", flush=True)
        orders.append(f"| {blocks} | {' | '.join(order)} |")
    print("", *orders, sep="\n")


if __name__ == "__main__":
    main()

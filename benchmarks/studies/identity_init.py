"""How near a model of another layout is to its source before any training: [cls] of the last layer, on real texts.

    python -m benchmarks.preservation --data GLUE/SST-2 --weights weights/minilm

Prints a Markdown table: the mean over texts of |new - old| / |old|, and of the cosine of the two.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from funnel.data.dataset import encode
from funnel.data.tasks import get_task, locate_files
from funnel.weights.build import build_classifier

LAYOUTS = ("3,3,3", "4,4,4", "2,2,2,2", "2,2,2,2,2,2,2", "4,4,4,4,4,4,4", "3,3", "1,1,1,1,1,1", "1,1,1", "2,2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", default="funnel-transformer/small")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    parser.add_argument("--texts", type=int, default=200)
    args = parser.parse_args()
    task = locate_files(get_task(args.task), args.data)

    @torch.no_grad()
    def cls_of(blocks: str | None, init: str) -> Tensor:
        """[texts, d]"""
        built = build_classifier(args.weights, list(task.labels or ()), blocks, init)
        data = encode(task.files["dev"], task.label_ids, built.tokenizer, task.max_length)
        built.fit(data)
        shown = data.batch(np.arange(args.texts))
        states, _ = built.model.eval().encode(shown.input_ids, shown.attention_mask, shown.token_type_ids, cls_only=True)
        return states[-1][:, 0]

    old = cls_of(None, "identity")
    print("| layout | identity: distance | cosine | copy: distance | cosine |\n|---|---|---|---|---|")
    for blocks in args.layouts:
        cells = []
        for init in ("identity", "copy"):
            new = cls_of(blocks, init)
            distance = ((new - old).norm(dim=1) / old.norm(dim=1)).mean()
            cells += [f"{distance:.3f}", f"{torch.cosine_similarity(new, old).mean():.4f}"]
        print(f"| {blocks} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

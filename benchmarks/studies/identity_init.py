"""Distance between a new layout and its source before training: compares the final [CLS] state on real texts.

    python -m benchmarks.studies.identity_init --data GLUE/SST-2 --weights MINILM --base 2,2,2

With --base, the weights are first converted to this layout. Prints a Markdown table for the inits "identity" and "copy": the
mean over texts of |new - old| / |old|, and of the cosine.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from funnel.data.tasks import Task
from funnel.model.heads import FunnelBaseModel
from funnel.problems.registry import encode_split
from funnel.problems.task_args import TaskArgs, load_task
from funnel.weights.build import WeightsArgs, build_task_model
from funnel.weights.load import read_source, resolve

LAYOUTS = ("3,3,3", "4,4,4", "2,2,2,2", "2,2,2,2,2,2,2", "4,4,4,4,4,4,4", "3,3", "1,1,1,1,1,1", "1,1,1", "2,2")


@torch.no_grad()
def cls_states(weights: WeightsArgs, task: Task, num_texts: int) -> Tensor:
    """[CLS] of the first dev texts after the last layer, [num_texts, d]."""
    built = build_task_model(weights, task, task.max_length)
    dataset = encode_split(task, "dev", built.tokenizer, task.max_length)
    built.calibrate(dataset)
    batch = dataset.batch(np.arange(num_texts))
    states, _ = built.model.encode(**batch.inputs, cls_only=True)
    return states[-1][:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", type=Path, help="folder with the task's files (default: download them)")
    parser.add_argument("--weights", default="funnel-transformer/small", help="hub id or folder (default: %(default)s)")
    parser.add_argument("--base", metavar="LAYOUT", help="layout of the source (default: that of the weights)")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    parser.add_argument("--texts", type=int, default=200, help="number of dev texts (default: %(default)s)")
    args = parser.parse_args()
    task = load_task(TaskArgs(args.task, args.data))
    with tempfile.TemporaryDirectory() as folder:
        if args.base is not None:
            FunnelBaseModel.from_pretrained(args.weights, blocks=args.base).save_pretrained(folder)
            read_source(resolve(args.weights)).require_tokenizer().save(folder)
        print_table(args, folder if args.base is not None else args.weights, task)


def print_table(args: argparse.Namespace, weights: str, task: Task) -> None:
    """Prints the distances of all layouts from the weights' own layout."""
    source = cls_states(WeightsArgs(weights), task, args.texts)
    print("| layout | identity: distance | cosine | copy: distance | cosine |\n|---|---|---|---|---|")
    for blocks in args.layouts:
        cells = []
        for init in ("identity", "copy"):
            new = cls_states(WeightsArgs(weights, blocks, init), task, args.texts)
            distance = ((new - source).norm(dim=1) / source.norm(dim=1)).mean()
            cells += [f"{distance:.3f}", f"{torch.cosine_similarity(new, source).mean():.4f}"]
        print(f"| {blocks} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""How near a converted BERT is to the BERT that it was, before any training: [cls] of the last layer, on real texts.

    python -m benchmarks.conversion --data GLUE --source MINILM

Prints a Markdown table: |ours - theirs| / |theirs|, both without their mean over texts, since what all texts have in common
tells none apart. "6" is the whole BERT without pooling: what lacks there is due to its positions alone.
"""

import argparse
from pathlib import Path

import torch

from funnel.build import build_classifier
from funnel.convert import read_config
from funnel.data import encode
from funnel.tasks import get_task, locate


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
    batches, expected, tokens = [], [], []
    tokenizer = build_classifier(str(args.source), ["no", "yes"], "1").tokenizer
    for name in args.tasks:
        task = locate(get_task(name), args.data)
        dataset = encode(task.files["dev"], task.label_ids, tokenizer, task.max_length)
        parts = [dataset.batch(index) for index in torch.arange(min(args.texts, len(dataset))).split(32)]
        batches.append(parts)
        tokens.append(float(dataset.lengths[: args.texts].mean()))
        types = [part.token_type_ids * (part.token_type_ids == 1) for part in parts]  # BERT has no type of its own for [cls]
        outputs = [bert(p.input_ids, p.attention_mask, t).last_hidden_state[:, 0] for p, t in zip(parts, types, strict=True)]
        expected.append(torch.cat(outputs))
    heads = [f"{name} ({mean:.0f} tokens)" for name, mean in zip(args.tasks, tokens, strict=True)]
    print(f"{read_config(args.source).layout} is what conversion makes of it\n")
    print(f"| layout | {' | '.join(heads)} |\n|---{'|---' * len(heads)}|")
    for blocks in args.layouts:
        model = build_classifier(str(args.source), ["no", "yes"], blocks).model
        cells = []
        for parts, theirs in zip(batches, expected, strict=True):
            states = [model.encode(p.input_ids, p.attention_mask, p.token_type_ids)[0][-1][:, 0] for p in parts]
            ours = torch.cat(states)
            theirs = theirs - theirs.mean(0)
            cells.append(f"{float((ours - ours.mean(0) - theirs).norm() / theirs.norm()):.2f}")
        print(f"| {blocks} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

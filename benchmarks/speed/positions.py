"""Training rate of absolute positions, of relative positions, and of transformers' BERT.

    pip install -c constraints.txt -e '.[bench]'
    python -m benchmarks.speed.positions --weights weights/minilm

The models have the sizes of a model of the BERT family and random weights. "absolute" is the converted model: ordinary
attention, position embeddings at the input. "relative" has Funnel's relative attention instead, in the same layout.
transformers' classifier has as many layers as the layout, without pooling, with each of its attention implementations.

A step is forward, backward, clipping and AdamW, with dropout, on texts without padding. All models of a row run alternately
in one process on the same batch; funnel with train.py's memory setting, transformers with the C library's defaults unless
--same-memory is given. Prints a Markdown table of examples per second, from median times, and of ratios, the median over the
rounds. Ratios above 1 mean that absolute positions are faster.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.speed.measure import Measurement, alternate, device_name, timer
from benchmarks.speed.models import Logits, Trainer, logits_function, random_batch
from funnel.data.batches import Batch, text_batch
from funnel.model.config import FunnelConfig
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training.device import choose_device
from funnel.weights.load import read_source_config, resolve

LAYOUTS = ("6", "4,2", "2,2,2")
SHAPES = ((32, 32), (32, 128), (8, 512))
ABSOLUTE = "funnel, absolute"
RELATIVE = "funnel, relative"
IMPLEMENTATIONS = ("sdpa", "eager")  # of attention in transformers; sdpa is the default
SIDES = (ABSOLUTE, RELATIVE, *(f"transformers, {name}" for name in IMPLEMENTATIONS))


class Setting(NamedTuple):
    """A row of the table."""

    layout: str
    dtype: str
    shape: tuple[int, int]


def build_models(folder: Path, layout: str) -> dict[str, nn.Module]:
    """The models to compare, randomly initialized, by side."""
    import transformers

    config = read_source_config(folder).replace(blocks=layout, num_decoder_layers=0)
    relative = config.replace(
        relative_attention=True, distance_buckets=0, position_embeddings=0, position_offset=0, token_type_embeddings=0
    )
    models: dict[str, nn.Module] = {
        ABSOLUTE: FunnelForSequenceClassification(config),
        RELATIVE: FunnelForSequenceClassification(relative),
    }
    for name in IMPLEMENTATIONS:
        bert: Any = transformers.AutoConfig.from_pretrained(folder)  # the model keeps it and stores its implementation in it
        bert.num_hidden_layers = count_layers(config)
        model = transformers.AutoModelForSequenceClassification.from_config(bert, attn_implementation=name)
        models[f"transformers, {name}"] = model
    return models


def count_layers(config: FunnelConfig) -> int:
    """Layers that a forward pass executes."""
    return sum(block.runs for block in config.blocks)


def time_training(models: dict[str, nn.Module], setting: Setting, device: torch.device) -> dict[str, Measurement]:
    """For each model, the measurement that times a training step."""
    batch = random_batch(setting.shape, device)
    types = torch.zeros_like(batch.token_type_ids)  # BERT has no type for [CLS]
    batch = text_batch(batch.input_ids, batch.attention_mask, types, batch.labels)
    measurements: dict[str, Measurement] = {}
    for side, model in models.items():
        trainer = Trainer.create(model.train().to(device), device, setting.dtype)
        measurements[side] = _step_timer(trainer, logits_function(model, batch), batch)
    return measurements


def _step_timer(trainer: Trainer, logits: Logits, batch: Batch) -> Measurement:
    return timer(lambda: trainer.step(logits, batch.labels), trainer.device)


def format_row(setting: Setting, seconds: dict[str, list[float]]) -> str:
    """The rates of all sides, then the ratio of each side's time to that of absolute positions."""
    texts, length = setting.shape
    rates = [f"{texts / statistics.median(seconds[side]):.3g}" for side in SIDES]
    ratios = [
        f"{statistics.median(a / b for a, b in zip(seconds[side], seconds[ABSOLUTE], strict=True)):.2f}" for side in SIDES[1:]
    ]
    return f"| {' | '.join([setting.layout, setting.dtype, f'{texts} x {length}', *rates, *ratios])} |"


def parse_shape(text: str) -> tuple[int, int]:
    """ "32,128" -> (32, 128)"""
    texts, length = map(int, text.split(","))
    return texts, length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="folder or hub id of a model of the BERT family")
    parser.add_argument("--blocks", nargs="+", default=LAYOUTS, help="layouts (default: 6 4,2 2,2,2)")
    parser.add_argument("--shapes", type=parse_shape, nargs="+", default=SHAPES,
                        help="texts,tokens (default: 32,32 32,128 8,512)")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=7, help="measurements per model (default: %(default)s)")
    parser.add_argument("--same-memory", action="store_true", help="use train.py's memory setting for transformers too")
    parser.add_argument("--device", type=choose_device, default=choose_device(None))
    args = parser.parse_args()

    folder = resolve(args.weights)
    print(f"{device_name(args.device)}, torch {torch.__version__}\n")
    print(f"| layout | dtype | texts x tokens | {' | '.join(SIDES)} | {' | '.join(f'vs {side}' for side in SIDES[1:])} |")
    print(f"|{'---|' * (2 + 2 * len(SIDES))}")
    for layout in args.blocks:
        models = build_models(folder, layout)
        for dtype in args.dtypes:
            for shape in args.shapes:
                setting = Setting(layout, dtype, shape)
                measurements = time_training(models, setting, args.device)
                print(format_row(setting, alternate(args.rounds, measurements, args.same_memory)), flush=True)


if __name__ == "__main__":
    main()

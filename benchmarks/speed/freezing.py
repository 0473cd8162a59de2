"""Time and memory of training steps with frozen embeddings and layers.

    python -m benchmarks.speed.freezing                                   # funnel-transformer/small's size, 32 x 128 tokens
    python -m benchmarks.speed.freezing --blocks 2,2,2 --shape 16,64 --dtype bf16

A step is one of train.py: forward, backward, clipping, AdamW. The settings alternate in one process. The peak memory is that of
the first two steps in a process of its own, beyond the weights: activations, gradients and the optimizer's state.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass

import torch

from benchmarks.speed.compare import parse_shape
from benchmarks.speed.measure import (
    alternate,
    device_name,
    median_timer,
    process_memory,
    reset_peak_memory,
    synchronize,
)
from benchmarks.speed.models import RELEASED_LAYOUT, LoopTrainer, funnel_trainer, random_batch, small_config
from funnel.cli.common import align_columns
from funnel.errors import plural
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training.device import DTYPES, choose_device, keep_freed_memory, release_freed_memory
from funnel.training.freezing import FreezeArgs, freeze, layer_runs
from train import TrainArgs


@dataclass(frozen=True)
class Setting:
    """What is frozen, in which model, on which batch.

    Attributes:
        frozen: number of layers; 0 for the embeddings alone, -1 for nothing.
        shape: texts and tokens.
    """

    frozen: int
    blocks: str
    shape: tuple[int, int]
    dtype: str
    device: str

    @property
    def name(self) -> str:
        """What is frozen."""
        return {-1: "nothing", 0: "embeddings"}.get(self.frozen, f"embeddings, {plural(self.frozen, 'layer')}")

    def build(self) -> FunnelForSequenceClassification:
        """The model, with random weights."""
        torch.manual_seed(0)
        model = FunnelForSequenceClassification(small_config(self.blocks)).to(self.device).train()
        freeze(model, FreezeArgs(freeze_embeddings=self.frozen >= 0, freeze_layers=max(0, self.frozen)))
        return model

    def trainer(self, model: FunnelForSequenceClassification) -> LoopTrainer:
        """What takes train.py's steps."""
        return funnel_trainer(model, TrainArgs(), self.dtype)

    def measure_memory(self) -> float:
        """The peak memory in MiB, measured in a new process."""
        command = [sys.executable, "-m", "benchmarks.speed.freezing", "--memory", json.dumps(asdict(self))]
        process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return int(process.stdout.split()[-1]) / 2**20

    def measure_memory_here(self) -> int:
        """The peak memory in bytes, measured in this process."""
        keep_freed_memory()
        device, warm_up = torch.device(self.device), FunnelForSequenceClassification(small_config("1")).to(self.device)
        self.trainer(warm_up).step_without_graph(random_batch((2, 8), device))  # loads libraries and kernels
        del warm_up
        model, batch = self.build(), random_batch(self.shape, device)
        trainer, is_cuda = self.trainer(model), device.type == "cuda"
        if is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            release_freed_memory()
            reset_peak_memory()
        before = torch.cuda.memory_allocated() if is_cuda else process_memory("VmRSS")
        for _ in range(2):
            trainer.step_without_graph(batch)
        synchronize(device)
        return (torch.cuda.max_memory_allocated() if is_cuda else process_memory("VmHWM")) - before


def measure(settings: list[Setting], rounds: int, steps: int) -> list[tuple[str, ...]]:
    """The rows of the table: what is frozen, trained parameters, milliseconds per step, memory."""
    device = torch.device(settings[0].device)
    batch = random_batch(settings[0].shape, device)
    timers, trained = {}, []
    for setting in settings:
        model = setting.build()
        trained.append(sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))
        trainer = setting.trainer(model)
        timers[setting.name] = median_timer(lambda trainer=trainer: trainer.step(batch), device, steps)  # type: ignore[misc]
    times = alternate(rounds, timers, same_memory=True)
    del timers, trainer, model
    memory = [setting.measure_memory() for setting in settings]
    medians = [statistics.median(values) for values in times.values()]
    rows: list[tuple[str, ...]] = [
        ("frozen", "trained parameters", "ms per step", "(range)", "of nothing's", "peak MiB", "of nothing's")
    ]
    for i, (name, values) in enumerate(times.items()):
        low, high = min(values) * 1e3, max(values) * 1e3
        rows.append(
            (
                name,
                f"{trained[i] / 1e6:.1f} M",
                f"{medians[i] * 1e3:.1f}",
                f"({low:.1f} to {high:.1f})",
                f"{medians[i] / medians[0]:.0%}",
                f"{memory[i]:,.0f}",
                f"{memory[i] / memory[0]:.0%}",
            )
        )
    return rows


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default=RELEASED_LAYOUT, help="layout (default: %(default)s)")
    parser.add_argument("--shape", type=parse_shape, default=(32, 128), help="texts,tokens (default: 32,128)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="default: %(default)s")
    parser.add_argument("--device", type=choose_device, default=choose_device(None))
    parser.add_argument("--rounds", type=int, default=5, help="measurements per setting (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps per measurement (default: %(default)s)")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # a setting, measured in this process
    args = parser.parse_args()
    if args.memory:
        values = json.loads(args.memory)
        print(Setting(**{**values, "shape": tuple(values["shape"])}).measure_memory_here())
        return
    n_layers = len(layer_runs(FunnelForSequenceClassification(small_config(args.blocks).replace(d_inner=8, vocab_size=99))))
    common = (args.blocks, args.shape, args.dtype, args.device.type)
    settings = [Setting(frozen, *common) for frozen in (-1, 0, n_layers // 2, n_layers)]
    texts, tokens = args.shape
    print(f"{device_name(args.device)}, torch {torch.__version__}")
    print(f"layout {args.blocks}, {texts} texts of {tokens} tokens, {args.dtype}, {torch.get_num_threads()} threads\n")
    print(align_columns(measure(settings, args.rounds, args.steps)))


if __name__ == "__main__":
    main()

"""Peak memory of one forward pass or training step, measured in a separate process.

Counts memory beyond what the process held before, that is, beyond the weights. A step is a forward and backward pass, including
gradients but not the optimizer state (8 bytes per weight on both sides). On a CPU, Linux only.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.speed.measure import process_memory, reset_peak_memory
from benchmarks.speed.models import build_pair, logits_function, mixed_precision, random_batch
from funnel.training.device import keep_freed_memory, release_freed_memory


@dataclass(frozen=True)
class PeakMemory:
    """A measurement of peak memory.

    Attributes:
        side: one of `benchmarks.speed.models.SIDES`.
        mode: "forward" or "step".
        dtype: "fp32" or "bf16".
        device: type of the device, "cpu" or "cuda".
    """

    side: str
    mode: str
    dtype: str
    batch_size: int
    length: int
    layout: str
    device: str

    def measure(self) -> float:
        """Measures in a new process; returns the peak in MiB."""
        command = [sys.executable, "-m", "benchmarks.speed.peak_memory", json.dumps(asdict(self))]
        process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return int(process.stdout.split()[-1]) / 2**20

    def measure_here(self) -> int:
        """The peak in bytes, measured in this process."""
        model = build_pair(self.layout, torch.device(self.device))[self.side]
        keep_freed_memory(self.side == "funnel")
        warm_up = self._prepare(model, 2, 8 if self.mode == "step" else 64)
        warm_up()  # loads libraries and kernels
        run = self._prepare(model, self.batch_size, self.length)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            return torch.cuda.max_memory_allocated() - before
        release_freed_memory()
        before = process_memory("VmRSS")
        reset_peak_memory()
        run()
        return process_memory("VmHWM") - before

    def _prepare(self, model: Any, batch_size: int, length: int) -> Callable[[], None]:
        device = torch.device(self.device)
        batch = random_batch((batch_size, length), device)
        logits = logits_function(model, batch)
        model.train(self.mode == "step")

        def step() -> None:
            with mixed_precision(device, self.dtype):
                output = logits()
            F.cross_entropy(output.float(), batch.labels).backward()
            model.zero_grad(set_to_none=True)

        @torch.no_grad()
        def forward() -> None:
            with mixed_precision(device, self.dtype):
                logits()

        return step if self.mode == "step" else forward


if __name__ == "__main__":
    print(PeakMemory(**json.loads(sys.argv[1])).measure_here())

"""Runs whole training steps as CUDA graphs, which removes the cost of launching thousands of small kernels.

A graph is a recording of a step's kernels. It reads the batch from fixed buffers; weights, optimizer state and learning rate
are tensors that it reads and writes in place. There is one graph per shape of a batch.

A graph and an eager step compute the same with the same seed: a graph's dropout reads the generator's seed and offset when it
is replayed, and starts at the same offset. So it does not matter which steps of a run are replayed, and a run resumes exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from funnel.data.batches import Batch
from funnel.errors import FunnelError, error_reason, plural
from funnel.training.state import TrainComponents

MAX_GRAPHS = 24  # a graph takes some memory besides the shared pool, and its capture some time


class GraphCapturer:
    """The CUDA operations that `StepRunner` uses: a side stream, and graphs captured on it that share a memory pool.

    Attributes:
        pool_bytes: size of the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.pool_bytes = 0

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Runs `work` on the side stream, in order with the work of the current stream before and after."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Records the kernels of `work` without running them.

        Returns:
            A function that runs them, and the tensor in which `work` leaves its result. The next replay of any graph may
            overwrite this tensor.
        """
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may allocate pinned memory meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            reserved = torch.cuda.memory_reserved(self.device)
            result = work()
            self.pool_bytes += torch.cuda.memory_reserved(self.device) - reserved
        return graph.replay, result


@dataclass(frozen=True)
class _Graph:
    """A captured step: the buffers of its batch, its loss, and the function that runs it."""

    batch: Batch
    loss: Tensor
    replay: Callable[[], None]


class StepRunner:
    """Runs a training step; on a GPU, it is captured as a CUDA graph at the second batch of a shape, and replayed from then on.

    The first batch of a shape is run eagerly, which also creates what must not be created during a capture, such as the
    optimizer's state. So are all batches of a shape that is new after `MAX_GRAPHS` captures.

    Args:
        step: performs one training step, without synchronizing with the device; returns the loss.
        cuda: the operations to use; None to run all steps eagerly.
    """

    def __init__(self, step: Callable[[Batch], Tensor], cuda: GraphCapturer | None) -> None:
        self.step, self.cuda = step, cuda
        self._seen: set[tuple[torch.Size, ...]] = set()
        self._graphs: dict[tuple[torch.Size, ...], _Graph] = {}

    def __call__(self, batch: Batch) -> Tensor:
        """Takes one training step; returns the loss, which stays on the device.

        Raises:
            FunnelError: the step could not be captured. CUDA is not usable in this process afterwards.
        """
        if self.cuda is None:
            return self.step(batch)
        shape = batch.shapes
        if shape not in self._graphs:
            if shape not in self._seen or len(self._graphs) == MAX_GRAPHS:
                self._seen.add(shape)
                return self.cuda.run(partial(self.step, batch))
            self._graphs[shape] = _capture(self.step, batch, self.cuda)
        graph = self._graphs[shape]
        for name, buffer in graph.batch.tensors.items():
            buffer.copy_(batch.tensors[name], non_blocking=True)
        graph.replay()
        return graph.loss.clone()

    @property
    def description(self) -> str:
        """Number of graphs and size of their memory pool, such as "3 CUDA graphs (120 MiB)"; "" if there are none."""
        if self.cuda is None or not self._graphs:
            return ""
        return f"{plural(len(self._graphs), 'CUDA graph')} ({self.cuda.pool_bytes / 2**20:,.0f} MiB)"


def _capture(step: Callable[[Batch], Tensor], batch: Batch, cuda: GraphCapturer) -> _Graph:
    """Captures a step, with copies of the batch's tensors as its buffers."""
    buffers = batch.map(torch.clone)
    try:
        replay, loss = cuda.capture(partial(step, buffers))
    except Exception as error:
        reason = error_reason(error.__context__ or error)  # ending a failed capture raises another error
        raise FunnelError(
            f"a training step could not be captured as a CUDA graph ({reason}); resume the run with no_cuda_graphs",
            "no_cuda_graphs",
        ) from error
    return _Graph(buffers, loss, replay)


def step_runner(step: Callable[[Batch], Tensor], components: TrainComponents, args: Any) -> StepRunner:
    """A `StepRunner` that uses CUDA graphs where possible.

    Not on other devices, and not with several processes, fp16 (whose loss scale changes) or gradient checkpointing (which
    reads the random state on the host).

    Args:
        args: the arguments of train.py; `no_cuda_graphs` and `gradient_checkpointing` are used.
    """
    is_excluded = args.no_cuda_graphs or args.gradient_checkpointing or components.scaler.is_enabled()
    device = None if is_excluded else components.dist.graph_device
    return StepRunner(step, None if device is None else GraphCapturer(device))

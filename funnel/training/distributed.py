"""Several processes that train one model, as torchrun starts them; and the signals that stop a run.

Every process reads the same data, draws the same random numbers and computes its rows of each batch; what they exchange
are gradients (DistributedDataParallel, or FSDP2 with `shard`), losses and logits. The first process alone writes files and
speaks.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from funnel.errors import FunnelError, StoppedBySignal
from funnel.model.encoder import FunnelLayer
from funnel.training import optim as training

T = TypeVar("T")
TIMEOUT = timedelta(hours=4)  # of an exchange: one process may download or encode while the others wait


def end(status: int) -> NoReturn:
    """Ends this process with an exit status.

    One of several ends at once, without the interpreter's own ending, in which gloo's threads crash where they still hold
    a tensor (github.com/pytorch/pytorch/pull/179291).
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class Distributed:
    """Which process this is, of how many, and on which device. `start` makes one.

    Attributes:
        rank: number of this process, 0 for the one that writes.
        size: of the whole group.
        local_rank: number of this process on its machine.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.device, self.rank, self.size, self.local_rank = device, rank, size, local_rank

    @classmethod
    def start(cls, device: str | None) -> "Distributed":
        """Joins the group that torchrun's environment describes, or is alone without one.

        Args:
            device: as `train.py --device`.

        Raises:
            FunnelError: the environment is half there, or a process has no device of its own.
        """
        chosen = training.choose_device(device)
        if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
            return cls(chosen)
        try:
            size, rank, local_rank = (int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        except (KeyError, ValueError) as error:
            raise FunnelError(
                f"WORLD_SIZE is set to {os.environ['WORLD_SIZE']!r}, but not what goes with it ({error}); "
                "start several processes with: torchrun --nproc-per-node N train.py …"
            ) from None
        if chosen.type == "mps":
            raise FunnelError("--device mps: there is one; start without torchrun")
        if chosen.type == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise FunnelError(
                    f"process {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                    "give torchrun a smaller --nproc-per-node"
                )
            chosen = torch.device("cuda", local_rank)
            torch.cuda.set_device(chosen)
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
        if rank > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
        return cls(chosen, rank, size, local_rank)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def __enter__(self) -> "Distributed":
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """Leaves the group. Where an exchange failed because another process is gone, it is that process's error."""
        if self.size == 1:
            return
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            print(f"process {self.rank} of {self.size}: stopped, because another process has ended", file=sys.stderr)
            raise SystemExit(1) from None

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Within it, the first process of every machine does the work alone, then the others, who find its files.

        There must be no other exchange within. A FunnelError of one process ends all of them.

        Raises:
            FunnelError: in the first process that had one; the others end without a word (SystemExit, status 2).
        """
        if self.size == 1:
            yield
            return
        message = None
        if self.local_rank > 0:
            dist.barrier()
        try:
            yield
        except FunnelError as error:
            message = str(error)
        if self.local_rank == 0:
            dist.barrier()
        messages: list[str | None] = [None] * self.size
        dist.all_gather_object(messages, message)
        self._end_on(messages)

    def run_on_main_and_broadcast(self, work: Callable[[], T]) -> T:
        """What a piece of work gives that the first process does for all; its FunnelError ends all of them."""
        if self.size == 1:
            return work()
        values: list[Any] = [None, None]
        if self.is_main:
            try:
                values[1] = work()
            except FunnelError as error:
                values[0] = str(error)
        dist.broadcast_object_list(values, src=0)
        self._end_on(values[:1])
        result: T = values[1]
        return result

    def _end_on(self, messages: list[str | None]) -> None:
        """Ends this process if a process has told of an error; the first one that did repeats it."""
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failed and failed[0] == self.rank:
            raise FunnelError(str(messages[self.rank]))
        if failed:
            raise SystemExit(2)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors, in all of them."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, index: np.ndarray) -> tuple[np.ndarray, int, float]:
        """This process's rows of a batch, the number of rows before them, and their share of the batch.

        Parts differ by one row at most. A process that there is no row for takes one nevertheless, whose share is 0.
        """
        parts = np.array_split(index, self.size)
        mine = parts[self.rank]
        if len(mine) == 0:
            return index[:1], 0, 0.0
        return mine, sum(len(part) for part in parts[: self.rank]), len(mine) / len(index)

    def wrap(self, model: nn.Module, shard: bool = False, compiled: bool = False) -> Callable[..., Tensor]:
        """The model as it is called in training: compiled if asked for, and with gradients that are the processes' mean.

        Args:
            model: the same one in all processes. With `shard` it is changed: every process keeps a part of each weight,
                gathers a layer's weights when it needs them, and keeps the optimizer's state of its part only.
        """
        if shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.size,))
            for module in model.modules():
                if isinstance(module, FunnelLayer):
                    fully_shard(module, mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif self.size > 1:
            from torch.nn.parallel import DistributedDataParallel

            device_ids = [self.device.index] if self.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=device_ids)
        called: Callable[..., Tensor] = torch.compile(model, dynamic=True) if compiled else model
        return called

    def whole(self, values: Any) -> Any:
        """A tree of dicts and lists with sharded tensors put main_process_first, on the CPU. All processes must call it."""
        if isinstance(values, dict):
            return {key: self.whole(value) for key, value in values.items()}
        if isinstance(values, list):
            return [self.whole(value) for value in values]
        if isinstance(values, Tensor) and self.size > 1:
            full = training.whole(values)
            return full.cpu() if self.is_main else None  # one at a time: no process holds all of them
        return values

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Puts an optimizer's whole state in place, sharded as its parameters are.

        Raises:
            ValueError: it is another model's.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if hasattr(parameters[0], "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            for number, values in state["state"].items():
                mesh, placements = parameters[number].device_mesh, parameters[number].placements
                for name, tensor in values.items():
                    if tensor.dim() > 0:
                        values[name] = distribute_tensor(tensor.to(self.device), mesh, placements)
        optimizer.load_state_dict(state)


class GracefulStop:
    """Within it, SIGTERM and Ctrl-C wait until `check` is called; a second one ends the process at once."""

    def __init__(self, processes: Distributed) -> None:
        self.processes = processes
        self.received, self.when = 0, 0.0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():  # Python lets no other one handle signals
            self._handlers = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # torchrun hands a terminal's Ctrl-C on to processes that have had it already.
        is_echo = self.processes.size > 1 and time.monotonic() - self.when < 1
        if self.received and not is_echo:
            os._exit(128 + number)
        if not self.received and self.processes.is_main:
            os.write(2, b"\nstopping: saves a checkpoint first; once more stops at once\n")
        self.received, self.when = self.received or number, time.monotonic()

    def check(self) -> None:
        """Raises StoppedBySignal if a signal has come in, in any process. All processes must call it."""
        number = self.received
        if self.processes.size > 1:
            numbers = torch.tensor(number)
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
            number = int(numbers)
        if number:
            raise StoppedBySignal(number)

    def check_here(self) -> None:
        """The same in the midst of an evaluation, which several processes end main_process_first."""
        if self.processes.size == 1:
            self.check()

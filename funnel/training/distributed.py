"""Data-parallel training with torchrun: process group, DDP or FSDP2, and full state dicts.

Every rank reads the same data and computes its rows of each batch; ranks exchange gradients, losses and logits.
Only rank 0 writes files and logs.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from funnel.data.batches import Shard
from funnel.errors import FunnelError, exit_silently
from funnel.model.compilation import compile_regions
from funnel.model.encoder import FunnelLayer
from funnel.training.device import choose_device

T = TypeVar("T")
TIMEOUT = timedelta(hours=4)  # of collectives: one rank may download or encode while the others wait
# Groups are never freed: gloo's destructor waits for its thread while holding the GIL, which that thread may need in order to
# free the tensor of the last collective. Both would wait forever.
_groups: list[Any] = []


class Distributed:
    """The process group, or a single process.

    Args:
        device: this rank's device.
        rank: 0 for the process that writes files and logs.
        world_size: number of processes.
        local_rank: rank on this machine.
    """

    def __init__(self, device: torch.device, rank: int = 0, world_size: int = 1, local_rank: int = 0) -> None:
        self.device, self.rank, self.world_size, self.local_rank = device, rank, world_size, local_rank

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    @property
    def graph_device(self) -> torch.device | None:
        """The device if steps can be CUDA graphs: a GPU, used by a single process."""
        return self.device if self.device.type == "cuda" and self.world_size == 1 else None

    @property
    def shard(self) -> Shard:
        """This rank's part of the data."""
        return Shard(self.rank, self.world_size)

    def __enter__(self) -> "Distributed":
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """Leaves the group. A collective that failed because another rank died becomes exit status 1."""
        if self.world_size == 1:
            return
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            print(f"rank {self.rank} of {self.world_size}: stopped because another process failed", file=sys.stderr)
            raise SystemExit(1) from None

    # --- work of some ranks -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Runs the body on the first rank of each machine, then on the others, which find the files that it created.

        The body must not contain another collective. A FunnelError on one rank ends all ranks.

        Raises:
            FunnelError: on the lowest rank that had one. The others exit with status 2 and print nothing.
        """
        if self.world_size == 1:
            yield
            return
        failure = None
        if self.local_rank > 0:
            dist.barrier()
        try:
            yield
        except FunnelError as error:
            failure = str(error), error.parameter
        if self.local_rank == 0:
            dist.barrier()
        failures: list[tuple[str, str | None] | None] = [None] * self.world_size
        dist.all_gather_object(failures, failure)
        self._exit_on(failures)

    def run_on_main_and_broadcast(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0 and returns its result on every rank; a FunnelError ends all ranks."""
        if self.world_size == 1:
            return work()
        values: list[Any] = [None, None]
        if self.is_main:
            try:
                values[1] = work()
            except FunnelError as error:
                values[0] = str(error), error.parameter
        dist.broadcast_object_list(values, src=0)
        self._exit_on(values[:1])
        result: T = values[1]
        return result

    def _exit_on(self, failures: list[tuple[str, str | None] | None]) -> None:
        """Ends this process if a rank reported an error; the lowest such rank raises it."""
        failed = [rank for rank, failure in enumerate(failures) if failure is not None]
        if failed and failed[0] == self.rank:
            raise FunnelError(*failures[self.rank])  # type: ignore[misc]
        if failed:
            exit_silently(2)

    # --- reductions ---------------------------------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Averages a tensor over all ranks, in place."""
        return self.sum(tensor).div_(self.world_size) if self.world_size > 1 else tensor

    def max(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def first_result(self, value: T | None) -> T | None:
        """The value of the lowest rank that has one, on every rank."""
        if self.world_size == 1:
            return value
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return next((value for value in values if value is not None), None)

    # --- model and optimizer ------------------------------------------------------------------------------------------

    def wrap(self, model: nn.Module, *, fsdp: bool = False, compile: bool = False) -> nn.Module:
        """Prepares a model for data-parallel training; gradients are averaged over the ranks.

        Args:
            fsdp: shard parameters, gradients and optimizer state across the ranks (FSDP2), layer by layer; changes
                `model` in place. Otherwise DDP, if there are several ranks.
            compile: compile the model's regions, in place (funnel/model/compilation.py).
        """
        if compile:
            compile_regions(model)
        if fsdp:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.world_size,))
            for module in model.modules():
                if isinstance(module, FunnelLayer):
                    fully_shard(module, mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif self.world_size > 1:
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            model = nn.parallel.DistributedDataParallel(model, device_ids=device_ids)
        return model

    @contextlib.contextmanager
    def sync_gradients(self, wrapped: nn.Module, is_last: bool) -> Iterator[None]:
        """Restricts gradient communication to a step's last micro-batch."""
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            with contextlib.nullcontext() if is_last else wrapped.no_sync():
                yield
            return
        set_sync = getattr(wrapped, "set_requires_gradient_sync", None)  # FSDP2
        if set_sync is not None:
            set_sync(is_last)
        yield

    def model_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The full state dict on the CPU of rank 0 (empty on the others). All ranks must call this together."""
        state: dict[str, Tensor] = get_model_state_dict(model, options=self._state_options())  # type: ignore[assignment]
        return state

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The full optimizer state by parameter name, like `model_state`."""
        return get_optimizer_state_dict(model, optimizer, options=self._state_options())

    def load_optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Restores what `optimizer_state` returned, for any number of ranks; every rank must pass the full state.

        Learning rates stay as they are: a CUDA graph needs the tensor that the optimizer was built with.
        """
        options = StateDictOptions(full_state_dict=self.world_size > 1)
        kept = [{name: group[name] for name in ("lr", "capturable")} for group in optimizer.param_groups]  # of this device
        set_optimizer_state_dict(model, optimizer, state, options=options)
        for group, values in zip(optimizer.param_groups, kept, strict=True):
            group.update(values)

    def _state_options(self) -> StateDictOptions:
        return StateDictOptions(full_state_dict=self.world_size > 1, cpu_offload=True)


def init_distributed(device: str | None, fsdp: bool = False) -> Distributed:
    """Joins the process group that torchrun's environment describes, or returns a single process without one.

    Args:
        device: "cpu", "cuda" or "mps"; None for the fastest available.
        fsdp: whether the model will be sharded, which requires several processes.

    Raises:
        FunnelError: the environment is incomplete, or this rank has no device of its own.
    """
    try:
        chosen = choose_device(device)
    except FunnelError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            exit_silently(2)  # the first process of this machine prints the message
        raise
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        if fsdp:
            raise FunnelError("fsdp shards the model across several processes: start them with torchrun", "fsdp")
        return Distributed(chosen)
    try:
        world_size, rank, local_rank = (int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    except (KeyError, ValueError) as error:
        raise FunnelError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}, but the environment for several processes is incomplete "
            f"({error}); start them with: torchrun --nproc-per-node N train.py ..."
        ) from None
    if chosen.type == "mps":
        raise FunnelError("device mps: there is only one; start without torchrun", "device")
    if chosen.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise FunnelError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} available; lower torchrun's --nproc-per-node"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    _groups.append(dist.group.WORLD)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
    return Distributed(chosen, rank, world_size, local_rank)


def exit_process(status: int) -> NoReturn:
    """Ends this process with an exit status.

    With several processes, it skips the interpreter's shutdown, in which gloo's threads crash if they still hold a tensor
    (github.com/pytorch/pytorch/pull/179291).
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)

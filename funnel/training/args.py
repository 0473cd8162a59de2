"""The arguments that train.py and pretrain.py have in common."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from funnel.data.tasks import Task
from funnel.errors import FunnelError
from funnel.options import option
from funnel.training.device import DEVICES, DTYPES
from funnel.training.tracking import TrackingArgs


@dataclass(frozen=True)
class RunArgs(TrackingArgs):
    """Options for how to train, where, and what to save.

    Raises:
        FunnelError: from `check_run`: incompatible or missing options.
    """

    weight_decay: float = option(0.01, "AdamW weight decay of weight matrices", bounds="[0, inf)")
    seed: int = option(0, "random seed", bounds="[0, 4294967295]")
    device: str | None = option(None, "device (default: the fastest available)", choices=DEVICES)
    dtype: str | None = option(None, "dtype of matrix products (default: bf16 if faster)", choices=tuple(DTYPES))
    grad_accum: int = option(1, "micro-batches per step: less memory, same gradient", metavar="N", bounds="[1, inf)")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    compile: bool = option(False, "compile embeddings, layers and head with torch.compile (slow start)")
    no_cuda_graphs: bool = option(False, "on a single GPU: launch every kernel separately, without CUDA graphs")
    fsdp: bool = option(False, "with torchrun: shard weights and optimizer state across processes (FSDP2)")
    out: Path | None = option(None, "run folder (default: a new one in runs/, named after the settings)")
    resume: bool = option(
        False, "resume the run in the out folder, with its arguments; the number of epochs or steps may be increased"
    )
    log_every: int = option(20, "steps between log lines", metavar="N", bounds="[1, inf)")
    eval_every: int | None = option(
        None, "steps between evaluations (default: a quarter epoch; in pretraining, a twentieth of the run)", bounds="[1, inf)"
    )
    save_every: int | None = option(None, "steps between checkpoints (default: at evaluations)", bounds="[1, inf)")
    keep_checkpoints: int = option(2, "number of checkpoints to keep", metavar="N", bounds="[1, inf)")
    keep_optimizer: bool = option(False, "keep the optimizer's state after the last step, to train longer without a new warmup")
    debug: bool = option(False, "show the full traceback of errors")

    def check_run(self) -> None:
        """Checks for incompatible or missing options."""
        if self.resume and self.out is None:
            raise FunnelError("out: missing; to resume a run, give its folder", "out")
        if self.fsdp and self.dtype == "fp16":
            raise FunnelError("fsdp: does not support fp16; choose the dtype bf16 or fp32", "fsdp")


def with_task_defaults(args: Any, task: Task) -> Any:
    """The arguments of train.py with the task's hyperparameters where none are set; either epochs or steps."""
    defaults: dict[str, Any] = {
        "batch_size": task.batch_size,
        "warmup": task.warmup,
        "layer_lr_decay": task.layer_lr_decay,
    }
    if args.epochs is None and args.steps is None:
        defaults |= {"steps": task.steps} if task.steps else {"epochs": task.epochs}
    return replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})

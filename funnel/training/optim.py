"""What the loop in train.py needs and its reader need not see: device and dtype, parameter groups, schedule, evaluation,
what to say when numbers are no longer finite.
"""

import ctypes
import math
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnel.data.dataset import Batch, Dataset
from funnel.errors import FunnelError
from funnel.model.config import FunnelConfig
from funnel.training.metrics import METRICS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the fastest one that is there.

    Raises:
        FunnelError: the machine does not have it.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        name = next(device for device, is_there in there.items() if is_there)
    if not there[name]:
        raise FunnelError(f"--device {name}: PyTorch finds none here; there is {', '.join(d for d in there if there[d])}")
    return torch.device(name)


def choose_dtype(name: str | None, device: torch.device, width: int) -> str:
    """The number format of that name, or bf16 where that is the faster one and fp32 elsewhere.

    Args:
        width: of the model. On a CPU, matrices narrower than 256 take longer to cast to bf16 than bf16 saves.
    """
    if name is not None:
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        has_bf16 = any(capabilities.get(n) for n in ("amx_bf16", "avx512_bf16", "bf16"))
        return "bf16" if has_bf16 and width >= 256 else "fp32"
    return "fp32"


def keep_freed_memory(reuse: bool = True) -> None:
    """Has the C library keep freed memory for the next step, where it is glibc.

    By default it hands every large block back to the system, which must clear its pages anew at each use: a sum of two
    tensors of 50 MB then takes 14 ms instead of 2.4. `keep_freed_memory(False)` puts glibc's own setting back.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    mallopt(m_mmap_max, 0 if reuse else 65536)  # blocks of their own, which are always handed back
    mallopt(m_trim_threshold, 2**31 - 1 if reuse else 2**26)


def peak_memory(device: torch.device) -> float | None:
    """The most MiB that this process has had at once: on a GPU PyTorch's tensors, else the whole process; None where the
    system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """A context in which matrix products run in `dtype`; weights stay in float32."""
    return nullcontext() if dtype == "fp32" else torch.autocast(device.type, DTYPES[dtype])


def set_seed(seed: int) -> None:
    """Seeds every random number generator that training draws from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices with weight decay; biases, r_*_bias and LayerNorms without."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (plain if name.endswith("bias") or "layer_norm" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def linear_warmup_decay(total: int, warmup: float) -> Callable[[int], float]:
    """The learning rate's factor by step: from 0 up to 1 over the share `warmup` of all steps, then down to 0."""
    rise = max(1, math.ceil(total * warmup))

    def factor(step: int) -> float:
        return min((step + 1) / rise, (total - step) / max(1, total - rise))

    return factor


def loss_function(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy for label ids, the squared error for scores; the mean over a batch. logits [b, outputs], labels [b]."""
    if labels.is_floating_point():
        return F.mse_loss(logits.float().squeeze(1), labels)
    return F.cross_entropy(logits.float(), labels)


@torch.no_grad()
def predict(
    model: nn.Module,
    dataset: Dataset,
    device: torch.device,
    dtype: str,
    batch_size: int = 64,
    share: tuple[int, int] = (0, 1),
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Logits of every example, in the dataset's order, [examples, num_labels], float32 on the CPU.

    Args:
        share: this process and how many there are: each takes every so many-th batch, and has zeros for the others'.
        check: is called before every batch, and may raise.
    """
    was_training = model.training
    model.eval()
    logits: Tensor | None = None
    batches = list(dataset.evaluation_batches(batch_size))
    rank, size = share
    try:
        with autocast(device, dtype):  # around all batches: weights are cast once
            for number in range(rank, -(-len(batches) // size) * size, size):
                check()
                index = batches[min(number, len(batches) - 1)]  # all processes run the model equally often
                batch = dataset.batch(index).to(device)
                out = model(batch.input_ids, batch.attention_mask, batch.token_type_ids).float().cpu()
                logits = out.new_zeros(len(dataset), out.shape[1]) if logits is None else logits
                if number < len(batches):
                    logits[torch.from_numpy(index)] = out
    finally:
        model.train(was_training)
    assert logits is not None, "a dataset has one example at least"
    return logits


def measure(logits: Tensor, dataset: Dataset, metrics: tuple[str, ...]) -> tuple[dict[str, float], np.ndarray]:
    """Loss and metrics over a dataset by name, and the predicted label ids or scores. logits [examples, num_labels]."""
    is_score = dataset.labels.dtype == np.float32
    predictions = logits[:, 0].numpy() if is_score else logits.argmax(1).numpy()
    labels = torch.from_numpy(dataset.labels)
    scores = {"loss": float(loss_function(logits, labels if is_score else labels.long()))}
    return scores | {name: METRICS[name](predictions, dataset.labels) for name in metrics}, predictions


def is_better(score: float, best: float | None) -> bool:
    """Whether a metric's value beats the best one so far. A measure without meaning (nan) beats nothing but no value."""
    return best is None or score > best or (math.isnan(best) and not math.isnan(score))


def one_class_warning(predictions: np.ndarray, labels: np.ndarray, config: FunnelConfig) -> str | None:
    """A sentence for a classifier that has collapsed to one class while the data has several; None for any other."""
    if config.problem_type == "regression" or len(np.unique(predictions)) > 1 or len(np.unique(labels)) == 1:
        return None
    share = float((labels == predictions[0]).mean())
    return (
        f"The model predicts one class only, {config.id2label[int(predictions[0])]!r}, for all {len(labels)} texts; "
        f"its accuracy is that class's share, {share:.1%}. It has learned nothing: try a lower --lr, more --epochs, "
        "or --init identity."
    )


def step_seed(seed: int, step: int, process: int = 0) -> int:
    """A seed for the random numbers of one step, from the run's: a run that goes on at a step draws what it would have."""
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0] >> 1)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seeds the generators that dropout draws from: alike in all processes on a CPU, each its own on a GPU."""
    torch.manual_seed(step_seed(seed, step))
    if rank > 0 and torch.cuda.is_available():
        torch.cuda.manual_seed(step_seed(seed, step, rank))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(model: nn.Module, most: float = 1.0) -> float:
    """Scales gradients so that their common norm is `most` at most, and returns what it was."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    return float(whole(norm))


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put main_process_first, which all processes must ask for; any other as it is."""
    # Asking for the type would load PyTorch's package of sharded tensors, which takes a second.
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def find_nonfinite(model: nn.Module, batch: Batch, loss: float) -> str:
    """In words, where a step first went wrong: in the first layer whose result is not finite, or in the last parameter
    whose gradient is not (the gradient goes from the last to the first).

    Args:
        model: with the gradients of the step. It is run once more.
        batch: the step's texts, or the last part of them.
        loss: of the step.
    """
    if not math.isfinite(loss):
        found: list[str] = []

        def look(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor) and not output.isfinite().all():
                    found.append(name)

            return hook

        modules = [(name, m) for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
        hooks = [module.register_forward_hook(look(name)) for name, module in modules]
        try:
            with torch.no_grad():
                model(batch.input_ids, batch.attention_mask, batch.token_type_ids)
        finally:
            for handle in hooks:
                handle.remove()
        return f"first in the result of {found[0]}" if found else "in the loss alone"
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    return f"first in the gradient of {bad[-1]} ({len(bad)} parameters in all)" if bad else "in the gradients' norm alone"

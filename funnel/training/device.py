"""Device, dtype, memory and random seeds."""

import contextlib
import ctypes
import random
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from funnel.errors import FunnelError, format_list

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("cpu", "cuda", "mps")


def choose_device(name: str | torch.device | None) -> torch.device:
    """Returns the named device, or the fastest available one.

    Args:
        name: one of `DEVICES`, or a torch.device.

    Raises:
        FunnelError: the device is not available.
    """
    name = None if name is None else str(name)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [device for device, is_available in available.items() if is_available]
    if name is not None and name not in usable:
        raise FunnelError(f"device {name}: not available; choose from {format_list(usable)}", "device")
    return torch.device(name or usable[0])


def choose_dtype(name: str | None, device: torch.device, d_model: int) -> str:
    """Returns the named dtype; by default, bf16 where it is faster and fp32 elsewhere.

    On a CPU, casting matrices narrower than 256 takes longer than bf16 matrix products save.
    """
    if name is not None:
        if name not in DTYPES:
            raise FunnelError(f"unknown dtype {name!r}; choose from {', '.join(DTYPES)}", "dtype")
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        has_bf16 = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
        return "bf16" if has_bf16 and d_model >= 256 else "fp32"
    return "fp32"


def autocast(device: torch.device, dtype: str, *, cache: bool = True) -> AbstractContextManager[Any]:
    """A context in which matrix products run in `dtype`; weights stay in float32.

    Args:
        cache: whether a weight is cast once, and the result used until the context ends.
    """
    return nullcontext() if dtype == "fp32" else torch.autocast(device.type, DTYPES[dtype], cache_enabled=cache)


def keep_freed_memory(keep: bool = True) -> None:
    """Lets glibc's malloc reuse large freed blocks instead of returning them to the system.

    Memory that was returned must be mapped and zeroed again at the next use: adding two 50 MB tensors takes 14 ms instead
    of 2.4. Does nothing with another C library. `keep=False` restores glibc's defaults.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    mallopt(m_mmap_max, 0 if keep else 65536)
    mallopt(m_trim_threshold, 2**31 - 1 if keep else 2**26)


def release_freed_memory() -> None:
    """Returns memory that the C library keeps for reuse to the system, where it can."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: torch.device) -> float | None:
    """Peak memory in MiB: of PyTorch's tensors on a GPU, of the process elsewhere; None where it is not reported."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def set_seed(seed: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seeds the generators that dropout draws from, so that a resumed run repeats a step's masks.

    Every step and every rank has its own seed.
    """
    torch.manual_seed(step_seed(seed, step, rank))


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A 63-bit seed that depends on the run's seed, the step and the rank."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)

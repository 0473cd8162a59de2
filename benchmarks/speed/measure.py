"""Timing, alternating rounds, the C library's memory setting, and process memory."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from funnel.training.device import keep_freed_memory, release_freed_memory

Measurement = Callable[[], float]  # runs something once and returns what was measured


def synchronize(device: torch.device) -> None:
    """Waits for the device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_call(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a call takes, including the work it starts on the device."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def timer(function: Callable[[], Any], device: torch.device) -> Measurement:
    """The measurement that times a function."""
    return lambda: time_call(function, device)


def median_timer(function: Callable[[], Any], device: torch.device, calls: int = 20) -> Measurement:
    """The measurement that calls a function several times and returns the median seconds of a call."""
    return lambda: statistics.median(time_call(function, device) for _ in range(calls))


def alternate(rounds: int, sides: Mapping[str, Measurement], same_memory: bool = False) -> dict[str, list[float]]:
    """Runs the sides in turn, `rounds` times each, and returns their measurements.

    Sides whose name starts with "funnel" run with train.py's memory setting, the others with the defaults. An untimed warm-up
    call precedes each measured one, because switching the setting releases the memory that a side would reuse.

    Args:
        same_memory: run all sides with train.py's memory setting.
    """
    results: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measurement in sides.items():
            set_memory_reuse(same_memory or name.startswith("funnel"))
            measurement()
            results[name].append(measurement())
    return results


def set_memory_reuse(reuse: bool) -> None:
    """Turns train.py's memory setting on, or restores the C library's defaults and releases what was kept."""
    keep_freed_memory(reuse)
    if not reuse:
        release_freed_memory()


def process_memory(field: str) -> int:
    """Current (VmRSS) or peak (VmHWM) resident memory of this process in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def reset_peak_memory() -> None:
    """Resets VmHWM to the current value; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    processor = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores"

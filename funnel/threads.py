"""Sets OpenMP's environment variables for PyTorch's CPU threads. Import this module before torch, which reads them once.

Variables that are already set are kept.

- GOMP_SPINCOUNT: waiting OpenMP threads spin, by default for milliseconds. On busy cores, a spinning thread takes time from
  the thread it waits for: with one busy process per core, training ran at a fifth of its idle speed. With a short spin, it
  runs at 0.4 of the idle speed; on an idle machine, the short spin costs 2 to 6 % (docs/speed.md).
- OMP_NUM_THREADS: OpenMP starts one thread per core, also in a container that may use only some of the cores' time.
"""

import math
import os
from pathlib import Path

SPIN_COUNT = 1000  # iterations, a few microseconds
CGROUP_ROOT = Path("/sys/fs/cgroup")


def configure_threads() -> None:
    """Sets the variables in this process's environment."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    if quota is not None and quota < cores:
        os.environ.setdefault("OMP_NUM_THREADS", str(math.ceil(quota)))


def cpu_quota(root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """The number of cores whose time this process may use according to its control groups; None if unlimited.

    Args:
        root: where the control groups (version 1 or 2) are mounted.
        membership: lists the groups of this process.
    """
    try:
        groups = [line.split(":", 2)[1:] for line in membership.read_text().splitlines() if line.count(":") >= 2]
    except (OSError, ValueError):  # not Linux
        return None
    quotas = []
    for controllers, group in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / controllers if controllers else root
        for path in [mount / group.lstrip("/"), *(mount / group.lstrip("/")).parents]:  # a parent may have a lower quota
            if path.is_relative_to(mount):
                quotas.append(_read_quota(path))
    return min((quota for quota in quotas if quota is not None), default=None)


def _read_quota(group: Path) -> float | None:
    """A group's own quota, in cores."""
    try:
        if (group / "cpu.max").is_file():  # version 2: "QUOTA PERIOD" or "max PERIOD"
            quota, period = (group / "cpu.max").read_text().split()
        else:  # version 1: -1 for unlimited
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        cores = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return cores if math.isfinite(cores) and cores > 0 else None


configure_threads()

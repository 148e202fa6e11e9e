"""How many threads this process may use: OMP_NUM_THREADS, else physical cores within affinity and the cgroup's CPU quota."""

import os
from functools import cache
from math import ceil
from pathlib import Path

import numpy as np

from gristmill import _core
from gristmill.errors import ModelError

CGROUP = Path("/sys/fs/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")
MOST = max(256, os.cpu_count() or 1)  # more help nobody, and the OpenMP runtime falls over far more


@cache
def default_threads() -> int:
    """Return the number of threads a Session uses when it is not told; 1 where the extension was built without OpenMP."""
    if not _core.has_threads():
        return 1
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return min(int(asked), MOST)
    quota = cgroup_quota()
    cores = physical_cores()
    return max(1, cores if quota is None else min(cores, ceil(quota)))


def check_threads(threads: int | None) -> int:
    """Return a thread count: the default for None, and never more than `MOST`.

    Raises:
        ModelError: it is not a positive integer.
    """
    if threads is None:
        return default_threads()
    if not isinstance(threads, (int, np.integer)) or isinstance(threads, bool) or threads < 1:
        raise ModelError(f"threads must be a positive integer or None, got {threads!r}")
    return min(int(threads), MOST)


def physical_cores() -> int:
    """Count the distinct cores among the CPUs that this process may run on; SMT siblings share one."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return len({_siblings(cpu) for cpu in allowed}) or 1


def _siblings(cpu: int) -> str:
    try:
        return (TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def cgroup_quota() -> float | None:
    """Return the CPU quota in cores, cgroup v2 or v1, the tightest on the way to the root; None where there is none."""
    quotas = [q for q in (_v2_quota(), _v1_quota()) if q is not None]
    return min(quotas) if quotas else None


def _own_paths() -> dict[str, str]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split(":", 2) for line in lines)
    return {controller: path for _, controllers, path in fields for controller in controllers.split(",")}


def _v2_quota() -> float | None:
    folder = CGROUP / _own_paths().get("", "/").lstrip("/")
    quotas = []
    for place in (folder, *folder.parents):
        try:
            limit, period = (place / "cpu.max").read_text().split()
            if limit != "max":
                quotas.append(int(limit) / int(period))
        except (OSError, ValueError):
            pass  # no such controller at this level
        if place == CGROUP:
            break
    return min(quotas) if quotas else None


def _v1_quota() -> float | None:
    try:
        limit = int((CGROUP / "cpu/cpu.cfs_quota_us").read_text())
        period = int((CGROUP / "cpu/cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return limit / period if limit > 0 and period > 0 else None

"""How many CPUs this process may use, and how the threads of torch wait: set before torch is loaded."""

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def set_threads() -> None:
    """Set OMP_WAIT_POLICY and, where torch would start too many threads, OMP_NUM_THREADS. What is set already stays.

    By default, a thread of OpenMP that waits for others keeps its CPU busy for a while. If another program uses the
    same CPUs, the threads that it waits for do not run in that time: docs/performance.md has figures. With the policy
    PASSIVE, waiting threads leave the CPU to others.

    By default, torch starts a thread for each CPU that the process may run on. A limit of a container or of SLURM may
    be lower (`cpu_limit`).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    limit = cpu_limit()
    if limit is not None and limit < visible_cpus():
        os.environ.setdefault("OMP_NUM_THREADS", str(limit))


def visible_cpus() -> int:
    """The number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_limit() -> int | None:
    """The lowest limit on CPUs that torch does not ask for: SLURM_CPUS_PER_TASK, and the quotas of control groups.

    None if there is no limit. A quota of 1.5 CPUs counts as 1 thread.
    """
    limits = _quotas()
    if (asked := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdecimal():
        limits.append(int(asked))
    return max(1, int(min(limits))) if limits else None


def _quotas() -> list[float]:
    """The quotas of this process's control group and of those around it, in CPUs (cgroup v2, and v1 of a container)."""
    try:
        lines = OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    own = next((line[3:] for line in lines if line.startswith("0::")), "/").lstrip("/")
    found = []
    for folder in (CGROUPS / own, *(CGROUPS / own).parents):
        if folder != CGROUPS and CGROUPS not in folder.parents:
            break
        quota, _, period = _words(folder / "cpu.max").partition(" ")
        found.append(_ratio(quota, period))
    v1 = CGROUPS / "cpu"
    found.append(_ratio(_words(v1 / "cpu.cfs_quota_us"), _words(v1 / "cpu.cfs_period_us")))
    return [quota for quota in found if quota]


def _words(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _ratio(quota: str, period: str) -> float | None:
    """None for `max` and for -1, which say that there is no quota."""
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None

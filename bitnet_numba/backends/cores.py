"""How many CPUs this process may use. More threads than that only wait for each other."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores() -> int:
    """Physical cores that this process may use: hardware threads of one core share what the kernels need."""
    cores = set()
    for cpu in _allowed():
        siblings = str(cpu)
        with contextlib.suppress(OSError):
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        cores.add(siblings)
    return within_quota(len(cores))


def usable_cpus() -> int:
    """Hardware threads that this process may use."""
    return within_quota(len(_allowed()))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many CPUs the control groups of this process, a container's for example, allow it in time; None: no limit."""
    quotas = []
    for folder in _control_groups(root):
        with contextlib.suppress(OSError, ValueError, ArithmeticError):
            quota, period = (folder / "cpu.max").read_text().split()  # version 2; "max": no limit
            quotas.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError, ArithmeticError):
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            quotas.append(int(quota) / int(period))  # version 1; -1: no limit
    return min((quota for quota in quotas if quota > 0), default=None)


def _control_groups(root: Path) -> Iterator[Path]:
    """The folders that may limit CPU time: of the process's own groups and of all above them, up to the root, where a
    container sees its own."""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            group = top / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def within_quota(count: int) -> int:
    """So many CPUs, or as many as `cpu_quota` allows; at least one."""
    quota = cpu_quota()
    return count if quota is None else min(count, max(1, round(quota)))


def _allowed() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))

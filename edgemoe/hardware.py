"""What this machine has: memory inside its limits, and threads."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from edgemoe import _core

__all__ = [
    "available_bytes",
    "core",
    "exact_process_bytes",
    "forget_peak",
    "isa",
    "memory_rate",
    "num_threads",
    "peak_bytes",
    "process_bytes",
    "trim",
]

_MEMBERSHIP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def process_bytes() -> int:
    """Returns the resident memory of this process in bytes, file-backed pages included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def exact_process_bytes() -> int:
    """Returns the same exactly, by walking the page tables: some kernels count pages per core and add them up late."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return process_bytes()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))


def peak_bytes() -> int:
    """Returns the highest resident memory of this process in bytes, since its start or since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return process_bytes()


def available_bytes() -> int:
    """Returns the bytes that this process could still take: free on the machine and below every cgroup limit.

    Page cache counts as free; the kernel drops it.
    """
    free = int(psutil.virtual_memory().available)
    return min([free, *_cgroup_rooms(_MEMBERSHIP, _CGROUPS)])


def _cgroups(controller: str, membership: Path, root: Path) -> Iterator[tuple[Path, bool]]:
    """Yields each control group around this process, innermost first, and whether it is of version 2."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            base = root / controller
        elif controllers == "":
            base = root / "unified" if (root / "unified").is_dir() else root
        else:
            continue
        group = base / path.lstrip("/")
        while True:
            yield group, controllers == ""
            if group == base:
                break
            group = group.parent


def _cgroup_rooms(membership: Path, root: Path) -> list[int]:
    """Returns, for each memory limit around this process, the bytes that are left below it."""
    rooms = []
    for group, is_v2 in _cgroups("memory", membership, root):
        # Above memory.high the kernel throttles a process as hard as it must.
        limits = ("memory.max", "memory.high") if is_v2 else ("memory.limit_in_bytes",)
        usage = "memory.current" if is_v2 else "memory.usage_in_bytes"
        rooms += [room for name in limits if (room := _room(group, name, usage)) is not None]
    return rooms


def _room(group: Path, limit_name: str, usage_name: str) -> int | None:
    try:
        limit = int((group / limit_name).read_text())
        usage = int((group / usage_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group here, or "max"
        return None
    cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return max(limit - usage + cache, 0)


def num_threads() -> int:
    """Returns how many cores this process may use by its affinity and quota; hyper-threads count once."""
    allowed = len(os.sched_getaffinity(0))
    return max(
        1,
        min(allowed, psutil.cpu_count(logical=False) or allowed, _cpu_quota(_MEMBERSHIP, _CGROUPS)),
    )


def _cpu_quota(membership: Path, root: Path) -> int:
    """Returns the number of cores that quotas around this process allow (docker --cpus); a large number for none."""
    least = 1 << 20
    for group, is_v2 in _cgroups("cpu", membership, root):
        try:
            if is_v2:
                quota, period = map(int, (group / "cpu.max").read_text().split())
            else:
                quota = int((group / "cpu.cfs_quota_us").read_text())
                period = int((group / "cpu.cfs_period_us").read_text())
        except (OSError, ValueError):  # "max", or no such controller
            continue
        if quota > 0:
            least = min(least, math.ceil(quota / period))
    return least


def forget_peak() -> None:
    """Restarts `peak_bytes` from now on, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def isa() -> str:
    """Returns the instruction set of the kernels in use."""
    return _core.isa()


def core() -> str:
    """Returns a line about the core: its compiler, the instruction set in use, and those that this processor has."""
    return f"{_core.compiler()}, {_core.isa()} of {', '.join(_core.usable_isas().split())}"


def memory_rate(threads: int, *, room: int) -> float:
    """Measures the bytes per second that `threads` threads together read from memory.

    Args:
        threads: how many threads read.
        room: bytes that the measurement may take; 256 MiB are enough, with less it may partly measure a cache.
    """
    return _core.memory_rate(min(256 << 20, room), threads)


def trim() -> None:
    """Gives freed heap memory back to the system, where the C library can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return

"""Runs commands under a kernel-enforced memory limit and watches their memory. Needs root."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Outcome", "drop_caches", "missing", "run"]

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a command."""

    code: int
    """The exit code; negative when a signal ended the command, as the kernel's out-of-memory killer does."""
    out: str
    err: str
    seconds: float
    group_peak: int
    """Highest memory of the control group, page cache included; 0 without a limit."""
    anon_peak: int
    """Highest anonymous memory of the process, sampled every 5 ms."""
    peak: int
    """Highest resident memory of the process, libraries included: the kernel's own mark, read every 5 ms."""
    refusals: int
    """How often the kernel had to reclaim to stay below the limit."""
    swapped: int
    """Bytes ever seen in swap."""


def missing() -> str | None:
    """Returns why no command can be limited here, None if it can."""
    try:
        group = _make_group(1 << 30)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    try:
        names = ("memory.limit_in_bytes", "memory.max")
        limit = next((group / name for name in names if (group / name).exists()), None)
        if limit is None:
            return f"{group} has no memory controller"
        if int(limit.read_text()) != 1 << 30:
            return f"{limit} does not keep what is written"
        # A user who may make a group need not be allowed to move a process there.
        moves = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"
        done = subprocess.run([sys.executable, "-c", moves], capture_output=True, check=False)
        return None if done.returncode == 0 else f"{group} takes no process"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        _remove(group)


def drop_caches() -> None:
    """Empties the page cache."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def run(
    command: Sequence[str],
    *,
    limit: int = 0,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> Outcome:
    """Runs a command in a fresh control group of `limit` bytes, 0 for none. Works with cgroups 1 and 2."""
    group = _make_group(limit) if limit else None

    def enter() -> None:
        if group:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    anon = resident = swapped = 0
    try:
        start = time.perf_counter()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                preexec_fn=enter,
                env={**os.environ, **(env or {})},
            )
            assert process.stdin is not None
            killer = threading.Timer(timeout, process.kill)
            killer.start()
            try:
                process.stdin.write(stdin.encode())
                process.stdin.close()
            except BrokenPipeError:
                pass
            while process.poll() is None:
                status = _status(process.pid)
                anon = max(anon, status.get("RssAnon", 0))
                resident = max(resident, status.get("VmHWM", 0))
                swapped = max(swapped, status.get("VmSwap", 0))
                time.sleep(0.005)
            killer.cancel()
            seconds = time.perf_counter() - start
            out.seek(0)
            err.seek(0)
            peak, refusals = _group_counters(group) if group else (0, 0)
            return Outcome(
                process.returncode, out.read().decode(errors="replace"),
                err.read().decode(errors="replace"), seconds, peak, anon, resident, refusals,
                swapped,
            )  # fmt: skip
    finally:
        if group:
            _remove(group)


def _make_group(limit: int) -> Path:
    is_v1 = (_V1 / "memory.limit_in_bytes").exists()
    group = (_V1 if is_v1 else _V2) / f"edgemoe-{os.getpid()}"
    group.mkdir()
    names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if is_v1 else ("memory.max",)
    for name in names:
        if (group / name).exists():
            (group / name).write_text(str(limit))
    if not is_v1 and (group / "memory.swap.max").exists():
        (group / "memory.swap.max").write_text("0")
    return group


def _group_counters(group: Path) -> tuple[int, int]:
    if (group / "memory.max_usage_in_bytes").exists():
        return (
            int((group / "memory.max_usage_in_bytes").read_text()),
            int((group / "memory.failcnt").read_text()),
        )
    events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
    return int((group / "memory.peak").read_text()), int(events["max"])


def _remove(group: Path) -> None:
    for _ in range(50):
        try:
            group.rmdir()
            return
        except OSError:  # the kernel is still tidying up
            time.sleep(0.1)


def _status(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {k: int(v.split()[0]) * 1024 for k, v in (s.split(":", 1) for s in lines) if "kB" in v}

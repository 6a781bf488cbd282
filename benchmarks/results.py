"""Writes a benchmark's rows with the command, the commit and the machine that made them."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from edgemoe import _core, hardware

__all__ = ["commit", "machine", "write"]


def commit() -> str:
    """Returns the revision of this repository; "" outside of one."""
    root = Path(__file__).parents[1]
    found = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    return found.stdout.strip()


def machine() -> dict[str, Any]:
    """Returns what figures depend on: processor, threads, instruction set, memory, kernel; not the machine's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return {
        "cpu": ", ".join(sorted(models)) or platform.machine(),
        "threads": hardware.num_threads(),
        "isa": _core.isa(),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def write(path: Path, rows: Sequence[Any]) -> None:
    """Writes rows as JSON; benchmarks/results/ has those that the documentation quotes. A file's note is kept."""
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    value = {"command": command, "commit": commit(), "machine": machine(), "rows": rows}
    if path.exists() and (note := json.loads(path.read_text()).get("note")):
        value = {"note": note, **value}
    path.write_text(json.dumps(value, indent=1) + "\n")

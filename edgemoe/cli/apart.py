"""Runs a command of edgemoe in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from edgemoe import library

__all__ = ["run_apart"]


def run_apart(*arguments: str) -> int:
    """Runs `edgemoe ARGUMENTS` in another process and returns its exit code. Its memory does not count as this one's.

    The process reads nothing from stdin. It starts in the folder that holds this package: elsewhere, a folder named
    edgemoe in the current directory would be imported instead. So paths among the arguments must be absolute.
    """
    command = [sys.executable, "-m", "edgemoe", *arguments]
    folder = Path(__file__).parents[2]
    kept = {
        name: ":".join(map(str, library.folders()))
        for name in os.environ
        if name == "EDGEMOE_MODELS"
    }
    return subprocess.call(
        command, stdin=subprocess.DEVNULL, cwd=folder, env={**os.environ, **kept}
    )

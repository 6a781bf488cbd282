"""Keeps a benchmark's rows beside the command and the commit that made them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["commit", "write"]


def commit() -> str:
    """Returns the revision of this repository; "" outside of one."""
    root = Path(__file__).parents[1]
    found = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    return found.stdout.strip()


def write(path: Path, rows: Sequence[Any]) -> None:
    """Writes them as JSON."""
    value = {"command": sys.argv, "commit": commit(), "rows": rows}
    path.write_text(json.dumps(value, indent=1) + "\n")

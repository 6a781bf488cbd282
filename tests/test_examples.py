"""Every program in examples/ runs, on a tiny model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("program", EXAMPLES, ids=lambda p: p.stem)
def test_example(program: Path, tiny_moe: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", program, tiny_moe], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "MODEL.moe" in program.read_text().split('"""')[1]

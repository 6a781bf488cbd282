"""A limit on address space that is too small ends a program in one line, before a library aborts."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from edgemoe.errors import OutOfBudget
from edgemoe.space import expect_space

_RUN = "import sys; from edgemoe.cli.entry import edgemoe_run; sys.exit(edgemoe_run())"


@pytest.mark.parametrize("mib", [64, 128, 180, 200, 220, 240, 270])
def test_too_little_address_space_is_one_line(tiny_moe, mib):
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(tiny_moe), "-p", "hi", "-n", "1", "--temp", "0"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20)),
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    if done.returncode == 0:
        assert mib > 190
        assert lines[0].startswith("# ")
    else:
        assert done.returncode == 1
        assert lines[0].startswith("edgemoe-run: ")
        assert "ulimit" in lines[0]


def test_space_is_asked_for_only_where_it_is_limited():
    """In a process of its own, as a limit cannot be raised again."""
    if os.fork() == 0:
        try:
            expect_space(1 << 60, "x")
            resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))
            expect_space(1 << 30, "x")
            try:
                expect_space(65 << 30, "y")
            except OutOfBudget as error:
                os._exit(0 if str(error).startswith("y: the system refused 66560 MiB") else 2)
        finally:
            os._exit(1)
    assert os.wait()[1] == 0

"""Entry points of the installed programs. Ctrl-C during a program's imports ends it without a traceback."""

from __future__ import annotations

import importlib
import os
import signal

from edgemoe.cli.console import note
from edgemoe.errors import OutOfBudget
from edgemoe.space import expect_space

__all__ = ["edgemoe", "edgemoe_run"]


def edgemoe() -> int:
    """Runs the program `edgemoe` and returns its exit code."""
    return _run("edgemoe", "edgemoe.cli.main")


def edgemoe_run() -> int:
    """Runs the program `edgemoe-run` and returns its exit code."""
    return _run("edgemoe-run", "edgemoe.cli.run")


_SPACE, _SPACE_PER_CORE = (
    160 << 20,
    16 << 20,
)  # bytes of address space, for numpy's threads and the tokenizers library


def _run(name: str, module: str) -> int:
    try:
        expect_space(_SPACE + _SPACE_PER_CORE * len(os.sched_getaffinity(0)), "start")
    except OutOfBudget as error:
        note(f"{name}: {error}")
        return 1
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a background job may have to ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = importlib.import_module(module).main
    signal.signal(signal.SIGINT, before)
    code: int = main()
    return code

"""What the installed programs call. Ctrl-C while a program is still being imported ends it without a traceback."""

from __future__ import annotations

import importlib
import signal

__all__ = ["edgemoe", "edgemoe_run"]


def edgemoe() -> int:
    """Is the program `edgemoe`."""
    return _run("edgemoe.cli.main")


def edgemoe_run() -> int:
    """Is the program `edgemoe-run`."""
    return _run("edgemoe.cli.run")


def _run(module: str) -> int:
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a program in the background may have to ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = importlib.import_module(module).main
    signal.signal(signal.SIGINT, before)
    code: int = main()
    return code

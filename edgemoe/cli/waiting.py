"""Shows the progress of a long prompt until the reply begins."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from edgemoe.cli.console import is_terminal, passing

if TYPE_CHECKING:
    from edgemoe.runtime.engine import Engine

__all__ = ["watched"]

_PATIENCE_S, _EVERY_S = 1.0, 0.5
_T = TypeVar("_T")


def watched(engine: Engine, reply: Iterator[_T]) -> Iterator[_T]:
    """Yields a reply's pieces; on a terminal, a line shows the prompt's progress until the first one comes."""
    is_over = threading.Event()
    thread = threading.Thread(target=_watch, args=(engine, is_over), daemon=True)
    if is_terminal(sys.stderr):
        thread.start()
    try:
        first = next(reply, None)
    finally:
        is_over.set()
        if thread.ident is not None:
            thread.join()
    if first is not None:
        yield first
        yield from reply


def _watch(engine: Engine, is_over: threading.Event) -> None:
    start, wrote = time.monotonic(), False
    is_waiting = not is_over.wait(_PATIENCE_S)
    while is_waiting:
        done, total = engine.progress
        if total > 1:
            passed = time.monotonic() - start
            left = f", {passed * (total - done) / done:.0f} s left" if done else ""
            passing(f"# prompt: {done} of {total} tokens{left}")
            wrote = True
        is_waiting = not is_over.wait(_EVERY_S)
    if wrote:
        passing("")

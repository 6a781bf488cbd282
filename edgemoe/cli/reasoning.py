"""Shows what a model reasons before it answers: dimmed, or folded into a line."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgemoe.cli.console import is_terminal, note, passing, write_aside

if TYPE_CHECKING:
    from edgemoe.runtime.chat import Chat
    from edgemoe.text.replies import Piece

__all__ = ["KINDS", "apart", "set_reasoning"]

KINDS = ("dim", "fold", "off")
_EVERY_S = 0.5


def set_reasoning(chat: Chat, kind: str) -> None:
    """Lets a model reason, or for "off" tells its chat template to switch reasoning off.

    Raises:
        ValueError: the template cannot switch it off.
    """
    if kind == "off" and chat.must_reason:
        raise ValueError("reasoning: the model's template has no word for switching it off")
    chat.variables = {"enable_thinking": False} if kind == "off" else {}


def apart(pieces: Iterator[Piece], kind: str) -> Iterator[str]:
    """Yields the answer of a reply; the reasoning before it is shown, but not yielded.

    Args:
        kind: "dim" writes it to a terminal, dimmed; else, and where stdout is no terminal, a line on stderr says how
            long it took.
    """
    shows = kind == "dim" and is_terminal(sys.stdout)
    thought = _Thought(shows)
    try:
        for piece in pieces:
            if piece.kind == "reasoning":
                thought.more(piece.text)
            else:
                thought.end()
                yield piece.text
    finally:
        thought.end()


class _Thought:
    """The display of the reasoning before one answer."""

    def __init__(self, shows: bool) -> None:
        self._shows, self._is_live = shows, not shows and is_terminal(sys.stderr)
        self._start = self._said = 0.0

    def more(self, text: str) -> None:
        now = time.monotonic()
        self._start = self._start or now
        if self._shows:
            write_aside(text)
        elif self._is_live and now - self._said >= _EVERY_S:
            self._said = now
            passing(f"# reasoning for {now - self._start:.0f} s")

    def end(self) -> None:
        """Ends the display; does nothing where there was no reasoning, or it has ended already."""
        if not self._start:
            return
        took, self._start = time.monotonic() - self._start, 0.0
        if self._shows:
            write_aside("\n\n")
            return
        if self._is_live:
            passing("")
        note(f"# reasoned for {took:.1f} s")

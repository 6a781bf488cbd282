"""Reads the user's lines from a terminal, with editing and history where prompt_toolkit is installed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgemoe.cli.console import ask, is_terminal, note
from edgemoe.library import cache_dir

__all__ = ["LineReader"]

_PROMPT, _MORE = "> ", ". "
_LONGEST_LINE = 4095  # bytes: the kernel cuts a terminal's lines there (N_TTY_BUF_SIZE - 1)


class LineReader:
    """A reader of messages from the user, one at a time; a message may have several lines."""

    def __init__(self, commands: Sequence[str] = (), *, keeps_history: bool = True) -> None:
        """Sets up prompt_toolkit, or plain input where that is missing or the terminal is dumb.

        Args:
            commands: the words that Tab completes.
            keeps_history: keep what is typed for later chats.
        """
        self.was_empty = True
        """Whether nothing had been typed when Ctrl-C interrupted the last `read`."""
        self._session: Any = None
        if is_terminal(sys.stderr) and os.environ.get("TERM") not in (None, "", "dumb"):
            try:
                self._session = _session(commands, keeps_history)
            except ImportError:
                note("# prompt_toolkit is not installed: no history, little editing")
        if self._session is None and sys.stdin is not None:
            with contextlib.suppress(
                AttributeError
            ):  # as for arguments: a file name need not be UTF-8
                sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]

    def read(self) -> str:
        """Returns what the user typed, without the end of the line.

        Raises:
            EOFError: Ctrl-D on an empty line, or the terminal is gone.
            KeyboardInterrupt: Ctrl-C; the line is forgotten.
            ValueError: the line is longer than a plain terminal takes.
        """
        return self._one(_PROMPT)

    def read_block(self, end: str) -> str:
        """Returns the lines up to one that is `end`, or up to Ctrl-D. It raises what `read` does, except EOFError."""
        lines: list[str] = []
        with contextlib.suppress(EOFError):
            while (line := self._one(_MORE)).strip() != end:
                lines.append(line)
        return "\n".join(lines)

    def _one(self, prompt: str) -> str:
        if self._session is None:
            return _plain_read(prompt)
        try:
            return str(self._session.prompt(prompt))
        except KeyboardInterrupt:
            self.was_empty = not self._session.default_buffer.text
            raise


def _plain_read(prompt: str) -> str:
    lines: list[str] = []
    while True:
        ask(_MORE if lines else prompt)
        lines.append(input())
        if len(os.fsencode(lines[-1])) >= _LONGEST_LINE and is_terminal(sys.stdin):
            raise ValueError(
                f"this terminal cuts lines at {_LONGEST_LINE} bytes; a backslash at the end goes on in a new line, "
                "and -f FILE takes any length"
            )
        if not lines[-1].endswith("\\"):
            return "\n".join(lines)
        lines[-1] = lines[-1][:-1]


def _session(commands: Sequence[str], keeps_history: bool = True) -> Any:
    """Returns a prompt_toolkit session; prompts go to stderr, so that stdout has replies only."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()
    here = has_focus(DEFAULT_BUFFER)  # and not the search line of Ctrl-R

    @keys.add("enter", filter=here)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=here)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    class _Kept(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # a full disk must not end the chat
                super().store_string(string)

    path = _history_path() if keeps_history else None
    history: History = _Kept(str(path)) if path else InMemoryHistory()
    output = create_output(stdout=sys.stderr)
    if hasattr(output, "enable_cpr"):
        output.enable_cpr = False  # asks for the cursor's position; not all terminals answer
    return PromptSession(
        history=history,
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        multiline=True,  # for pasted lines; Enter is bound above
        prompt_continuation=lambda width, number, wrap: _MORE,
        output=output,
    )


def _history_path() -> Path | None:
    """Returns the file of earlier messages, which only the user may read; None if it cannot be made."""
    try:
        path = cache_dir() / "history"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return None
    return path

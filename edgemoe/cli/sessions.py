"""Conversations that are kept by name from one start to the next."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

from edgemoe.file.whole import locked
from edgemoe.runtime.chat import Chat

__all__ = ["hold", "keep", "listed", "resume", "session_path"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def session_path(name: str) -> Path:
    """Returns where a conversation is kept, in a folder that only the user may read.

    Raises:
        ValueError: the name has other characters than it may have, or too many.
        OSError: the folder cannot be made.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"--session: expected a name of letters, digits, ., _ and -, got {name!r}")
    folder = _folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / f"{name}.json"


def hold(path: Path) -> io.FileIO:
    """Locks a conversation against other processes, which would overwrite it, until the returned file is closed.

    Raises:
        ValueError: another process has it.
        OSError: the folder cannot be written.
    """
    try:
        return locked(path.with_suffix(".lock"), busy="is open elsewhere", create=True, ours=True)
    except BlockingIOError:
        raise ValueError(f"--session: {path.stem} is open in another process") from None


def resume(chat: Chat, path: Path) -> str:
    """Loads a kept conversation, if there is one, and returns a line about it.

    Raises:
        FormatError: the file is no conversation.
        OSError: it cannot be read.
    """
    if not path.exists():
        return f"session {path.stem}: new, kept in {path}"
    chat.load(path)
    return f"session {path.stem}: {len(chat.messages)} messages so far, kept in {path}"


def keep(chat: Chat, path: Path) -> None:
    """Writes the conversation. Raises OSError: it cannot be written."""
    if chat.messages or path.exists():
        chat.save(path, is_private=True)


def listed() -> Iterator[str]:
    """Yields the names of kept conversations, the last used first."""
    found = sorted(_folder().glob("*.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    yield from (path.stem for path in found)


def _folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".local/state"
    return root / "edgemoe" / "sessions"

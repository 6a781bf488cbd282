"""The library of kept models. There is no index besides the folders themselves.

A model is a plain `.moe` file in one of the folders; one from a hub is in a subfolder. Its name is its path in the
folder without the ending: `Qwen/Qwen3-30B-A3B`. It may be copied, linked or deleted by hand at any time.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "DEMO",
    "DEMO_FILE",
    "Kept",
    "Unfinished",
    "cache_dir",
    "demo_path",
    "disk_bytes",
    "find",
    "folders",
    "models",
    "near",
    "note_use",
    "unfinished",
]

DEMO = "demo"
DEMO_FILE = "smollm2-moe-v4.moe"  # a new number whenever what is built changes
_ENDING, _PART, _PULL = ".moe", ".moe.part", ".moe.pull"


@dataclass(frozen=True, slots=True)
class Kept:
    """A model that is kept here."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What an interrupted pull or conversion has left, and the next one continues."""

    name: str
    paths: tuple[Path, ...]
    size: int
    """The bytes that they take on the disk."""


def cache_dir() -> Path:
    """Returns the user's cache directory for edgemoe.

    Raises:
        FileNotFoundError: the user has no home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification wants relative paths ignored.
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "edgemoe"
    except RuntimeError:
        raise FileNotFoundError(
            "no cache folder: expected HOME or XDG_CACHE_HOME to be set"
        ) from None


def folders() -> list[Path]:
    """Returns the folders of models: those of EDGEMOE_MODELS, else one in the cache. New models go to the first.

    Raises:
        FileNotFoundError: the user has no home directory.
    """
    given = [Path(p).absolute() for p in os.environ.get("EDGEMOE_MODELS", "").split(":") if p]
    return given or [cache_dir() / "models"]


def demo_path() -> Path:
    """Returns where the demo model is or will be. Raises FileNotFoundError: the user has no home directory."""
    return cache_dir() / DEMO_FILE


def models() -> list[Kept]:
    """Returns the kept models, sorted by name; of several with the same name, the one in the first folder."""
    found: dict[str, Path] = {}
    with contextlib.suppress(FileNotFoundError):
        if demo_path().is_file():
            found[DEMO] = demo_path()
    for folder in _folders():
        for path in _under(folder):
            if path.name.endswith(_ENDING) and path.is_file():
                found.setdefault(_name(folder, path), path)
    return [Kept(name, found[name]) for name in sorted(found)]


def find(text: str) -> Path | None:
    """Returns the model of a name. The name's last part is enough if only one model has it; None if there is none."""
    text = text.removesuffix(_ENDING)
    if text == DEMO_FILE.removesuffix(_ENDING):  # the chat's greeting calls it so
        text = DEMO
    kept = models()
    for model in kept:
        if model.name == text:
            return model.path
    last = [model.path for model in kept if model.name.rpartition("/")[2] == text]
    return last[0] if len(last) == 1 else None


def near(text: str) -> list[str]:
    """Returns up to three names of models that a mistyped name may mean."""
    # The demo counts even if it is not built yet, also by the name that the chat's greeting gives it.
    names = {DEMO: DEMO, DEMO_FILE.removesuffix(_ENDING): DEMO_FILE.removesuffix(_ENDING)}
    for model in models():
        names[model.name.casefold()] = model.name
        names.setdefault(model.name.rpartition("/")[2].casefold(), model.name)
    wanted = text.casefold()
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.6)
    close += [key for key in names if len(wanted) > 2 and wanted in key]
    return [name for name in dict.fromkeys(names[key] for key in close) if name != text][:3]


def unfinished() -> list[Unfinished]:
    """Returns the pulls and conversions that were begun and not finished."""
    left: dict[str, list[Path]] = {}
    for folder in _folders():
        for path in _under(folder):
            for ending in (_PART, _PULL, f"{_PART}.log"):
                if path.name.endswith(ending):
                    name = _name(folder, path.with_name(path.name.removesuffix(ending) + _ENDING))
                    left.setdefault(name, []).append(path)
    return [Unfinished(n, tuple(p), sum(map(disk_bytes, p))) for n, p in sorted(left.items())]


def note_use(path: Path) -> None:
    """Sets the time of a model's last use, which is the file's access time, to now."""
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _folders() -> list[Path]:
    try:
        return folders()
    except FileNotFoundError:
        return []


def _under(folder: Path) -> Iterator[Path]:
    """Yields the files and folders below a folder, except those that cannot be read."""
    for where, dirs, files in os.walk(folder):
        yield from (Path(where, name) for name in (*files, *dirs))
        dirs[:] = [name for name in dirs if not name.endswith(_PULL)]


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix().removesuffix(_ENDING)


def disk_bytes(path: Path) -> int:
    """Returns the bytes that a file, or a folder with all its contents, takes on the disk."""
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    total = 0
    for each in paths:
        with contextlib.suppress(OSError):
            total += each.lstat().st_blocks * 512
    return total

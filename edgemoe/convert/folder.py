"""Reads a checkpoint's small files: whole, of bounded size, and only if they belong to the checkpoint."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from edgemoe.errors import FormatError

__all__ = ["exists", "missing", "other_tokenizer", "read_file", "require_file"]

_MOST_BYTES = 64 << 20
_OTHER_TOKENIZERS = (("tokenizer.model",), ("vocab.json", "merges.txt"))
_POINTER = b"version https://git-lfs"


def read_file(folder: Path, name: str, *, is_copied: bool = True) -> bytes | None:
    """Returns the content of a file in a checkpoint's directory; None if it does not exist.

    Args:
        is_copied: the content will be copied into the model, which may be published. So a link to a file outside
            the directory is refused, unless it leads into the Hugging Face cache that the directory belongs to.

    Raises:
        FormatError: the file is a refused or dangling link, not a regular file, too large, or a git-lfs pointer.
        OSError: it cannot be read.
    """
    path = folder / name
    if not exists(path):
        return None
    target = Path(os.path.realpath(path))
    if is_copied and not any(target.is_relative_to(root) for root in _roots(folder)):
        raise FormatError(
            f"{path}: is a link to {target}, outside of the checkpoint; expected a file of its own"
        )
    content = _start(target, path, _MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise FormatError(f"{path}: expected at most {_MOST_BYTES >> 20} MiB")
    return content


def exists(path: Path) -> bool:
    """Returns whether something has this name.

    Raises:
        FormatError: it is a dangling link, as an interrupted download leaves in the Hugging Face cache.
    """
    if path.is_symlink() and not path.exists():
        raise missing(path)
    return path.exists()


def missing(path: Path) -> FormatError:
    """Returns the error for a file that does not exist, or whose name is a dangling link."""
    if path.is_symlink():
        target = os.readlink(path)
        return FormatError(
            f"{path}: is a link to {target}, which does not exist; download it again"
        )
    return FormatError(f"{path}: no such file")


def require_file(path: Path) -> None:
    """Checks that a file exists and is not a git-lfs pointer or the dangling link of an interrupted download.

    Raises:
        FormatError: it does not exist, is not a regular file, is such a pointer or link, or cannot be read.
    """
    if not exists(path):
        raise missing(path)
    try:
        _start(path, path, len(_POINTER))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None


def other_tokenizer(folder: Path) -> str:
    """Returns, in words, the files of a tokenizer in an unsupported format; empty if there are none."""
    for names in _OTHER_TOKENIZERS:
        if all((folder / name).is_file() for name in names):
            return " and ".join(names)
    return ""


def _start(target: Path, path: Path, most: int) -> bytes:
    """Returns the first `most` bytes of a file; error messages name `path`."""
    with open(target, "rb", opener=_opener) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise FormatError(f"{path}: expected a regular file")
        content = file.read(min(most, found.st_size))  # `read` allocates what it is asked for
    if content.startswith(_POINTER):
        raise FormatError(f"{path}: is a git-lfs pointer, not the file; git lfs pull fetches that")
    return content


def _opener(path: str, flags: int) -> int:
    return os.open(
        path, flags | os.O_NONBLOCK | os.O_CLOEXEC
    )  # does not wait for the other end of a pipe


def _roots(folder: Path) -> list[Path]:
    """Returns the folders in which a checkpoint's files may lie. Files of a cache snapshot are links to `blobs`."""
    folder = Path(os.path.realpath(folder))
    blobs = [folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else []
    return [folder, *blobs]

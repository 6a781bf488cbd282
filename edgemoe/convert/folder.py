"""The files beside the weights: read whole, of bounded size, and only those that belong to the checkpoint."""

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
    """Returns the content of a file of a checkpoint's directory, None where there is none.

    Args:
        is_copied: the content goes into the model, and so to others: a link to a file outside of the directory, and
            of the Hugging Face cache that it lies in, is refused.

    Raises:
        FormatError: it is such a link, leads to nothing, is no regular file, too large, or a git-lfs pointer.
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
    """Says whether there is something of this name.

    Raises:
        FormatError: it is a link to nothing, as an interrupted download leaves in the Hugging Face cache.
    """
    if path.is_symlink() and not path.exists():
        raise missing(path)
    return path.exists()


def missing(path: Path) -> FormatError:
    """Returns the error that says that a file is not there, though perhaps its name is."""
    if path.is_symlink():
        target = os.readlink(path)
        return FormatError(
            f"{path}: is a link to {target}, which does not exist; download it again"
        )
    return FormatError(f"{path}: no such file")


def require_file(path: Path) -> None:
    """Checks that there is a file, and not what git or a download that was broken off has left in its place.

    Raises:
        FormatError: there is none, or it cannot be read.
    """
    if not exists(path):
        raise missing(path)
    try:
        _start(path, path, len(_POINTER))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None


def other_tokenizer(folder: Path) -> str:
    """Returns the files of a tokenizer in a form that is not read, in words; empty where there are none."""
    for names in _OTHER_TOKENIZERS:
        if all((folder / name).is_file() for name in names):
            return " and ".join(names)
    return ""


def _start(target: Path, path: Path, most: int) -> bytes:
    """Returns the first bytes of a file, which errors call `path`."""
    with open(target, "rb", opener=_opener) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise FormatError(f"{path}: expected a regular file")
        content = file.read(min(most, found.st_size))  # which takes the memory at once
    if content.startswith(_POINTER):
        raise FormatError(f"{path}: is a git-lfs pointer, not the file; git lfs pull fetches that")
    return content


def _opener(path: str, flags: int) -> int:
    return os.open(
        path, flags | os.O_NONBLOCK | os.O_CLOEXEC
    )  # a pipe's other end is not waited for


def _roots(folder: Path) -> list[Path]:
    """Returns where the files of a checkpoint may lie: a snapshot's are links into its repository's `blobs`."""
    folder = Path(os.path.realpath(folder))
    blobs = [folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else []
    return [folder, *blobs]

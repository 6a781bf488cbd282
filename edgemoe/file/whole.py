"""Files that are written atomically, and files that only one process at a time may change.

A name that the user gives may be a symbolic link; then the file that it leads to is replaced or locked. A name that is
made up here or by a caller (`X.part`, a lock, a temporary file) is `ours`. A link of such a name is never followed, as
somebody else may have planted it in a shared directory. Content is on disk before it gets its name, and the directory
entry is on disk before the caller continues.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "is_at",
    "locked",
    "meant",
    "named",
    "new_folder",
    "pwrite",
    "rename",
    "require_new",
    "sync_directory",
    "whole_file",
    "write_whole",
]

Name = str | os.PathLike[str]
Buffer = bytes | memoryview


def write_whole(
    path: Name, content: bytes, *, is_private: bool = False, ours: bool = False
) -> None:
    """Writes a file at once; see `whole_file`."""
    with whole_file(path, is_private=is_private, ours=ours) as file:
        file.write(content)


@contextlib.contextmanager
def whole_file(path: Name, *, is_private: bool = False, ours: bool = False) -> Iterator[BinaryIO]:
    """Yields a file to write, which gets its name when the block ends; after an error nothing has changed on disk.

    An existing file is replaced and its mode kept. Something that is not a regular file, such as a pipe, is written
    directly.

    Args:
        is_private: only its owner may read a new file.
        ours: the name is not the user's: whatever has it, such as a link, is replaced, and its mode is not kept.

    Raises:
        OSError: the file cannot be written; the error names `path`.
    """
    with named(path):
        target, mode = (Path(path), None) if ours else (meant(path), _mode(path))
    if mode is not None and not stat.S_ISREG(mode):
        with named(path), open(path, "wb") as file:
            yield file
        return
    # A unique temporary name: two processes may write the same file, and the last one wins.
    temporary = target.with_name(f".edgemoe-{secrets.token_hex(8)}.tmp")
    with named(path, temporary, target):
        rights = 0o600 if is_private else 0o666
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, rights)
        try:
            with open(fd, "wb") as file:
                if mode is not None:
                    os.fchmod(fd, mode & 0o777)
                yield file
                file.flush()
                os.fsync(fd)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_directory(target)


def require_new(path: Name) -> None:
    """Raises FileExistsError if anything has the name, even a dangling link."""
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "exists; expected a name that nothing has", str(path))


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to fill, `path`.part, which is renamed to `path` when the block ends; an error removes it.

    Raises:
        FileExistsError: `path` or `path`.part exists.
        OSError: the folder cannot be made.
    """
    require_new(path)
    part = path.with_name(f"{path.name}.part")
    require_new(part)  # an existing one may be another process's or the user's: not ours to remove
    part.mkdir(parents=True)
    try:
        with named(path):
            yield part
            for file in part.iterdir():
                _sync(file)
            sync_directory(part / "any")
            require_new(path)
            rename(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename(old: Path, new: Path) -> None:
    """Renames a file whose content is on disk, and syncs the directory."""
    os.replace(old, new)
    sync_directory(new)


def locked(
    path: Name,
    *,
    busy: str,
    create: bool = False,
    ours: bool = False,
    wait: Callable[[], None] | None = None,
) -> io.FileIO:
    """Opens a regular file to read and write, and locks it (flock) until it is closed or the process ends in any way.

    If the file was replaced or renamed between opening and locking, the file that now has the name is opened instead.

    Args:
        busy: the error's text when another process has the lock.
        create: make the file if it does not exist.
        ours: the name is not the user's: a symbolic link, or a file with another hard link, is refused.
        wait: called before waiting for another process to release the lock; None raises instead.

    Returns:
        The file, unbuffered: a failed write must not be retried when the file is closed.

    Raises:
        BlockingIOError: another process has the lock.
        OSError: the file cannot be opened, or is not a regular file; with `ours`, also if it is a link.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    with named(path):
        target = Path(path) if ours else meant(path)
        while True:
            file = open(_open(target, flags), "r+b", buffering=0)  # noqa: SIM115 (the caller's)
            try:
                _require_plain(file, target, ours=ours)
                _lock(file, wait, BlockingIOError(errno.EAGAIN, busy, str(path)))
                if is_at(file, target):
                    return file
            except BaseException:
                file.close()
                raise
            file.close()


def pwrite(file: io.FileIO, data: Buffer, offset: int) -> None:
    """Writes all of `data` at an offset."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file.fileno(), view, offset)
        view, offset = view[count:], offset + count


def is_at(file: io.FileIO, path: Name) -> bool:
    """Returns whether `path` still names an open file."""
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file.fileno()), there)


@contextlib.contextmanager
def named(path: Name, *others: Name) -> Iterator[None]:
    """Makes an OSError without a file name, or with one of `others`, name `path` instead."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None or error.filename in [os.fspath(o) for o in others]
        if error.errno is None or not unnamed:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def meant(path: Name) -> Path:
    """Returns the path that a name given by the user leads to through links, whether a file exists there or not.

    Raises:
        OSError: a link cannot be followed.
    """
    with contextlib.suppress(FileNotFoundError):
        os.stat(path)  # the kernel refuses to follow a link that others left in a shared directory
    return Path(os.path.realpath(path))


def _mode(path: Name) -> int | None:
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_plain(path, "a symbolic link") from None
        raise


def _require_plain(file: io.FileIO, path: Path, *, ours: bool) -> None:
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
        raise _not_plain(path, "not a regular file")
    if ours and found.st_nlink > 1:
        raise _not_plain(path, "another name of a file")


def _not_plain(path: Path, what: str) -> OSError:
    return OSError(errno.EEXIST, f"is {what}; expected none or a file of edgemoe's own", str(path))


def _lock(file: io.FileIO, wait: Callable[[], None] | None, busy: BlockingIOError) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if wait is None:
            raise busy from None
        wait()
        fcntl.flock(file, fcntl.LOCK_EX)


def sync_directory(path: Path) -> None:
    """Syncs the directory entry of a file to disk."""
    try:
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # a directory that may be written but not read
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
            errno.EBADF,
        ):  # some file systems cannot
            raise
    finally:
        os.close(fd)

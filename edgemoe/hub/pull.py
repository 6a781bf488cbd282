"""The conversion of a hub's model while its files arrive."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import library
from edgemoe.convert.checkpoint import Bytes, StoredCheckpoint
from edgemoe.convert.convert import convert
from edgemoe.convert.open import open_checkpoint
from edgemoe.errors import FormatError, size_text
from edgemoe.file.whole import locked, write_whole
from edgemoe.hub.cache import CachedRepository
from edgemoe.hub.landing import Landing
from edgemoe.hub.name import HubName
from edgemoe.hub.outline import Chosen, Source, choose, outline
from edgemoe.hub.remote import HubError, Repository, Unreachable

__all__ = ["kept_path", "open_repository", "pull", "saying_what_is_here"]

_ORIGIN = "origin"


def kept_path(name: HubName) -> Path:
    """Returns the path where a model is or will be kept. Raises FileNotFoundError: the user has no home directory."""
    return library.folders()[0] / f"{name.kept}.moe"


def open_repository(name: HubName, *, retries: int = 5) -> Source:
    """Opens a repository on the hub, or, where HF_HUB_OFFLINE is set, in Hugging Face's cache.

    Args:
        name: names the repository and the revision.
        retries: how often a busy hub is asked again.

    Raises:
        Unreachable: the hub cannot be reached or, with HF_HUB_OFFLINE, the cache lacks the repository.
        HubError: there is no such repository or revision, or access is denied.
    """
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        return CachedRepository(name.repo, name.revision)
    return Repository(name.repo, name.revision, retries=retries)


@contextlib.contextmanager
def saying_what_is_here(name: HubName) -> Iterator[None]:
    """Adds to an `Unreachable` error what of the model is here already, and what to do."""
    try:
        yield
    except Unreachable as error:
        raise Unreachable(f"{error}; {_here(name)}") from None


def _here(name: HubName) -> str:
    if kept_path(name).is_file():
        return f"what was fetched of it before is here, and edgemoe-run {name.kept} runs it"
    if _is_cached(name):
        return f"Hugging Face's cache has it: HF_HUB_OFFLINE=1 edgemoe pull {name} makes the model of that"
    again = f"edgemoe pull {name}"
    for left in library.unfinished():
        if left.name == name.kept:
            return f"{size_text(left.size)} of it are here, and {again} goes on there once a hub can be asked"
    return f"nothing of it is here: {again} fetches it once a hub can be asked; edgemoe list shows what runs without"


def _is_cached(name: HubName) -> bool:
    """Returns whether Hugging Face's cache has the files that a model would be made of."""
    try:
        chosen = choose(CachedRepository(name.repo, name.revision), name)
    except (HubError, FormatError, OSError):
        return False
    return chosen.is_gguf or any(file.name == "config.json" for file in chosen.small)


def pull(
    name: HubName,
    *,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
    retries: int = 5,
) -> Path:
    """Fetches a model's files one by one, converts each as it lands and returns the `.moe` file.

    At any moment the disk holds the `.moe` file, one file of its source, and of earlier files the bytes of records that
    also need a later file. After an interruption of any kind, the next call goes on. The `.moe` file appears under its
    name when it is whole; by then the checksum of every fetched file has been checked. Files that Hugging Face's cache
    has are read from there, and stay.

    Args:
        name: the model.
        say: is told what happens, in lines.
        progress: is told the bytes that were fetched and written so far, and the total of both.
        retries: how often a busy hub is asked again.

    Raises:
        Unreachable: the hub cannot be reached; says what is here already.
        HubError: the hub does not give a file, or gave a wrong one.
        FormatError: the model is not sound, or not supported.
        ValueError: there is no level of so many bits.
        OSError: the disk is full, or cannot be written.
    """
    out = kept_path(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "cannot be written", str(out.parent))
    lock = out.with_name(f".{out.name}.lock")
    with saying_what_is_here(name), locked(
        lock, create=True, ours=True, busy="",
        wait=lambda: say(f"another process pulls {name}; waiting for it"),
    ):  # fmt: skip
        try:
            _pull(open_repository(name, retries=retries), name, out, say, progress)
        finally:
            lock.unlink(missing_ok=True)
    return out


def _pull(
    repository: Source,
    name: HubName,
    out: Path,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> None:
    chosen = choose(repository, name)
    if chosen.note:
        say(f"{name}: {chosen.note}")
    unsummed = [f.name for f in (*chosen.small, *chosen.weights) if not f.sum]
    if unsummed:
        say(f"{name}: there are no sums of {len(unsummed)} files: only their sizes are checked")
    origin = _origin(repository, chosen)
    if out.is_file() and _files(out) == origin["files"]:
        say(f"{name}: is here, and the hub has no other")
        return
    folder = out.with_name(f"{out.name}.pull")
    _keep_or_clear(folder, origin["files"])
    checkpoint = _Current(outline(repository, chosen, folder), name.repo)
    fetched, written = (0, chosen.size), (0, 0)

    def report() -> None:
        progress(fetched[0] + written[0], fetched[1] + written[1])

    def has_fetched(done: int, total: int) -> None:
        nonlocal fetched
        fetched = (done, total)
        report()

    def has_written(done: int, total: int) -> None:
        nonlocal written
        written = (done, total)
        report()

    landing = Landing(
        repository, chosen.weights, folder, checkpoint, progress=has_fetched, reopen=checkpoint.reopen
    )  # fmt: skip
    if out.is_file():
        say(f"{name}: the hub has another version of it, which replaces the one here")
    convert(
        checkpoint, out, bits=name.bits, progress=has_written, origin=origin, arrivals=landing,
        say=lambda text: say(f"{name}: {text}"),
    )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)


def _origin(repository: Source, chosen: Chosen) -> dict[str, Any]:
    digest = hashlib.sha256()
    for file in sorted((*chosen.small, *chosen.weights), key=lambda f: f.name):
        digest.update(f"{file.name} {file.size} {file.sum}\n".encode())
    return {"hub": repository.repo, "commit": repository.commit, "files": digest.hexdigest()}


def _files(path: Path) -> object:
    """Returns the digest over the files that a model was made from; None where the model does not hold one."""
    from edgemoe.file.reader import open_moe

    try:
        origin = open_moe(path).source.get("origin")
    except (FormatError, OSError):
        return None
    return origin.get("files") if isinstance(origin, Mapping) else None


def _keep_or_clear(folder: Path, files: str) -> None:
    """Makes the folder of a pull; first removes one that an interrupted pull of other files has left."""
    mark = folder / _ORIGIN
    if folder.is_symlink():  # it may lead to another user's folder, who could change files
        raise FileExistsError(errno.EEXIST, "is a symbolic link; expected none", str(folder))
    if folder.is_dir() and (not mark.is_file() or mark.read_bytes() != files.encode()):
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    write_whole(mark, files.encode(), ours=True)


class _Current:
    """A checkpoint in a folder whose files come and go. GGUF files are memory-mapped, so they must be opened again."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._now: StoredCheckpoint = open_checkpoint(path)
        self.name = name
        self.identity = ""
        self.config, self.files, self.shapes = self._now.config, self._now.files, self._now.shapes

    def reopen(self) -> None:
        if self._path.is_file():
            self._now = open_checkpoint(self._path)

    def tensor(self, name: str) -> NDArray[np.float32]:
        return self._now.tensor(name)

    def places(self, name: str) -> Iterator[Bytes]:
        return self._now.places(name)

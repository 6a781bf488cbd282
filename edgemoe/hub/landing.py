"""Weights that arrive one file at a time: each file is converted while it is here, then makes room for the next."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from edgemoe.convert.checkpoint import Bytes, StoredCheckpoint, require_tied
from edgemoe.convert.source import SourceModel
from edgemoe.file.writer import Writer
from edgemoe.hub.outline import Source, write_hollow
from edgemoe.hub.remote import RemoteFile

__all__ = ["Landing"]

_TIED = "the head beside a tied embedding"  # waits for files like a record, but is only checked
_MARGIN = 16 << 20  # bytes of disk for folders and logs


class Landing:
    """The order in which records can be converted while files arrive; passed to `convert` as `arrivals`.

    In the folder of `outline`, a file that has landed is a link into `landed` or into Hugging Face's cache. Any other
    file has only its header, and holes for the rest. A file that has left also keeps the bytes of records that wait for
    a later file.
    """

    def __init__(
        self,
        repository: Source,
        files: Sequence[RemoteFile],
        folder: Path,
        checkpoint: StoredCheckpoint,
        *,
        progress: Callable[[int, int], None],
        reopen: Callable[[], None],
    ) -> None:
        """Prepares the landing; nothing is fetched yet.

        Args:
            repository: where the files come from.
            files: the files with weights, in the order in which they are fetched.
            folder: the folder that `outline` has made.
            checkpoint: the checkpoint that is open there.
            progress: is told how many bytes of these files have arrived, and their total.
            reopen: is called when files have been replaced.
        """
        self._repository, self._files = repository, tuple(files)
        self._folder, self._landed = folder, folder / "landed"
        self._checkpoint = checkpoint
        self._kept: set[str] = set()
        self._progress, self._reopen = progress, reopen
        self._total = sum(file.size for file in files)
        self._places: dict[str, list[Bytes]] = {}

    def __call__(self, model: SourceModel, writer: Writer, missing: Sequence[str]) -> Iterator[str]:
        """Yields the names of the missing records as soon as each can be read, file by file.

        Raises:
            HubError: the hub does not give a file, or gave a wrong one.
            OSError: the disk is full, or cannot be written.
            FormatError: a head that should be a copy of the embedding is not.
        """
        tied = model.tied
        waiting = {name: list(model.needs(name)) for name in missing}
        if tied is not None and missing:
            waiting[_TIED] = list(tied)
        self._places = {
            name: [p for tensor in tensors for p in self._checkpoint.places(tensor)]
            for name, tensors in waiting.items()
        }
        order = {Path(file.name).name: i for i, file in enumerate(self._files)}
        last = {
            name: max((order[p.path.name] for p in places), default=-1)
            for name, places in self._places.items()
        }
        yield from (name for name in missing if last[name] < 0)
        done = 0
        for i, file in enumerate(self._files):
            ready = [name for name in waiting if last[name] == i]
            for name in ready:
                waiting.pop(name)
            wanted = list(self._of(file, [*ready, *waiting]))
            if wanted:
                self._land(file, writer, done)
                for name in ready:
                    if name == _TIED:
                        assert tied is not None
                        require_tied(self._checkpoint, tied[1])
                    else:
                        yield name
                writer.sync()  # records made from these files must be on disk before the files go
                self._leave(self._files[: i + 1], waiting)
            done += file.size
            self._progress(done, self._total)

    def _of(self, file: RemoteFile, names: Sequence[str] | Mapping[str, object]) -> Iterator[Bytes]:
        """Yields the byte ranges of a file that these records need."""
        base = Path(file.name).name
        for name in names:
            yield from (place for place in self._places[name] if place.path.name == base)

    def _path(self, file: RemoteFile) -> Path:
        return self._folder / Path(file.name).name

    def _land(self, file: RemoteFile, writer: Writer, before: int) -> None:
        path = self._path(file)
        if path.is_symlink() and path.exists():
            return
        cached = self._repository.cached(file.name)
        target = cached or self._landed / path.name
        if cached is None and not target.is_file():
            self._landed.mkdir(exist_ok=True)
            self._require_room(file, writer)
            self._repository.download(
                file.name, target, lambda have: self._progress(before + have, self._total)
            )
        link = path.with_name(f".{path.name}.link")
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        os.replace(link, path)
        self._reopen()

    def _leave(self, files: Sequence[RemoteFile], waiting: Mapping[str, object]) -> None:
        """Removes files, except for the bytes that records still wait for."""
        for file in files:
            path, kept = self._path(file), list(self._of(file, waiting))
            target = self._landed / path.name
            if not target.exists() and path.name not in self._kept:
                continue  # it is in Hugging Face's cache, or has only its header already
            write_hollow(path, file.size, (), [*_always(path), *kept])
            target.unlink(missing_ok=True)
            self._kept.discard(path.name)
            if kept:
                self._kept.add(path.name)
            self._reopen()

    def _require_room(self, file: RemoteFile, writer: Writer) -> None:
        have = sum(p.lstat().st_blocks * 512 for p in self._landed.glob(f"{Path(file.name).name}*"))
        wanted = max(file.size - have, 0) + writer.total_bytes - writer.written_bytes + _MARGIN
        free = shutil.disk_usage(self._folder).free
        if free < wanted:
            raise OSError(
                errno.ENOSPC,
                f"the disk has {free / 1e6:.0f} MB free; the model and one file of its source take {wanted / 1e6:.0f}",
                str(self._folder),
            )


def _always(path: Path) -> Iterator[Bytes]:
    """Yields the byte ranges that opening a file reads."""
    if path.suffix == ".gguf":
        from edgemoe.convert.gguf import header_end

        end, places = header_end(path, path.stat().st_size)
        yield Bytes(path, 0, end)
        yield from (Bytes(path, start, stop) for start, stop in places)
    else:
        with open(path, "rb") as file:
            yield Bytes(path, 0, 8 + int.from_bytes(file.read(8), "little"))

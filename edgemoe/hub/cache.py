"""A repository in Hugging Face's cache, for use where the hub must not be asked."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from edgemoe.hub.remote import HubError, RemoteFile, Unreachable, is_sound

__all__ = ["CachedRepository"]

_SHA256, _SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


class CachedRepository:
    """The files that an earlier download has left in the cache; implements `Source`."""

    def __init__(self, repo: str, revision: str | None = None) -> None:
        """Finds the revision in the cache.

        Raises:
            Unreachable: the repository or the revision is not in the cache.
        """
        from huggingface_hub import snapshot_download

        self.repo = repo
        try:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except (OSError, ValueError):
            raise Unreachable(
                f"{repo}: HF_HUB_OFFLINE is set, and it is not in Hugging Face's cache"
            ) from None
        self._folder = folder
        self.commit = folder.name
        self.files: Mapping[str, RemoteFile] = {
            path.relative_to(folder).as_posix(): self._file(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Returns the bytes of a file from `start` to before `stop`."""
        with open(self._folder / name, "rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else max(stop - start, 0))

    def read_whole(self, name: str) -> bytes:
        """Returns the content of a file."""
        return self.read(name)

    def cached(self, name: str) -> Path:
        """Returns the path of a file.

        Raises:
            HubError: its size or checksum is wrong.
        """
        path = Path(os.path.realpath(self._folder / name))
        if not is_sound(path, self.files[name]):
            raise HubError(f"{self.repo}: {path}: is not what was downloaded; its sum is wrong")
        return path

    def download(self, name: str, path: Path, progress: Callable[[int], None]) -> None:
        """Is never called: all files are there already."""
        raise AssertionError(name)

    def _file(self, path: Path) -> RemoteFile:
        blob = os.path.basename(os.path.realpath(path))  # the name of a blob is its checksum
        name = path.relative_to(self._folder).as_posix()
        return RemoteFile(
            name,
            path.stat().st_size,
            blob if _SHA256.fullmatch(blob) else None,
            blob if _SHA1.fullmatch(blob) else None,
        )

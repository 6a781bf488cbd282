"""A repository on a hub: its files, their checksums, and their bytes, whole or in part."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe.errors import EdgemoeError, quoted, shortened
from edgemoe.file.whole import locked, named, pwrite

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

__all__ = ["HubError", "RemoteFile", "Repository", "Unreachable", "is_sound"]

_BLOCK = 1 << 20
_PATIENCE = 4  # attempts in a row without a new byte before a download is given up
_UNCOMPRESSED = {"Accept-Encoding": "identity"}  # otherwise ranges may count compressed bytes


class HubError(EdgemoeError, OSError):
    """A hub did not give what was asked for; the message says what, and what can be done."""


class Unreachable(HubError):
    """The hub cannot be reached; the message says why."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository."""

    name: str
    size: int
    sha256: str | None
    """SHA-256 of the content, in hex; None for small files, which have only `git_sum`."""
    git_sum: str | None
    """Git's SHA-1 of the content, in hex."""

    @property
    def sum(self) -> str:
        """The checksum of the content: `sha256`, else `git_sum`; "" where the hub gives neither."""
        return self.sha256 or self.git_sum or ""


class Repository:
    """One revision of a repository on a hub, fixed to a commit when it is opened."""

    def __init__(self, repo: str, revision: str | None = None, *, retries: int = 5) -> None:
        """Asks the hub at HF_ENDPOINT for the list of files, with the rights of HF_TOKEN.

        Args:
            repo: user/repo.
            revision: a branch, tag or commit; None for the main branch.
            retries: how often a busy hub is asked again.

        Raises:
            Unreachable: the hub does not answer.
            HubError: the hub refuses, or HF_HUB_OFFLINE is set.
        """
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # our own error line says it
        self.repo = repo
        self._retries = retries
        _require_endpoint()
        with self._said(""):
            from huggingface_hub import HfApi

            try:
                info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=30)
            except (AttributeError, KeyError, TypeError, json.JSONDecodeError):
                raise HubError(f"{repo}: {_endpoint()} does not answer as a hub does") from None
        self.commit = str(info.sha)
        self.files: Mapping[str, RemoteFile] = _Files(info.siblings or [], self._size)

    def _size(self, name: str) -> int:
        """Asks the hub for the size of a file. Raises HubError if it does not say."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        with self._said(f"{name}: "):
            url = hf_hub_url(self.repo, name, revision=self.commit)
            size = get_hf_file_metadata(url, timeout=30).size
        if size is None:
            raise HubError(f"{self.repo}: {_endpoint()} does not say how large {name} is")
        return size

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Returns the bytes of a file from `start` to before `stop`.

        Raises:
            HubError: the hub does not give them.
        """
        file = self.files[name]
        stop = file.size if stop is None else min(stop, file.size)
        if start >= stop:
            return b""
        out = bytearray()
        with self._stream(name, start, stop) as (at, pieces):
            skip = start - at
            for piece in pieces:
                out += piece[skip:]
                skip = max(0, skip - len(piece))
                if len(out) >= stop - start:
                    break
        if len(out) < stop - start:
            raise HubError(
                f"{self.repo}: {name}: expected bytes {start} to {stop}, got {len(out)} of them"
            )
        return bytes(out[: stop - start])

    def read_whole(self, name: str) -> bytes:
        """Returns the content of a small file, after checking its checksum. The errors are those of `read`."""
        content = self.read(name)
        digest = _Sum(self.files[name])
        digest.update(content)
        self._require(self.files[name], digest)
        return content

    def download(self, name: str, path: Path, progress: Callable[[int], None]) -> None:
        """Fetches a file to `path`, which appears when it is whole; goes on where an earlier call stopped.

        Args:
            name: the file's name in the repository.
            path: where to write it.
            progress: is told the bytes that have arrived so far.

        Raises:
            HubError: the hub does not give the file, or its size or checksum is wrong.
            OSError: it cannot be written.
        """
        file = self.files[name]
        part = path.with_name(f"{path.name}.{file.sum[:16]}.part")
        busy = "another process is fetching it"
        with locked(part, create=True, ours=True, busy=busy) as out, named(part):
            digest = _Sum(file)
            while block := out.read(_BLOCK):
                digest.update(block)
            at, left = out.tell(), _PATIENCE
            while at < file.size:
                before = at
                at, digest = self._continue(file, out, digest, progress)
                left = _PATIENCE if at > before else left - 1
                if not left:
                    raise HubError(
                        f"{self.repo}: {name}: ended after {at} of {file.size} bytes, several times; try again later"
                    )
            os.fsync(out.fileno())
            progress(file.size)
            try:
                self._require(file, digest)
            except HubError:
                part.unlink(missing_ok=True)
                raise
            os.replace(part, path)

    def cached(self, name: str) -> Path | None:
        """Returns the path of a file of this commit in Hugging Face's cache, if it is there and sound; else None."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, name, revision=self.commit)
        file = self.files[name]
        if not isinstance(found, str) or not is_sound(Path(found), file):
            return None
        return Path(os.path.realpath(found))

    def _continue(
        self, file: RemoteFile, out: io.FileIO, digest: _Sum, progress: Callable[[int], None]
    ) -> tuple[int, _Sum]:
        """Appends the bytes of a file that arrive; returns the new size and the checksum so far.

        A connection that breaks ends this without an error.
        """
        have = out.seek(0, os.SEEK_END)
        with self._stream(file.name, have, file.size) as (at, pieces):
            if at != have:  # the hub ignores ranges and sends whole files
                out.truncate(0)
                digest, have = _Sum(file), 0
            for piece in _until_it_breaks(pieces):
                pwrite(out, piece, have)
                digest.update(piece)
                have += len(piece)
                progress(have)
                if have > file.size:
                    break
        return have, digest

    @contextlib.contextmanager
    def _stream(self, name: str, start: int, stop: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Opens a request for a range of bytes; yields the offset at which the answer begins, and its bytes."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        headers = {**build_hf_headers(), **_UNCOMPRESSED, "Range": f"bytes={start}-{stop - 1}"}
        url = hf_hub_url(self.repo, name, revision=self.commit)
        with (
            self._said(f"{name}: "),
            http_stream_backoff(
                "GET", url, headers=headers, timeout=30, max_retries=self._retries
            ) as response,
        ):
            hf_raise_for_status(response)
            yield (
                start if response.status_code == 206 else 0,
                response.iter_bytes(),
            )

    def _require(self, file: RemoteFile, digest: _Sum) -> None:
        if not digest.is_right:
            raise HubError(
                f"{self.repo}: {file.name}: its sum must be {file.sum}, got {digest.text} of {digest.size} bytes; "
                "removed, the next pull fetches it again"
            )

    @contextlib.contextmanager
    def _said(self, where: str) -> Iterator[None]:
        """Turns the hub's errors into one line that says what they mean."""
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        where = f"{self.repo}: {where}"
        try:
            yield
        except HubError:
            raise
        except OfflineModeIsEnabled:
            raise HubError(f"{where}HF_HUB_OFFLINE is set: nothing is fetched") from None
        except HTTPError as error:
            response = getattr(error, "response", None)
            if response is None:
                raise Unreachable(
                    f"{where}{_endpoint()} cannot be reached: {_without_number(_first_line(error))}"
                ) from None
            raise HubError(f"{where}{_meaning(response, error)}") from None


class _Files(Mapping[str, RemoteFile]):
    """The files of a listing. The hub is asked for a size that the listing lacks when the file is needed."""

    def __init__(self, listed: Iterable[RepoSibling], size: Callable[[str], int]) -> None:
        self._listed = {one.rfilename: one for one in listed}
        self._size = size
        self._files: dict[str, RemoteFile] = {}

    def __getitem__(self, name: str) -> RemoteFile:
        if name not in self._files:
            of = self._listed[name]
            size = self._size(name) if of.size is None else of.size
            sha256 = of.lfs.sha256 if of.lfs else None
            self._files[name] = RemoteFile(name, size, sha256, of.blob_id)
        return self._files[name]

    def __contains__(self, name: object) -> bool:
        return name in self._listed

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)


def is_sound(path: Path, file: RemoteFile) -> bool:
    """Returns whether a local file has the size and checksum that a hub gives. Raises OSError if it cannot be read."""
    if path.stat().st_size != file.size:
        return False
    digest = _Sum(file)
    with open(path, "rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
    return digest.is_right


class _Sum:
    """A checksum of a file's content, of the kind that the hub gives for it."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self.size = 0
        self._digest: Any = hashlib.sha256()
        if file.sha256 is None:  # git's: SHA-1 of a header and the content
            self._digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)

    def update(self, data: bytes) -> None:
        self._digest.update(data)
        self.size += len(data)

    @property
    def text(self) -> str:
        return str(self._digest.hexdigest())

    @property
    def is_right(self) -> bool:
        return self.size == self._file.size and self._file.sum in ("", self.text)


def _until_it_breaks(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yields what arrives before a connection breaks, in whatever way."""
    from huggingface_hub.errors import HTTPError

    with contextlib.suppress(HTTPError):
        yield from pieces


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _require_endpoint() -> None:
    """Checks that the hub's address is a URL: huggingface_hub takes an HF_ENDPOINT that is set but empty as it is."""
    if not _endpoint().startswith(("http://", "https://")):
        raise HubError(
            f"HF_ENDPOINT: expected an address like https://huggingface.co, got {quoted(_endpoint())}; "
            "unset it for that one"
        )


def _meaning(response: Any, error: BaseException) -> str:
    code, kind = response.status_code, response.headers.get("X-Error-Code", "")
    if kind == "RevisionNotFound":
        return "there is no such revision"
    if kind == "GatedRepo" or code == 403:
        return (
            "its makers want you to accept their terms first: do so on its page, then set HF_TOKEN"
        )
    if kind == "EntryNotFound":
        return "there is no such file"
    if code == 401 or kind == "RepoNotFound":
        return "there is no such model, or it is not for everyone: HF_TOKEN or `hf auth login` says who you are"
    if code == 404:
        return "there is no such model"
    if code == 429:
        wait = response.headers.get("Retry-After", "")
        return f"the hub has had too many requests from here; try again {f'in {wait} s' if wait else 'later'}"
    return f"the hub answered {code}: {_first_line(error)}"


def _without_number(text: str) -> str:
    """Returns the text of a system error without its "[Errno N]"."""
    return re.sub(r"^\[Errno -?\d+\] ", "", text)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(lines[0] if lines else type(error).__name__)

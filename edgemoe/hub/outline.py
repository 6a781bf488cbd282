"""An outline of a hub's checkpoint: a folder with all of its small files, and of the large ones only the headers.

The large files are sparse and have their full size: behind the header is a hole. So the usual code opens the
checkpoint; only its weights must not be read yet.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgemoe.convert.checkpoint import Bytes
from edgemoe.errors import FormatError, size_text
from edgemoe.file.whole import whole_file, write_whole
from edgemoe.hub.name import HubName
from edgemoe.hub.remote import RemoteFile

__all__ = ["Chosen", "Source", "choose", "outline", "write_hollow"]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_SMALL = (
    "config.json", "hf_quant_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "generation_config.json", "LICENSE",
)  # fmt: skip
_MOST_SMALL = 64 << 20
_FIRST = 16 << 10  # bytes of the first request for a file with a header
_FIRST_GGUF = 8 << 20  # the same for GGUF, whose header has the vocabulary too
_MOST_HEADER = 100_000_000
_AT_ONCE = 8
_BLOCK = 16 << 20
_QUANT = re.compile(r"[-._/]((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|BF16|F16|F32|MXFP4\w*))(?:[-._/]|$)", re.I)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class Source(Protocol):
    """The files of a model's repository."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Returns the bytes of a file from `start` to before `stop`. Raises HubError when they cannot be had."""

    def read_whole(self, name: str) -> bytes:
        """Returns the content of a small file, after checking its checksum. The errors are those of `read`."""

    def cached(self, name: str) -> Path | None:
        """Returns the path of a file that need not be fetched, after checking its checksum; None if there is none."""

    def download(self, name: str, path: Path, progress: Callable[[int], None]) -> None:
        """Fetches a file to `path`, which appears when it is whole. The errors are those of `read`, and OSError."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The files of a repository that make the model."""

    name: HubName
    small: tuple[RemoteFile, ...]
    weights: tuple[RemoteFile, ...]
    """In the order in which they are fetched; of a split GGUF file, the first part comes first."""
    note: str = ""
    """A line about a choice that the user did not make; "" for none."""

    @property
    def is_gguf(self) -> bool:
        return self.weights[0].name.endswith(".gguf")

    @property
    def size(self) -> int:
        """Bytes of the files with weights."""
        return sum(file.size for file in self.weights)


def choose(repository: Source, name: HubName) -> Chosen:
    """Chooses a repository's safetensors; its GGUF files if it has none, or if the name asks for a quant.

    Raises:
        FormatError: it has neither, or not the quant, or several models of the quant; or a small file is large.
        HubError: the hub does not give the index, or does not say how large a file is.
    """
    files = repository.files
    if not name.quant:
        if _SINGLE in files:
            return Chosen(name, _small(repository, _SMALL), (files[_SINGLE],))
        if _INDEX in files:
            return Chosen(name, _small(repository, (*_SMALL, _INDEX)), _indexed(repository))
    return _gguf(repository, name)


def _small(repository: Source, names: Iterable[str]) -> tuple[RemoteFile, ...]:
    small = tuple(repository.files[name] for name in names if name in repository.files)
    for file in small:
        if file.size > _MOST_SMALL:
            raise FormatError(
                f"{repository.repo}: {file.name}: expected at most {size_text(_MOST_SMALL)}, "
                f"got {size_text(file.size)}"
            )
    return small


def outline(repository: Source, chosen: Chosen, folder: Path) -> Path:
    """Makes the folder, or what it lacks, and returns the path to open: the folder, or a GGUF file in it.

    Raises:
        HubError: the hub does not give a file, or gave a wrong one.
        FormatError: a header is not sound.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def small(file: RemoteFile) -> None:
        path = folder / file.name
        if not path.is_file():
            write_whole(path, repository.read_whole(file.name))

    def weights(file: RemoteFile) -> None:
        path = folder / Path(file.name).name
        if path.exists() and path.stat().st_size == file.size:
            return
        head = _gguf_head if chosen.is_gguf else _head
        head(repository, file, path)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        jobs = [pool.submit(small, f) for f in chosen.small]
        jobs += [pool.submit(weights, f) for f in chosen.weights]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return folder / Path(chosen.weights[0].name).name if chosen.is_gguf else folder


def write_hollow(
    path: Path, size: int, parts: Iterable[tuple[int, bytes]], kept: Iterable[Bytes] = ()
) -> None:
    """Writes a sparse file of `size` bytes: some parts, bytes of other files at their own offsets, and holes.

    Args:
        path: the file to write. It may be a link, which is replaced, and may be a file whose bytes are kept.
        size: bytes of the whole file, holes included.
        parts: offsets, and the bytes to write there.
        kept: byte ranges of files, which are copied to the same offsets.

    Raises:
        OSError: it cannot be written.
    """
    new = path.with_name(f".{path.name}.hollow")
    with whole_file(new) as file:
        for at, content in parts:
            file.seek(at)
            file.write(content)
        for place in kept:
            with open(place.path, "rb") as source:
                source.seek(place.start)
                file.seek(place.start)
                for at in range(place.start, place.stop, _BLOCK):
                    file.write(source.read(min(_BLOCK, place.stop - at)))
        file.flush()
        os.ftruncate(file.fileno(), size)
    os.replace(new, path)


def _head(repository: Source, file: RemoteFile, path: Path) -> None:
    start = repository.read(file.name, 0, _FIRST)
    if len(start) < 8:
        raise FormatError(f"{repository.repo}: {file.name}: truncated; got {len(start)} bytes")
    (size,) = struct.unpack("<Q", start[:8])
    if size > min(_MOST_HEADER, file.size):
        raise FormatError(f"{repository.repo}: {file.name}: not a safetensors file")
    start += repository.read(file.name, len(start), 8 + size)
    write_hollow(path, file.size, [(0, start[: 8 + size])])


def _gguf_head(repository: Source, file: RemoteFile, path: Path) -> None:
    from edgemoe.convert.gguf import header_end

    start, wanted = b"", _FIRST_GGUF
    while True:
        start += repository.read(file.name, len(start), wanted)
        temporary = path.with_name(f".{path.name}")
        write_hollow(temporary, file.size, [(0, start)])
        try:
            end, read_at_once = header_end(temporary, len(start))
        finally:
            temporary.unlink()
        if end <= len(start):
            break
        wanted = min(file.size, max(2 * len(start), end))
    parts = [(0, start[:end])]
    parts += [(at, repository.read(file.name, at, stop)) for at, stop in read_at_once]
    write_hollow(path, file.size, parts)


def _indexed(repository: Source) -> tuple[RemoteFile, ...]:
    content = repository.read_whole(_INDEX)
    try:
        names = sorted({str(name) for name in json.loads(content)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(f"{repository.repo}: {_INDEX}: has no weight_map") from None
    absent = [name for name in names if name not in repository.files]
    if absent:
        raise FormatError(f"{repository.repo}: has no {absent[0]}, which {_INDEX} names")
    return tuple(repository.files[name] for name in names)


def _gguf(repository: Source, name: HubName) -> Chosen:
    quants: dict[str, list[str]] = {}
    for file in sorted(repository.files):
        if file.endswith(".gguf") and not Path(file).name.startswith("mmproj"):
            match = _QUANT.search("/" + file.removesuffix(".gguf"))
            quants.setdefault(match[1].upper() if match else "", []).append(file)
    if not quants:
        raise FormatError(
            f"{repository.repo}: has neither {_SINGLE} nor {_INDEX} nor a .gguf file; nothing else is read"
        )
    wanted, note = name.quant.upper(), ""
    if not wanted:
        wanted = "Q4_K_M" if "Q4_K_M" in quants else next(iter(quants))
        if len(quants) > 1:
            note = f"{wanted} of {', '.join(filter(None, quants))}; {name.repo}:QUANT takes another"
    if wanted not in quants:
        raise FormatError(
            f"{repository.repo}: has no GGUF files of {name.quant}; there are {', '.join(filter(None, quants))}"
        )
    first = [file for file in quants[wanted] if not _is_later_part(file)]
    if len(first) > 1:
        raise FormatError(f"{repository.repo}: has several models of {wanted}: {', '.join(first)}")
    files = tuple(repository.files[file] for file in quants[wanted])
    return Chosen(name, _small(repository, ("LICENSE",)), files, note)


def _is_later_part(name: str) -> bool:
    match = _PART.search(name)
    return match is not None and int(match[1]) > 1

"""Prefixes on disk: what sequences hold, saved so that a prompt that comes back is not computed again.

A file is one of `edgemoe.file.summed`: checksums for every row, and it appears whole or not at all.

    ids                  int64 [n]      the tokens
    LAYER.PART           uint32         what a layer remembers of them, as it lies in memory

The metadata says of which model, at which bits, and by which scheduler it was computed: `identity`. What is another's
is not used; what is damaged is removed, and computed again. A disk that is full costs nothing but the prefix.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgemoe
from edgemoe.errors import FormatError
from edgemoe.file.summed import SummedFile, write_summed
from edgemoe.model import SequenceState
from edgemoe.runtime.model import Model

__all__ = ["PrefixStore", "identity"]

logger = logging.getLogger(__name__)

_VERSION = "1"
_LEAST = 64
"""Tokens that are worth a file."""
_WORDS = np.dtype("<u4")


@dataclass(slots=True)
class _Entry:
    """Is one file."""

    path: Path
    ids: NDArray[np.int64]
    """[n]; none where it is of another model."""
    turned: int
    size: int
    used: float


def identity(model: Model) -> str:
    """Returns a name of all that decides what sequences of a model hold."""
    moe, options = model.moe, model.options
    weights = hashlib.sha256(moe.experts.crcs.tobytes())
    for name, tensor in sorted(moe.tensors.items()):
        weights.update(f"{name}{tensor.crcs}".encode())
    said = json.dumps([
        edgemoe.__version__, weights.hexdigest(), repr(model.config), options.dense_bits,
        hashlib.sha256(model.top_bits.tobytes()).hexdigest(), options.scheduler,
        str(sorted(options.options.items())), options.cache_type_k, options.cache_type_v,
    ])  # fmt: skip
    return hashlib.sha256(said.encode()).hexdigest()[:32]


class PrefixStore:
    """Keeps prefixes in a folder. One thread at a time, that of the model."""

    def __init__(self, folder: str | os.PathLike[str], model: Model, *, most_bytes: int) -> None:
        """Looks through a folder, which is made where there is none; only its owner can read what is saved.

        Args:
            most_bytes: files beyond that are removed, those first that were used longest ago.

        Raises:
            OSError: the folder cannot be made or read.
        """
        self._folder, self._model, self._most = Path(folder), model, most_bytes
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._is_full = False
        self.look()

    def look(self) -> None:
        """Looks through the folder for what is of the model as it is now: after a change others' prefixes are wrong."""
        self._identity = identity(self._model)
        found = map(self._read, sorted(self._folder.glob("*.prefix")))
        self._entries = [entry for entry in found if entry is not None]
        self._trim()

    def __len__(self) -> int:
        return len(self._entries)

    def exchange(
        self, state: SequenceState, tokens: NDArray[np.int32], shared: int, most: int
    ) -> int:
        """Saves what a sequence loses to a prompt, and restores what is known of the prompt.

        Args:
            tokens: the prompt, [T].
            shared: with how many of the sequence's tokens it begins.
            most: how many of its tokens may be taken from before.

        Returns:
            With how many it begins now.
        """
        if state.length - shared >= _LEAST:
            self.save(state)
        found, best = None, shared + _LEAST - 1
        for entry in self._entries:
            count = self._shared(state, entry, tokens[:most], len(tokens))
            if count > best:
                found, best = entry, count
        if found is None:
            return shared
        return min(best, self._restore(found, state))

    def save(self, state: SequenceState) -> bool:
        """Saves what a sequence holds, if it is long enough and not there yet; returns whether it is there then."""
        ids = np.array(state.ids, np.int64)
        if len(ids) < _LEAST or state.held < len(ids):
            return False
        for entry in self._entries:
            if len(entry.ids) >= len(ids) and np.array_equal(entry.ids[: len(ids)], ids):
                return True
        tensors: dict[str, NDArray[Any]] = {"ids": ids}
        for i, layer in enumerate(state.layers):
            parts = layer.parts(len(ids))
            if parts is None:
                return False
            tensors |= {f"{i}.{j}": part.view(_WORDS) for j, part in enumerate(parts)}
        largest = max(part.nbytes for part in tensors.values())
        size = sum(part.nbytes for part in tensors.values())
        if size > self._most:
            return False
        self._model.room.lend(largest)
        path = self._folder / f"{secrets.token_hex(8)}.prefix"
        meta = {"edgemoe_prefix": _VERSION, "identity": self._identity, "turned": str(state.turned)}
        try:
            os.close(
                os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            )  # what replaces it keeps its mode
            write_summed(path, tensors, meta)
            found = path.stat()
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            if not self._is_full:  # once: it costs nothing but time
                logger.warning("a prefix of %d tokens is not saved: %s", len(ids), error)
            self._is_full = True
            return False
        self._is_full = False
        for entry in list(self._entries):  # what it begins with is not needed any more
            if len(entry.ids) and np.array_equal(entry.ids, ids[: len(entry.ids)]):
                self._remove(entry)
        self._entries.append(_Entry(path, ids, state.turned, found.st_size, found.st_mtime))
        self._trim()
        return True

    def _shared(
        self, state: SequenceState, entry: _Entry, tokens: NDArray[np.int32], length: int
    ) -> int:
        """Returns with how many of a file's tokens a prompt begins, of those that can be gone back to."""
        if not self._model.config.turns_alike(entry.turned, length):
            return 0
        count = min(len(entry.ids), len(tokens))
        differ = np.flatnonzero(entry.ids[:count] != tokens[:count])
        count = int(differ[0]) if len(differ) else count
        return count if count == len(entry.ids) or not state.needs_snapshots else 0

    def _restore(self, entry: _Entry, state: SequenceState) -> int:
        """Puts a file's content into a sequence; returns how many tokens it holds then: 0 where it is damaged."""
        length = len(entry.ids)
        state.rewind(0)
        self._model.room.reach(state, length)
        self._model.room.lend(entry.size // max(len(state.layers), 1))
        state.begin(length)
        try:
            file = SummedFile(entry.path, "a saved prefix")
            if not np.array_equal(file.tensor("ids"), entry.ids):
                raise FormatError(f"{entry.path}: another prefix than it was")
            for i, layer in enumerate(state.layers):
                for j, part in enumerate(layer.make_parts(length)):
                    target, found = part.view(_WORDS), file.tensor(f"{i}.{j}")
                    if found.shape != target.shape:
                        raise FormatError(f"{entry.path}: {i}.{j} is of another shape")
                    target[...] = found
            os.utime(entry.path)
        except (FormatError, OSError, KeyError, ValueError) as error:
            logger.warning("a saved prefix of %d tokens is computed again: %s", length, error)
            state.rewind(0)
            self._remove(entry)
            return 0
        state.turned, entry.used = entry.turned, entry.path.stat().st_mtime
        state.commit(entry.ids.tolist())
        state.snapshot()
        return length

    def _read(self, path: Path) -> _Entry | None:
        """Returns a file of the folder; None where it was damaged, and removed."""
        try:
            file, found = SummedFile(path, "a saved prefix"), path.stat()
            meta, ids = file.meta, np.empty(0, np.int64)
            if meta.get("edgemoe_prefix") == _VERSION and meta.get("identity") == self._identity:
                ids = file.tensor("ids")
            turned = int(meta.get("turned", "0"))
        except (FormatError, OSError, KeyError, ValueError) as error:
            logger.warning("a saved prefix is removed: %s", error)
            path.unlink(missing_ok=True)
            return None
        return _Entry(path, ids, turned, found.st_size, found.st_mtime)

    def _trim(self) -> None:
        """Removes files until the rest fits."""
        self._entries.sort(key=lambda entry: entry.used)
        while sum(entry.size for entry in self._entries) > self._most:
            self._remove(self._entries[0])

    def _remove(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        try:
            entry.path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("a saved prefix stays: %s", error)

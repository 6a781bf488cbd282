"""Prefixes in a folder: what sequences held is saved, so that a prompt that comes back later is not computed again.

A file has the format of `edgemoe.file.summed`: it has checksums for every row, and appears whole or not at all.

    ids                  int64 [n]      the tokens
    LAYER.PART           uint32         a part of the layer's state after these tokens, as it lies in memory

The metadata has the `identity` of what computed the prefix: the model, its bits, the scheduler and more. A prefix of
another identity is not used. A damaged file is removed, and its prefix is computed again. If the disk is full, the
prefix is lost and nothing else happens.

A file that a user named is read only by its name, and stays until the user removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgemoe
from edgemoe.errors import FormatError, OutOfBudget, size_text
from edgemoe.file.summed import SummedFile, write_summed
from edgemoe.model import SequenceState
from edgemoe.runtime.model import Model
from edgemoe.runtime.prefix import LEAST, Prefix, covers, fill, longest

__all__ = ["PrefixStore", "identity"]

logger = logging.getLogger(__name__)

_VERSION = "2"
_NAME = re.compile(r"[A-Za-z0-9_-][\w.-]{0,127}")
_OURS = re.compile(r"[0-9a-f]{16}\.prefix")  # a name that this module made


@dataclass(slots=True)
class _Entry:
    """One file of the folder, as far as it is known without its states."""

    path: Path
    ids: NDArray[np.int64]
    """[n]: the tokens; none if the file is another model's, so that it matches no prompt."""
    turned: int
    adapter: int
    size: int
    """Bytes of the file."""
    used: float
    """When it was last used, in seconds since 1970: the file's modification time."""


def identity(model: Model, adapter: int = 0) -> str:
    """Returns a hash, in hexadecimal, of everything that decides the states of sequences.

    That is the version of edgemoe, the weights and their bits, the model's config, the scheduler and its options, and
    the types of keys and values.

    Args:
        adapter: the number of the adapter that the sequences are computed with; 0 for the model alone.
    """
    moe, options = model.moe, model.options
    layers, count = len(model.config.moe_layers), model.config.num_experts
    crcs = moe.experts.crcs.reshape(layers, moe.places, -1)[:, :count]
    bits = model.top_bits.reshape(layers, -1)[:, :count]
    weights = hashlib.sha256(np.ascontiguousarray(crcs).tobytes())
    for name, tensor in sorted(moe.tensors.items()):
        most = "" if tensor.most is None else tensor.most
        weights.update(f"{name}{tensor.crcs}{most}".encode())
    if adapter:
        weights.update(model.adapters.files[adapter - 1].digest().encode())
    for own in (model.scheduler.bit_routers, model.scheduler.stand_ins):
        for array in () if own is None else own.tensors.values():
            weights.update(np.ascontiguousarray(array).data)
    said = json.dumps([
        edgemoe.__version__, weights.hexdigest(), repr(model.config), options.dense_bits,
        hashlib.sha256(np.ascontiguousarray(bits).tobytes()).hexdigest(), options.scheduler,
        str(sorted(options.options.items())), repr(options.kv_types),
    ])  # fmt: skip
    return hashlib.sha256(said.encode()).hexdigest()[:32]


class PrefixStore:
    """Prefixes in a folder. Used on the model's thread alone."""

    def __init__(self, folder: str | os.PathLike[str], model: Model, *, most_bytes: int) -> None:
        """Opens a folder, or makes it. Only its owner can read what is saved.

        Args:
            folder: its path.
            model: whose sequences it serves.
            most_bytes: the most bytes of all files. Beyond that, the least recently used are removed.

        Raises:
            OSError: the folder cannot be made or read.
        """
        self._folder, self._model, self._most = Path(folder), model, most_bytes
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._is_losing = False
        self.look()

    def look(self) -> None:
        """Reads the folder again, for prefixes of the model as it is now: after a change, earlier ones are wrong."""
        every = range(len(self._model.adapters.names) + 1)
        self._identities = [identity(self._model, adapter) for adapter in every]
        found = map(self._read, sorted(self._folder.glob("*.prefix")))
        self._entries = [entry for entry in found if entry is not None]
        self._trim()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self._entries)

    def exchange(
        self, state: SequenceState, tokens: NDArray[np.int32], shared: int, most: int,
        adapter: int = 0,
    ) -> int:  # fmt: skip
        """Prepares a sequence for a prompt: saves what it would lose, and restores a longer prefix if there is one.

        Args:
            state: the sequence.
            tokens: the prompt, [T].
            shared: how many of the sequence's tokens the prompt begins with.
            most: how many tokens of the prompt may be reused at most.
            adapter: the number of the adapter that the prompt is computed with.

        Returns:
            How many of the sequence's tokens the prompt begins with now.
        """
        if state.length - shared >= LEAST:
            self.save(state)
        state.use(adapter)
        found, best = self.find(state, tokens, shared + LEAST - 1, most)
        return shared if found is None else min(best, self.restore(found, state))

    def find(
        self, state: SequenceState, tokens: NDArray[np.int32], least: int, most: int
    ) -> tuple[_Entry | None, int]:
        """Returns the file that shares the most tokens with a prompt, and how many it shares; see `longest`."""
        return longest(self._model, state, self._entries, tokens, least, most, state.adapter)

    def save(self, state: SequenceState) -> bool:
        """Saves what a sequence holds, if it is long enough and not saved yet; returns whether it is saved now."""
        prefix = Prefix.of(state) if state.length >= LEAST else None
        return prefix is not None and self.put(prefix)

    def put(self, prefix: Prefix) -> bool:
        """Saves a prefix, if it is not saved yet; returns whether it is saved now. Errors are only logged."""
        ids, model, is_whole = prefix.ids, self._model, prefix.is_whole
        if any(covers(model, entry, prefix, is_whole=is_whole) for entry in self._entries):
            return True
        if prefix.size > self._most:
            return self._lose(prefix, f"{size_text(prefix.size)} are more than the folder may hold")
        path = self._folder / f"{secrets.token_hex(8)}.prefix"
        try:
            self._write(path, prefix)
            found = path.stat()
        except (OSError, OutOfBudget) as error:
            return self._lose(prefix, str(error))
        self._is_losing = False
        for entry in list(self._entries):  # prefixes that it covers are not needed any more
            if len(entry.ids) and covers(model, prefix, entry, is_whole=is_whole):
                self._remove(entry)
        self._entries.append(
            _Entry(path, ids, prefix.turned, prefix.adapter, found.st_size, found.st_mtime)
        )
        self._trim()
        return True

    def _lose(self, prefix: Prefix, why: str) -> bool:
        """Logs that a prefix is not saved, unless the one before was not either: only time is lost."""
        if not self._is_losing:
            logger.warning("a prefix of %d tokens is not saved: %s", len(prefix.ids), why)
        self._is_losing = True
        return False

    def save_as(self, state: SequenceState, name: str) -> int:
        """Saves what a sequence holds under a name, replacing an earlier file; returns the file's bytes.

        Raises:
            ValueError: the name is not valid, or the sequence holds nothing that can be saved.
            OSError, OutOfBudget: the file cannot be written; an earlier one stays.
        """
        path, prefix = self._named(name), Prefix.of(state)
        if prefix is None or not len(prefix.ids):
            raise ValueError("the sequence holds nothing that could be saved")
        self._write(path, prefix)
        return path.stat().st_size

    def restore_from(self, state: SequenceState, name: str) -> int:
        """Restores a sequence from what was saved under a name; returns the file's bytes.

        Raises:
            ValueError: the name is not valid.
            FormatError: the file is missing, damaged, or of another model or settings; the sequence is then empty.
            OSError, OutOfBudget: the file cannot be read; likewise.
        """
        path = self._named(name)
        state.rewind(0)
        try:
            file = SummedFile(path, "a saved sequence")
            adapter = self._adapter_of(file.meta)
            if adapter is None:
                raise FormatError(f"{name}: of another model, other settings or another version")
            state.use(adapter)
            ids = self._ids(file)
            if len(ids) > state.capacity:
                raise FormatError(
                    f"{name}: {len(ids)} tokens do not fit a context of {state.capacity}"
                )
            size = path.stat().st_size
            beside = size // max(len(state.layers), 1)
            fill(self._model, state, ids, int(file.meta["turned"]), file.tensor, beside)
        except (KeyError, ValueError) as error:
            state.rewind(0)
            text = str(error) if isinstance(error, FormatError) else "it makes no sense"
            raise FormatError(text.replace(f"{self._folder}/", "")) from None
        except (OSError, OutOfBudget):
            state.rewind(0)
            raise
        return size

    def _named(self, name: str) -> Path:
        if not _NAME.fullmatch(name) or name.endswith((".prefix", ".part")):
            raise ValueError(f"expected a name of letters, digits, . _ and -, got {name!r:.80}")
        return self._folder / name

    def _write(self, path: Path, prefix: Prefix) -> None:
        tensors: dict[str, NDArray[Any]] = {"ids": prefix.ids, **prefix.parts}
        self._model.room.lend(max(part.nbytes for part in tensors.values()))
        meta = {
            "edgemoe_prefix": _VERSION,
            "identity": self._identities[prefix.adapter],
            "turned": str(prefix.turned),
        }
        write_summed(path, tensors, meta, is_private=True)

    def restore(self, entry: _Entry, state: SequenceState) -> int:
        """Restores a sequence from a file; returns how many tokens it holds then, 0 if the file is damaged.

        A damaged file is removed, with a line in the log. One that there is no room to read stays.
        """
        length = len(entry.ids)
        try:
            file = SummedFile(entry.path, "a saved prefix")
            if not np.array_equal(self._ids(file), entry.ids):
                raise FormatError(f"{entry.path}: another prefix than it was")
            beside = entry.size // max(len(state.layers), 1)
            fill(self._model, state, entry.ids, entry.turned, file.tensor, beside)
            os.utime(entry.path)
            entry.used = entry.path.stat().st_mtime
        except (FormatError, OSError, OutOfBudget, KeyError, ValueError) as error:
            logger.warning("a saved prefix of %d tokens is computed again: %s", length, error)
            state.rewind(0)
            if not isinstance(error, OutOfBudget):
                self._remove(entry)
            return 0
        return length

    def _read(self, path: Path) -> _Entry | None:
        """Returns a file of the folder; None if it is damaged. Then it is removed if its name is one of ours."""
        try:
            file, found = SummedFile(path, "a saved prefix"), path.stat()
            meta, ids = file.meta, np.empty(0, np.int64)
            adapter = self._adapter_of(meta)
            if adapter is not None:
                ids = self._ids(file)
            turned = int(meta.get("turned", "0"))
        except (FormatError, OSError, KeyError, ValueError) as error:
            if _OURS.fullmatch(path.name):  # other files are not ours to remove
                logger.warning("a saved prefix is removed: %s", error)
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            return None
        return _Entry(path, ids, turned, adapter or 0, found.st_size, found.st_mtime)

    def _ids(self, file: SummedFile) -> NDArray[np.int64]:
        """Returns the tokens of a file.

        Raises:
            FormatError: they are not tokens of the model.
            KeyError: the file has no tokens.
        """
        ids = file.tensor("ids")
        is_sound = ids.dtype == np.int64 and ids.ndim == 1
        if not is_sound or ((ids < 0) | (ids >= self._model.config.vocab_size)).any():
            raise FormatError(f"{file.path}: holds no tokens of the model")
        return ids

    def _adapter_of(self, meta: Mapping[str, str]) -> int | None:
        """Returns the number of the adapter that a file was computed with; None for another model or adapter."""
        if meta.get("edgemoe_prefix") != _VERSION or meta.get("identity") not in self._identities:
            return None
        return self._identities.index(meta["identity"])

    def _trim(self) -> None:
        """Removes the least recently used files until the rest fits `most_bytes`."""
        self._entries.sort(key=lambda entry: entry.used)
        while sum(entry.size for entry in self._entries) > self._most:
            self._remove(self._entries[0])

    def _remove(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        try:
            entry.path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("a saved prefix stays: %s", error)

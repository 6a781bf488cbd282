"""Prefixes: what sequences held, kept so that a prompt that comes back is not computed again. In memory, then on disk.

A file is one of `edgemoe.file.summed`: checksums for every row, and it appears whole or not at all.

    ids                  int64 [n]      the tokens
    LAYER.PART           uint32         what a layer remembers of them, as it lies in memory

The metadata says of which model, at which bits, and by which scheduler it was computed: `identity`. What is another's
is not used; what is damaged is removed, and computed again. A disk that is full costs nothing but the prefix.

Files that somebody named are read by their name alone, and stay until somebody removes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping
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

__all__ = ["LEAST", "Prefix", "PrefixStore", "covers", "fill", "identity", "shared_tokens"]

logger = logging.getLogger(__name__)

_VERSION = "2"
LEAST = 64
"""Tokens that are worth a file."""
_WORDS = np.dtype("<u4")


_NAME = re.compile(r"[A-Za-z0-9_-][\w.-]{0,127}")
_OURS = re.compile(r"[0-9a-f]{16}\.prefix")  # a name that this module made


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Is what a sequence holds."""

    ids: NDArray[np.int64]
    """[n]"""
    turned: int
    adapter: int
    """The number of the one that it was computed with."""
    parts: dict[str, NDArray[np.uint32]]
    """LAYER.PART of all layers."""

    @classmethod
    def of(cls, state: SequenceState) -> Prefix | None:
        """Returns what a sequence holds, as it lies there; None where it cannot be taken."""
        ids = np.array(state.ids, np.int64)
        parts: dict[str, NDArray[np.uint32]] = {}
        if state.held < len(ids):
            return None
        for i, layer in enumerate(state.layers):
            found = layer.parts(len(ids))
            if found is None:
                return None
            parts |= {f"{i}.{j}": part.view(_WORDS) for j, part in enumerate(found)}
        return cls(ids, state.turned, state.adapter, parts)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.ids.nbytes + sum(part.nbytes for part in self.parts.values())

    def covers(self, other: Prefix) -> bool:
        """Returns whether its first tokens are all of another's, computed alike."""
        return self.adapter == other.adapter and covers(self.ids, other.ids)

    def copy(self) -> Prefix:
        """Returns one of its own memory."""
        parts = {name: np.array(part) for name, part in self.parts.items()}
        return Prefix(self.ids, self.turned, self.adapter, parts)


def covers(ids: NDArray[np.int64], others: NDArray[np.int64]) -> bool:
    """Returns whether the first tokens of `ids` are `others`."""
    return len(ids) >= len(others) and bool(np.array_equal(ids[: len(others)], others))


def shared_tokens(
    model: Model, state: SequenceState, ids: NDArray[np.int64], turned: int, tokens: NDArray[np.int32], length: int
) -> int:  # fmt: skip
    """Returns with how many of a prefix's tokens a prompt of `length` begins, of those that can be gone back to."""
    if not model.config.turns_alike(turned, length):
        return 0
    count = min(len(ids), len(tokens))
    differ = np.flatnonzero(ids[:count] != tokens[:count])
    count = int(differ[0]) if len(differ) else count
    return count if count == len(ids) or not state.needs_snapshots else 0


def fill(
    model: Model, state: SequenceState, ids: NDArray[np.int64], turned: int,
    part: Callable[[str], NDArray[np.uint32]], beside: int,
) -> None:  # fmt: skip
    """Puts a prefix into a sequence, part after part, each of which takes at most `beside` bytes.

    Raises:
        FormatError, KeyError: a part is none of this sequence's; it is in disorder until it is rewound to the start.
    """
    length = len(ids)
    state.rewind(0)
    model.room.reach(state, length)
    model.room.lend(beside)
    state.begin(length)
    for i, layer in enumerate(state.layers):
        for j, target in enumerate(layer.make_parts(length)):
            target, found = target.view(_WORDS), part(f"{i}.{j}")
            if found.shape != target.shape:
                raise FormatError(f"{i}.{j} is of another shape")
            target[...] = found
    state.turned = turned
    state.commit(ids.tolist())
    state.snapshot()


@dataclass(slots=True)
class _Entry:
    """Is one file."""

    path: Path
    ids: NDArray[np.int64]
    """[n]; none where it is of another model."""
    turned: int
    adapter: int
    size: int
    used: float


def identity(model: Model, adapter: int = 0) -> str:
    """Returns a name of all that decides what sequences of a model hold that are computed with an adapter."""
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
        every = range(len(self._model.adapters.names) + 1)
        self._identities = [identity(self._model, adapter) for adapter in every]
        found = map(self._read, sorted(self._folder.glob("*.prefix")))
        self._entries = [entry for entry in found if entry is not None]
        self._trim()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(entry.size for entry in self._entries)

    def exchange(
        self, state: SequenceState, tokens: NDArray[np.int32], shared: int, most: int,
        adapter: int = 0,
    ) -> int:  # fmt: skip
        """Saves what a sequence loses to a prompt, and restores what is known of the prompt.

        Args:
            tokens: the prompt, [T].
            shared: with how many of the sequence's tokens it begins.
            most: how many of its tokens may be taken from before.
            adapter: with which the prompt is computed.

        Returns:
            With how many it begins now.
        """
        if state.length - shared >= LEAST:
            self.save(state)
        state.use(adapter)
        found, best = self.find(state, tokens, shared + LEAST - 1, most)
        return shared if found is None else min(best, self.restore(found, state))

    def find(
        self, state: SequenceState, tokens: NDArray[np.int32], least: int, most: int
    ) -> tuple[_Entry | None, int]:
        """Returns what shares most with a prompt's first `most` tokens, more than `least`, and how much."""
        found, best = None, least
        for entry in self._entries:
            if entry.adapter != state.adapter:
                continue
            count = shared_tokens(
                self._model, state, entry.ids, entry.turned, tokens[:most], len(tokens)
            )
            if count > best:
                found, best = entry, count
        return found, best

    def save(self, state: SequenceState) -> bool:
        """Saves what a sequence holds, if it is long enough and not there yet; returns whether it is there then."""
        prefix = Prefix.of(state) if state.length >= LEAST else None
        return prefix is not None and self.put(prefix)

    def put(self, prefix: Prefix) -> bool:
        """Saves a prefix, if it is not there yet; returns whether it is there then."""
        ids, alike = prefix.ids, [e for e in self._entries if e.adapter == prefix.adapter]
        if any(covers(entry.ids, ids) for entry in alike):
            return True
        if prefix.size > self._most:
            return False
        path = self._folder / f"{secrets.token_hex(8)}.prefix"
        try:
            self._write(path, prefix)
            found = path.stat()
        except OSError as error:
            if not self._is_full:  # once: it costs nothing but time
                logger.warning("a prefix of %d tokens is not saved: %s", len(ids), error)
            self._is_full = True
            return False
        self._is_full = False
        for entry in alike:  # what it begins with is not needed any more
            if len(entry.ids) and covers(ids, entry.ids):
                self._remove(entry)
        self._entries.append(
            _Entry(path, ids, prefix.turned, prefix.adapter, found.st_size, found.st_mtime)
        )
        self._trim()
        return True

    def save_as(self, state: SequenceState, name: str) -> int:
        """Saves what a sequence holds under a name, in place of what had it; returns the file's bytes.

        Raises:
            ValueError: it is no name, or the sequence holds nothing that can be saved.
            OSError: it cannot be written; nothing is changed then.
        """
        path, prefix = self._named(name), Prefix.of(state)
        if prefix is None or not len(prefix.ids):
            raise ValueError("the sequence holds nothing that could be saved")
        self._write(path, prefix)
        return path.stat().st_size

    def restore_from(self, state: SequenceState, name: str) -> int:
        """Puts what was saved under a name into a sequence; returns the file's bytes.

        Raises:
            ValueError: it is no name.
            FormatError: there is none, it is damaged, or of another model or settings; the sequence is empty then.
            OSError: it cannot be read; likewise.
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
        except OSError:
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
        """Puts a file's content into a sequence; returns how many tokens it holds then: 0 where it is damaged."""
        length = len(entry.ids)
        try:
            file = SummedFile(entry.path, "a saved prefix")
            if not np.array_equal(self._ids(file), entry.ids):
                raise FormatError(f"{entry.path}: another prefix than it was")
            beside = entry.size // max(len(state.layers), 1)
            fill(self._model, state, entry.ids, entry.turned, file.tensor, beside)
            os.utime(entry.path)
            entry.used = entry.path.stat().st_mtime
        except (FormatError, OSError, KeyError, ValueError) as error:
            logger.warning("a saved prefix of %d tokens is computed again: %s", length, error)
            state.rewind(0)
            self._remove(entry)
            return 0
        return length

    def _read(self, path: Path) -> _Entry | None:
        """Returns a file of the folder; None where it was damaged, and removed."""
        try:
            file, found = SummedFile(path, "a saved prefix"), path.stat()
            meta, ids = file.meta, np.empty(0, np.int64)
            adapter = self._adapter_of(meta)
            if adapter is not None:
                ids = self._ids(file)
            turned = int(meta.get("turned", "0"))
        except (FormatError, OSError, KeyError, ValueError) as error:
            if _OURS.fullmatch(path.name):  # others' may be anything
                logger.warning("a saved prefix is removed: %s", error)
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            return None
        return _Entry(path, ids, turned, adapter or 0, found.st_size, found.st_mtime)

    def _ids(self, file: SummedFile) -> NDArray[np.int64]:
        """Returns the tokens of a file.

        Raises:
            FormatError: these are none of the model's.
            KeyError: there are none.
        """
        ids = file.tensor("ids")
        is_sound = ids.dtype == np.int64 and ids.ndim == 1
        if not is_sound or ((ids < 0) | (ids >= self._model.config.vocab_size)).any():
            raise FormatError(f"{file.path}: holds no tokens of the model")
        return ids

    def _adapter_of(self, meta: Mapping[str, str]) -> int | None:
        """Returns with which adapter a file was computed; None where it is of another model, or none that is here."""
        if meta.get("edgemoe_prefix") != _VERSION or meta.get("identity") not in self._identities:
            return None
        return self._identities.index(meta["identity"])

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

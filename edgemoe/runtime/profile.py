"""Profiles: what the runtime learned about the use of one model, kept from run to run. Format, reader and writer.

A profile is a safetensors file. `L` is the number of layers with routed experts, `E` that of experts per layer, `K`
that of experts per token. "Decayed" sums count recent tokens more.

    uses                 float64 [L, E]     uses of each expert; a use now counts 1, one 64 tokens ago counts 1/2
    look_ahead.right     float64 [K]        guesses of each rank that were not in memory and turned out right, decayed
    look_ahead.seen      float64 [K]        all guesses of each rank that were not in memory, decayed
    next_use.weights     float64 [5]        of `edgemoe.scheduler.predict.NextUse`, which predicts an expert's next use
    next_use.curvature   float64 [5, 5]     of the fit of these weights; zeros without any data
    next_use.frequency   float64 [L, E]     uses per token, decayed
    frequency.values     float64 [L, E]     of `edgemoe.scheduler.predict.Frequency`, likewise
    hobbit.thresholds    float64 [5]        of HOBBIT: T1, T2, the shares that they were fitted to (low, skip), tokens
    transitions.pairs    float32 [L, E, E]  of `edgemoe.scheduler.transitions.Transitions`: what ran after what
    transitions.far_pairs  float32 [L, E, E]  the same, for the layer two before
    transitions.totals   float32 [L, E]     uses
    transitions.keys     float32 [n, 1+2K]  if K is 1 or 2: layer, and experts of the two layers before it, -1 for none
    transitions.followers  float32 [n, E]   what ran in this layer after each of these keys

`uses` is always present, the others if a scheduler has learned them. A scheduler uses the tensors that it knows and
leaves the others as they are. For 48 layers of 128 experts, 8 per token, the default scheduler's file takes 50 kB. Each
further [L, E] adds as much again, and transitions 6 MB. Earlier profiles may have `frequent.uses`, a copy of `uses`.

The metadata (strings) are: edgemoe_profile "1"; crc (CRC-32C of all tensors' bytes in the order of their names, in
hexadecimal); and the model's `identity`: family, layers, experts, experts_per_token and fingerprint (of the weights'
source).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edgemoe import _core
from edgemoe.errors import FormatError
from edgemoe.file.format import MoeFile
from edgemoe.file.whole import write_whole
from edgemoe.scheduler import Scheduler
from edgemoe.store import ExpertStore

__all__ = ["Profile", "ProfileFile", "identity", "read_profile", "write_profile"]

State = Mapping[str, NDArray[Any]]

_VERSION = "1"
_MOST_USES = 1e200  # csrc/policy.cpp takes no more
_SHAPES = {
    "uses": "LE", "look_ahead.right": "K", "look_ahead.seen": "K", "next_use.weights": "5",
    "next_use.curvature": "55", "next_use.frequency": "LE", "frequency.values": "LE",
    "hobbit.thresholds": "5", "transitions.pairs": "LEE", "transitions.totals": "LE",
    "transitions.far_pairs": "LEE", "transitions.keys": "nP", "transitions.followers": "nE",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Profile:
    """What was learned about the use of a model."""

    uses: NDArray[np.float64]
    """[L, E]"""
    state: State = field(default_factory=dict)
    """What schedulers learned, by the names above; see `edgemoe.scheduler.Scheduler.state`."""


def identity(moe: MoeFile) -> dict[str, str]:
    """Returns what identifies a profile's model; a profile of any other model is refused."""
    config = moe.config
    return {
        "family": config.family,
        "layers": str(len(config.moe_layers)),
        "experts": str(config.num_experts),
        "experts_per_token": str(config.experts_per_token),
        "fingerprint": str(moe.source.get("fingerprint", "")),
    }


def read_profile(path: Path, of: Mapping[str, str]) -> Profile | None:
    """Reads a profile; returns None if there is no such file yet.

    Args:
        path: the file.
        of: the model's `identity`.

    Raises:
        FormatError: the file is not a profile, is damaged, or is another model's.
    """
    if path.is_dir():
        raise FormatError(f"{path}: is a folder, not a profile")
    try:
        with _open(path) as file:
            meta = file.metadata() or {}
            if meta.get("edgemoe_profile") != _VERSION:
                raise FormatError(f"{path}: not a profile of version {_VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        # safetensors raises the latter two for types that numpy does not have.
        raise FormatError(f"{path}: not a profile: {error}") from None
    if meta.get("crc") != _crc(tensors):
        raise FormatError(f"{path}: damaged: its checksum does not match")
    for name, mine in of.items():
        if meta.get(name) != mine:
            raise FormatError(
                f"{path}: profile of another model: {name} is {meta.get(name)}, this model's is {mine}"
            )
    tensors.pop("frequent.uses", None)
    if "uses" not in tensors:
        raise FormatError(f"{path}: has no uses")
    K, keys = int(of["experts_per_token"]), tensors.get("transitions.keys")
    sizes = {"L": int(of["layers"]), "E": int(of["experts"]), "K": K, "P": 1 + 2 * K, "5": 5}
    sizes["n"] = len(keys) if keys is not None and keys.ndim else 0
    for name, array in tensors.items():
        if name not in _SHAPES:
            raise FormatError(f"{path}: {name} is nothing that this edgemoe knows")
        shape = tuple(sizes[letter] for letter in _SHAPES[name])
        is_float = array.dtype in (np.float32, np.float64)
        if array.shape != shape or not is_float or not np.isfinite(array).all():
            raise FormatError(f"{path}: expected {name} to be {list(shape)} finite numbers")
        wide = array.astype(np.float64)
        if name.endswith("uses") and not ((wide >= 0) & (wide < _MOST_USES)).all():
            raise FormatError(f"{path}: expected {name} to be no less than 0, and numbers of uses")
    return Profile(tensors.pop("uses").astype(np.float64), tensors)


def write_profile(path: Path, profile: Profile, of: Mapping[str, str]) -> None:
    """Writes a profile; an existing file is replaced as a whole or not at all.

    Args:
        path: the file.
        profile: what was learned.
        of: the model's `identity`.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {
        name: np.ascontiguousarray(array)
        for name, array in {**profile.state, "uses": profile.uses}.items()
    }
    content = save(tensors, {"edgemoe_profile": _VERSION, "crc": _crc(tensors), **of})
    write_whole(path, content)


def _open(path: Path) -> Any:
    return safe_open(path, framework="numpy")


def _crc(tensors: State) -> str:
    whole = b"".join(tensors[name].tobytes() for name in sorted(tensors))
    return f"{_core.crc32c(whole):08x}"


@dataclass(frozen=True, slots=True)
class ProfileFile:
    """The file of a model's profile, and what it held when it was opened."""

    path: Path
    of: Mapping[str, str]
    """The model's `identity`."""
    before: Profile | None

    @classmethod
    def open(cls, path: Path, moe: MoeFile) -> ProfileFile:
        """Reads a profile if there is one, and checks early that it can be written later.

        Raises:
            ValueError: there is no such folder.
            PermissionError: the folder cannot be written.
            FormatError: the file is not a profile, is damaged, or is another model's.
        """
        folder = path.absolute().parent
        if not folder.is_dir():
            raise ValueError(f"profile: no such folder: {path.parent}")
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"profile: {path} cannot be written")
        of = identity(moe)
        return cls(path, of, read_profile(path, of))

    def restore(self, store: ExpertStore, scheduler: Scheduler) -> None:
        """Gives the store and the scheduler what was learned before."""
        if self.before is not None:
            store.uses = self.before.uses
            scheduler.restore(self.before.state)

    def learned(self, store: ExpertStore, scheduler: Scheduler) -> Profile | None:
        """Returns the profile to keep, in which what other schedulers learned stays; None if nothing has run."""
        uses = store.uses
        before = {} if self.before is None else self.before.state
        return Profile(uses, {**before, **scheduler.state()}) if uses.any() else None

    def write(self, profile: Profile) -> None:
        """Replaces the file; see `write_profile`."""
        write_profile(self.path, profile, self.of)

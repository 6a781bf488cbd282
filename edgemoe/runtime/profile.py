"""Profiles: what the runtime learned about one model's use, kept from one run to the next. Format, reader and writer.

A profile is a safetensors file. `L` is the layers with routed experts, `E` experts per layer, `K` those per token.

    uses                 float64 [L, E]     uses of each expert; one of now counts 1, one of 64 tokens ago half
    look_ahead.right     float64 [K]        of guesses of each rank that were absent, those that were wanted, decayed
    look_ahead.seen      float64 [K]        all of these guesses, decayed
    next_use.weights     float64 [5]        of `edgemoe.scheduler.predict.NextUse`, which predicts an expert's next use
    next_use.curvature   float64 [5, 5]     what these weights rest on; zeros when nothing
    next_use.frequency   float64 [L, E]     uses per token, decayed
    frequency.values     float64 [L, E]     of `edgemoe.scheduler.predict.Frequency`, likewise
    hobbit.thresholds    float64 [5]        of HOBBIT: T1, T2, the shares that they were fitted to (low, skip), tokens
    transitions.far_pairs  float32 [L, E, E]  the same of two layers before
    transitions.pairs    float32 [L, E, E]  of `edgemoe.scheduler.transitions.Transitions`: what ran after what
    transitions.totals   float32 [L, E]     uses
    transitions.keys     float32 [n, 1+2K]  where K is 1 or 2: layer and experts of the two layers before, -1 for none
    transitions.followers  float32 [n, E]   what ran after each of these, in this layer

`uses` is always there, the others where a scheduler has learned them; a scheduler takes what it knows and leaves the
others as they are. For 48 layers of 128 experts, 8 per token, the default scheduler's file takes 50 kB; each further
[L, E] as much again, and transitions 6 MB. Earlier profiles may have `frequent.uses`, which was `uses` once more.

The metadata (strings) are: edgemoe_profile "1", crc (CRC-32C of all tensors' bytes, by name, in hexadecimal) and
what the profile is of: family, layers, experts, experts_per_token and fingerprint (of the weights' source).
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
    """Holds what was learned."""

    uses: NDArray[np.float64]
    """[L, E]"""
    state: State = field(default_factory=dict)
    """Of schedulers, by the names above; see `edgemoe.scheduler.Scheduler.state`."""


def identity(moe: MoeFile) -> dict[str, str]:
    """Returns what a profile is of; any other model's profile is refused."""
    config = moe.config
    return {
        "family": config.family,
        "layers": str(len(config.moe_layers)),
        "experts": str(config.num_experts),
        "experts_per_token": str(config.experts_per_token),
        "fingerprint": str(moe.source.get("fingerprint", "")),
    }


def read_profile(path: Path, of: Mapping[str, str]) -> Profile | None:
    """Reads a profile; None when there is no such file yet.

    Args:
        of: the model's `identity`.

    Raises:
        FormatError: not a profile, damaged, or another model's.
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
        # The latter two are the library's, of types that numpy does not have.
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
    """Writes a profile under its name only when it is whole.

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
    """Is where what was learned about one model is kept, and what was there when it was opened."""

    path: Path
    of: Mapping[str, str]
    """The model's `identity`."""
    before: Profile | None

    @classmethod
    def open(cls, path: Path, moe: MoeFile) -> ProfileFile:
        """Reads a profile if there is one, before anything is learned that could not be kept.

        Raises:
            ValueError: there is no such folder.
            PermissionError: the folder cannot be written.
            FormatError: not a profile, damaged, or another model's.
        """
        folder = path.absolute().parent
        if not folder.is_dir():
            raise ValueError(f"profile: no such folder: {path.parent}")
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"profile: {path} cannot be written")
        of = identity(moe)
        return cls(path, of, read_profile(path, of))

    def restore(self, store: ExpertStore, scheduler: Scheduler) -> None:
        """Tells what was learned before."""
        if self.before is not None:
            store.uses = self.before.uses
            scheduler.restore(self.before.state)

    def learned(self, store: ExpertStore, scheduler: Scheduler) -> Profile | None:
        """Returns what to keep: what other schedulers learned stays. None when nothing has run."""
        uses = store.uses
        before = {} if self.before is None else self.before.state
        return Profile(uses, {**before, **scheduler.state()}) if uses.any() else None

    def write(self, profile: Profile) -> None:
        """Replaces the file; see `write_profile`."""
        write_profile(self.path, profile, self.of)

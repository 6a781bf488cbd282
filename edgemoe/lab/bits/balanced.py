"""How much of a second text a calibration needs so that most experts have seen enough tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import FormatError
from edgemoe.file.format import MoeFile
from edgemoe.file.summed import SummedFile, write_summed
from edgemoe.lab.bits.moments import Counts
from edgemoe.lab.bits.tapped import TappedModel

__all__ = ["ENOUGH", "Machine", "balanced", "saved"]

Array = NDArray[np.float32]
Progress = Callable[[int, int], None]

ENOUGH, BALANCED = 128, 0.99
"""How many tokens are enough for one expert, and the share of all experts that must have seen that many."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A model and the resources that running it may take."""

    moe: MoeFile
    ram: int
    """Bytes for the whole process."""
    process: int
    """Bytes that the process took at the start."""
    threads: int | None

    def tapped(self, beside: int, window: int) -> TappedModel:
        """Returns the model with taps; the arguments are those of `TappedModel`."""
        return TappedModel(
            self.moe, ram=self.ram, process=self.process, beside=beside, window=window, threads=self.threads
        )  # fmt: skip

    def identity(self, pieces: NDArray[np.int32], *more: object) -> str:
        """Returns a hash of everything that a calibration depends on: the model, the pieces of text, and `more`."""
        moe = self.moe
        digest = hashlib.sha256(repr((moe.config, moe.ladder, pieces.shape, more)).encode())
        for array in (moe.experts.crcs, pieces):
            digest.update(array.tobytes())
        digest.update(repr([t.crcs for t in moe.tensors.values()]).encode())
        return digest.hexdigest()

    def activations(self, pieces: NDArray[np.int32]) -> Array:
        """Returns an uninitialised array for the output of a layer for every token, [N, T, D]."""
        return np.empty((*pieces.shape, self.moe.config.hidden_size), np.float32)


def saved(path: Path, identity: str) -> SummedFile | None:
    """Returns the file that an interrupted call has left; None if there is none, or it is damaged or another's."""
    try:
        file = SummedFile(path, "a part of a calibration")
        if file.meta.get("identity") != identity or not file.is_summed:
            return None
        file.verify()
    except (OSError, FormatError):
        return None
    return file


def balanced(
    machine: Machine,
    pieces: NDArray[np.int32],
    others: NDArray[np.int32],
    kept: Path,
    progress: Progress,
) -> NDArray[np.int32]:
    """Returns `pieces`, followed by as many of `others` as it takes for most experts to have seen enough tokens.

    Pieces go through all layers in batches, so that hardly more of them are run than needed. Counts are saved after
    each batch, and an interrupted call goes on from there.

    Args:
        pieces: [N, T] tokens.
        others: [M, T] tokens.
        kept: the file for the counts.
        progress: called with the pieces that were counted, each in every layer, and the most that there may be.
    """
    layers, needed = machine.moe.config.num_layers, len(pieces)
    every = np.concatenate([pieces, others])
    identity = machine.identity(every, needed, ENOUGH, BALANCED)
    tap, x, n = Counts(machine.moe.config), machine.activations(pieces), 0
    total = np.zeros_like(tap.counts)
    if (file := saved(kept, identity)) is not None:
        total[...], n = file.tensor("counts"), int(file.meta["windows"])

    def is_enough() -> bool:
        starved = int((total < ENOUGH).sum())
        return n >= min(needed, len(every)) and starved <= (1 - BALANCED) * total.size

    if n == len(every) or is_enough():
        return every[:n]
    # Each window of a batch has counts of its own.
    beside = x.nbytes + needed * total.nbytes
    with machine.tapped(beside, pieces.shape[1]) as model:
        while n < len(every) and not is_enough():
            some = every[n : n + needed]
            each = np.zeros((len(some), *total.shape), np.int64)
            for ids, to in zip(some, x, strict=False):
                model.embed(ids, to)
            for layer in range(layers):
                for i, ids in enumerate(some):
                    tap.counts = each[i]
                    model.run_layer(layer, ids, x[i], tap)
                    progress(n * layers + layer * len(some) + i + 1, len(every) * layers)
            for counts in each:
                total += counts
                n += 1
                if is_enough():
                    break
            meta = {"identity": identity, "windows": str(n)}
            write_summed(kept, {"counts": total}, meta, ours=True)
    return every[:n]

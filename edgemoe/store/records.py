"""Experts as records of a file: their sizes, and how fast they can be read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.file.format import ALIGNMENT, MoeFile

__all__ = [
    "NUM_READERS",
    "all_expert_bytes",
    "disk_rate",
    "expert_bytes",
    "level_bytes",
    "num_there",
    "read_rate",
]

NUM_READERS = 4  # reads in flight; more added latency and no throughput (benchmarks/LOG.md)


def _expert_pages(moe: MoeFile, level: int) -> NDArray[np.int64]:
    """Returns the bytes of memory of each expert at a level, in whole pages."""
    page = _core.system_page()
    pages: NDArray[np.int64] = -(-moe.experts.sizes(level) // page) * page
    return pages


def expert_bytes(moe: MoeFile, level: int) -> int:
    """Returns the bytes of memory of the largest expert at a level, which is also the size of every slot's window."""
    return int(_expert_pages(moe, level).max())


def all_expert_bytes(moe: MoeFile, level: int) -> int:
    """Returns the bytes of memory of all experts at a level."""
    return int(_expert_pages(moe, level).sum())


def level_bytes(moe: MoeFile, level: int) -> tuple[int, ...]:
    """Returns the mean bytes of memory of an expert at each level up to `level`, rounded down."""
    return tuple(all_expert_bytes(moe, i) // num_there(moe) for i in range(1, level + 1))


def num_there(moe: MoeFile) -> int:
    """Returns how many experts the file has; a layer may have fewer than its places."""
    return int(np.count_nonzero(moe.experts.rungs))


def disk_rate(moe: MoeFile, level: int, *, seconds: float, room: int) -> float:
    """Measures the bytes per second of reading experts in random order, as the cache does, for about `seconds`.

    If `room` bytes do not hold as many experts as are read at once, only the first part of each is read.
    """
    rng = np.random.default_rng(0)
    most = max(room // (2 * NUM_READERS) // ALIGNMENT, 1) * ALIGNMENT
    length, count = min(expert_bytes(moe, level), most), 32
    starts = moe.experts.offsets[moe.experts.offsets + np.uint64(length) <= moe.file_bytes]
    while True:
        offsets = rng.permutation(starts)[:count].tolist()
        rate = _core.disk_rate(moe.file, offsets, length, NUM_READERS)
        if length * count / rate >= seconds or count >= len(starts):
            return rate
        count *= 2


def read_rate(moe: MoeFile, size: int, *, total: int) -> float:
    """Measures the bytes per second of reads of `size` bytes at random places of a file, `total` bytes in all."""
    rng = np.random.default_rng(0)
    places = rng.integers((moe.file_bytes - size) // ALIGNMENT + 1, size=max(1, total // size))
    return _core.disk_rate(moe.file, (places * ALIGNMENT).tolist(), size, NUM_READERS)

"""A plan's request to the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.store.tiers import Tiers

__all__ = ["Request"]


@dataclass(slots=True)
class Request:
    """The experts that a plan asked for, in memory or being read. Operations find their weights by it."""

    slots: _core.Cache | Tiers
    """The cache that holds them; only a device's operations know `Tiers`."""
    experts: NDArray[np.int32]
    """[n], as the file numbers them, in the plan's order."""
    levels: NDArray[np.int8]
    """[n], the level that each runs at."""
    projected: Any = None
    """Scratch of the operations: the tokens projected for the low-rank corrections of all groups."""

"""What a plan asked of the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core

__all__ = ["Request"]


@dataclass(slots=True)
class Request:
    """A plan's experts under way, or here: what operations find their weights by."""

    slots: _core.Cache
    """Where they lie; the operations of the device that made it know what it is."""
    experts: NDArray[np.int32]
    """[n], as the file numbers them, in the plan's order."""
    levels: NDArray[np.int8]
    """[n]"""
    projected: Any = None
    """What operations made of the tokens for the corrections of all groups; theirs alone."""

"""The CPU's arrays, which are numpy's, and the scratch of its verbs."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.ops.cpu.ahead import Ahead
from edgemoe.ops.notes import CpuNotes
from edgemoe.ops.values import Array, OpsShape
from edgemoe.specs import MixerSpec

__all__ = ["CpuMemory"]


class CpuMemory:
    """The common base of the parts of `CpuOps`. See `Ops` for the verbs."""

    def __init__(self, shape: OpsShape) -> None:
        self._ws = _core.Workspace(*astuple(shape))
        self._notes = CpuNotes(self._ws)
        self._ahead = Ahead()

    @staticmethod
    def scratch_bytes(shape: OpsShape) -> int:
        """Returns the bytes of the operations' own scratch."""
        return _core.Workspace.bytes(*astuple(shape))

    def empty(self, *shape: int) -> Array:
        """See `Ops.empty`."""
        return np.empty(shape, np.float32)

    def beside(self, spec: MixerSpec, keys: str, values: str) -> None:
        """See `Ops.beside`: a CPU runs every mixer."""

    def download(self, x: Array, out: Array) -> None:
        """See `Ops.download`."""
        out[...] = x

    def upload(self, x: Array, out: Array) -> None:
        """See `Ops.upload`."""
        out[...] = x

    def settle(self) -> None:
        """See `Ops.settle`: errors are never pending, as every verb finishes its work."""

    def host(self, *shape: int, dtype: str) -> NDArray[Any]:
        """See `Ops.host`."""
        return np.empty(shape, dtype)

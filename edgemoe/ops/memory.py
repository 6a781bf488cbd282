"""Verbs of memory: arrays of a device, and copies between device and host."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from edgemoe.ops.values import Array

__all__ = ["MemoryVerbs"]


class MemoryVerbs(Protocol):
    """The memory verbs of a device; see `Ops`."""

    def empty(self, *shape: int) -> Array:
        """Returns a new array of the device, uninitialised."""

    def download(self, x: Array, out: Array) -> None:
        """Copies x, an array of the device, to out, one of the host, and waits for it."""

    def upload(self, x: Array, out: Array) -> None:
        """Copies x, an array of the host, to out, one of the device."""

    def settle(self) -> None:
        """Raises an error of attention that is still pending, such as a key that does not fit its type.

        On a device, such errors come to light only when the host waits for it.
        """

    def host(self, *shape: int, dtype: str) -> NDArray[Any]:
        """Returns a new array of the host, for results that Python reads, such as what routers choose."""

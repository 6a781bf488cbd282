"""Verbs of memory: arrays of a device, and copies between it and the host."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from edgemoe.ops.values import Array

__all__ = ["MemoryVerbs"]


class MemoryVerbs(Protocol):
    """Are a device's; see `Ops`."""

    def empty(self, *shape: int) -> Array:
        """Returns a new array of the device."""

    def download(self, x: Array, out: Array) -> None:
        """Copies to the host's out; waits."""

    def upload(self, x: Array, out: Array) -> None:
        """Copies from the host's x."""

    def settle(self) -> None:
        """Raises what attention could not store, and no verb since has raised."""

    def host(self, *shape: int, dtype: str) -> NDArray[Any]:
        """Returns a new array that Python reads after a verb has written it: what routers choose, for schedulers."""

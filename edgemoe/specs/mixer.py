"""What every mixer's spec can tell."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from edgemoe.errors import FormatError, quoted
from edgemoe.specs.tensor import TensorSpec

if TYPE_CHECKING:
    from edgemoe.specs.attention import RopeSpec

__all__ = ["LIMIT", "MOST_TAPS", "MixerSpec", "need", "need_numbers", "need_sizes"]

LIMIT = 1 << 24
"""No dimension of a real model comes near; keeps every product inside 64 bits."""

MOST_TAPS = 8
"""Of a convolution over time."""


class MixerSpec(ABC):
    """Says how the tokens of a sequence are mixed. Frozen: layers with equal ones share scratch and tables.

    A class of it checks itself and raises FormatError. Its fields are whole numbers, numbers, truth values, strings of
    a Literal, or further specs; a file has those that are not at their defaults, as JSON.
    """

    __slots__ = ()

    kind: ClassVar[str] = ""
    """Its name in a file."""

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """How positions turn queries and keys; empty where they do not."""
        return ()

    @property
    def heads(self) -> tuple[int, int]:
        """Heads of queries and the columns of each, which the workspace has to know; zeros without any."""
        return 0, 0

    @property
    def cached_heads(self) -> tuple[int, int]:
        """Heads that a cache of keys and values holds for each position, and the columns of each; zeros without one."""
        return 0, 0

    @property
    def state_pieces(self) -> int:
        """In how many places of memory its state grows with the sequence."""
        return 1

    @property
    def has_constant_keys(self) -> bool:
        """Whether a bias adds the same to every key, but for its turn by the position."""
        return False

    @property
    def values_are_keys(self) -> bool:
        """Whether a cache holds the values as a part of the keys, so that they have no type of their own."""
        return False

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """Names of tensors that are applied to the layer's input, within a layer; it may be without some of them."""

    @abstractmethod
    def __str__(self) -> str:
        """Is what a person is told of it, such as "attention: 16 heads of 128 (4 for keys and values)"."""

    @abstractmethod
    def tensors(self, hidden_size: int) -> dict[str, TensorSpec]:
        """Returns its tensors by their names within a layer, in file order."""

    def widest_input(self, hidden_size: int) -> int:
        """Returns the columns of its widest matrix."""
        return max(t.shape[1] for t in self.tensors(hidden_size).values() if t.kind == "nested")


def need(ok: bool, what: str) -> None:
    """Raises FormatError unless a model's description makes sense."""
    if not ok:
        raise FormatError(f"model config: {what}")


def need_sizes(spec: object, *names: str, least: int = 1) -> None:
    """Checks that fields are whole numbers from `least` to what is supported."""
    for name in names:
        value = getattr(spec, name)
        need(
            type(value) is int and least <= value < LIMIT,
            f"{name} must be a whole number from {least} to {LIMIT - 1}, got {quoted(value)}",
        )


def need_numbers(spec: object, *names: str) -> None:
    """Checks that fields are finite numbers above zero."""
    for name in names:
        value = getattr(spec, name)
        is_number = isinstance(value, (int, float)) and type(value) is not bool
        need(
            is_number and math.isfinite(value) and value > 0,
            f"{name} must be a positive number, got {quoted(value)}",
        )

"""The base of all mixer specs, and the checks that specs make of their fields."""

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
"""Every dimension is below this. No real model comes near it, and products of dimensions stay within 64 bits."""

MOST_TAPS = 8
"""The most taps of a convolution over time."""


class MixerSpec(ABC):
    """How a layer mixes the tokens of a sequence. Frozen: layers with equal specs share scratch and tables.

    Subclasses are dataclasses that check themselves and raise FormatError. Their fields are integers, floats, booleans,
    strings of a Literal, or other specs. A file stores the fields that are not at their defaults, as JSON.
    """

    __slots__ = ()

    kind: ClassVar[str] = ""
    """Its name in a file."""

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The RoPE specs of its queries and keys; empty without RoPE."""
        return ()

    @property
    def heads(self) -> tuple[int, int]:
        """The number of query heads and the columns of each, for sizing scratch; zeros without attention."""
        return 0, 0

    @property
    def cached_heads(self) -> tuple[int, int]:
        """The number of heads in its KV cache and the columns of each; zeros without a KV cache."""
        return 0, 0

    @property
    def state_pieces(self) -> int:
        """At how many separate places in memory its state grows with the sequence."""
        return 1

    @property
    def has_constant_keys(self) -> bool:
        """Whether every key contains the same bias, apart from its rotation: a quantised cache may leave it out."""
        return False

    @property
    def values_are_keys(self) -> bool:
        """Whether its KV cache holds the values as part of the keys, so that they have no type of their own."""
        return False

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """Names, within a layer, of the tensors that are applied to its input. A layer may lack some of them."""

    @abstractmethod
    def __str__(self) -> str:
        """Returns a description for people, such as "attention: 16 heads of 128 (4 for keys and values)"."""

    @abstractmethod
    def tensors(self, hidden_size: int) -> dict[str, TensorSpec]:
        """Returns its tensors by their names within a layer, in file order."""

    def widest_input(self, hidden_size: int) -> int:
        """Returns the columns of the widest input of any of its matrices, for sizing scratch."""
        return max(t.shape[1] for t in self.tensors(hidden_size).values() if t.kind == "nested")


def need(ok: bool, what: str) -> None:
    """Raises FormatError with the message `what` unless `ok`."""
    if not ok:
        raise FormatError(f"model config: {what}")


def need_sizes(spec: object, *names: str, least: int = 1) -> None:
    """Checks that fields are integers from `least` to `LIMIT` - 1; raises FormatError otherwise."""
    for name in names:
        value = getattr(spec, name)
        need(
            type(value) is int and least <= value < LIMIT,
            f"{name} must be a whole number from {least} to {LIMIT - 1}, got {quoted(value)}",
        )


def need_numbers(spec: object, *names: str) -> None:
    """Checks that fields are finite numbers above zero; raises FormatError otherwise."""
    for name in names:
        value = getattr(spec, name)
        is_number = isinstance(value, (int, float)) and type(value) is not bool
        need(
            is_number and math.isfinite(value) and value > 0,
            f"{name} must be a positive number, got {quoted(value)}",
        )

"""Bounds what a chat template may take: steps, memory, and the size of any one value."""

from __future__ import annotations

import sys
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

import jinja2

__all__ = ["LimitExceeded", "Meter"]

_STEPS = 1_000_000
_MADE_BYTES = 8 << 20
_VALUE_BYTES = 1 << 20
_PARSED_BYTES = 4 << 20  # of a source of as many words as are allowed
_NUMBER_BITS = 8192
_OBJECT_BYTES = 512  # of a namespace, a macro, a loop and the like, generously
_ITEM_BYTES = 72  # of a list's item that may be new: a pointer and a small tuple


class LimitExceeded(jinja2.TemplateRuntimeError):
    """Says which limit a template has reached."""


class Meter:
    """Counts what one rendering takes and ends it at a limit. One thread at a time.

    Limits grow with what the user gave, since honest templates handle all of it several times; that
    is bounded by the context. Whoever renders makes room for both: `Meter.most_bytes`.
    """

    @staticmethod
    def most_bytes(given: int) -> int:
        """Returns the memory that a rendering of `given` bytes may take, its parsed source included."""
        return _MADE_BYTES + 16 * given + _PARSED_BYTES

    def __init__(self, given: int) -> None:
        """Starts at nothing; `given` is the size of messages and variables in bytes of JSON."""
        self._largest = _VALUE_BYTES + 16 * given
        self._most_made = self._made_left = _MADE_BYTES + 16 * given
        self._most_steps = self._steps_left = _STEPS + 16 * given
        self._known: dict[int, int] = {}

    def step(self, count: int = 1) -> None:
        """Takes steps: one for every node of the template that is evaluated, more for large values."""
        self._steps_left -= count
        if self._steps_left < 0:
            raise LimitExceeded(f"it takes more than {self._most_steps:,} steps")

    def expect(self, size: int) -> None:
        """Refuses a result of `size` bytes, before it is made, if that is too large for one value."""
        if size > self._largest:
            raise LimitExceeded(f"it makes a value of more than {self._largest / 2**20:.3g} MiB")

    def expect_bits(self, bits: int) -> None:
        """Refuses a whole number of so many bits before it is made."""
        if bits > _NUMBER_BITS:
            raise LimitExceeded(f"it makes a number of more than {_NUMBER_BITS} bits")

    def know(self, value: Any) -> int:
        """Looks through what the user gave, which is there until the end, once and for all.

        Returns:
            Its size in bytes.
        """
        if isinstance(value, dict):
            size = sys.getsizeof(value) + sum(
                self.know(v) + sys.getsizeof(k) for k, v in value.items()
            )
        elif isinstance(value, list):
            size = sys.getsizeof(value) + sum(map(self.know, value))
        else:
            return sys.getsizeof(value)
        self._known[id(value)] = size
        return size

    def size(self, value: Any) -> int:
        """Returns a value's size in bytes with all that is inside, shared parts as often as they occur.

        As nothing larger than the limit gets through here, whatever walks through a value ends soon.
        """
        if type(value) is str:  # nearly always
            size = sys.getsizeof(value)
            self.expect(size)
            self.step(size >> 9)
            return size
        total, left, nodes = 0, [value], 0
        while left:
            value = left.pop()
            nodes += 1
            if isinstance(value, str):
                total += sys.getsizeof(value)
            elif isinstance(value, int):
                self.expect_bits(value.bit_length())
                total += 32
            elif id(value) in self._known:
                total += self._known[id(value)]
            elif isinstance(value, (list, tuple, dict)):
                total += sys.getsizeof(value)
                self.expect(total)
                left.extend(value)
                if isinstance(value, dict):
                    left.extend(value.values())
            elif isinstance(value, range):
                total += 40 * len(value)
            elif isinstance(value, (KeysView, ValuesView, ItemsView)):
                total += _OBJECT_BYTES
                left.extend(value)
            else:
                total += 32 if value is None or isinstance(value, float) else _OBJECT_BYTES
            self.expect(total)
        self.step((total >> 9) + (nodes >> 1))
        return total

    def sizes(self, *values: Any) -> None:
        """Counts operands, as whatever is done with them may walk through all of them."""
        for value in values:
            if value is not None:
                self.size(value)

    def made(self, value: Any) -> Any:
        """Takes a result, which is new in memory; what is run through once is so from now on."""
        if value is None or value is True or value is False:
            return value
        if isinstance(value, range):  # nothing yet, and every pass of a loop is a step
            self.spend(_OBJECT_BYTES)
            return value
        if not isinstance(value, Iterator):
            size = self.size(value)
            self.spend(_OBJECT_BYTES + _ITEM_BYTES * len(value) if _is_list(value) else size)
            return value
        items = []  # at once, or they could be stacked up without an end
        for item in value:
            self.step()
            items.append(item)
            self.expect(_ITEM_BYTES * len(items))
        return iter(self.made(items))

    def spend(self, size: int) -> None:
        """Takes bytes of memory, which are not given back before the end."""
        self._made_left -= size
        if self._made_left < 0:
            raise LimitExceeded(f"it makes more than {self._most_made / 2**20:.3g} MiB of values")


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict))

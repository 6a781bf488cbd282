"""Limits for chat templates: of steps, of memory, and of the size of any one value."""

from __future__ import annotations

import sys
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

import jinja2

__all__ = ["LimitExceeded", "Meter"]

_STEPS = 1_000_000
_MADE_BYTES = 8 << 20
_VALUE_BYTES = 1 << 20
_PARSED_BYTES = 4 << 20  # of a parsed source with as many tokens as are allowed
_NUMBER_BITS = 8192
_OBJECT_BYTES = 512  # a generous size for a namespace, a macro, a loop and the like
_ITEM_BYTES = 72  # of a list's item that may be new: a pointer and a small tuple


class LimitExceeded(jinja2.TemplateRuntimeError):
    """A template has reached a limit; the message says which."""


class Meter:
    """A count of what one rendering takes, which ends it at a limit. One thread at a time.

    Limits grow with the size of the input, since honest templates handle all of it several times;
    the context bounds the input. The caller reserves memory for both: `Meter.most_bytes`.
    """

    @staticmethod
    def most_bytes(given: int) -> int:
        """Returns the bytes of memory that a rendering of `given` bytes may take, its parsed source included."""
        return _MADE_BYTES + 16 * given + _PARSED_BYTES

    def __init__(self, given: int) -> None:
        """Starts at nothing; `given` is the size of messages and variables in bytes of JSON."""
        self._largest = _VALUE_BYTES + 16 * given
        self._most_made = self._made_left = _MADE_BYTES + 16 * given
        self._most_steps = self._steps_left = _STEPS + 16 * given
        self._known: dict[int, int] = {}

    def step(self, count: int = 1) -> None:
        """Counts steps: one for every node of the template that is evaluated, more for large values."""
        self._steps_left -= count
        if self._steps_left < 0:
            raise LimitExceeded(f"it takes more than {self._most_steps:,} steps")

    def expect(self, size: int) -> None:
        """Refuses a result of `size` bytes, before it is computed, if that is too large for one value."""
        if size > self._largest:
            raise LimitExceeded(f"it makes a value of more than {self._largest / 2**20:.3g} MiB")

    def expect_bits(self, bits: int) -> None:
        """Refuses an integer of more than 8192 bits, before it is computed."""
        if bits > _NUMBER_BITS:
            raise LimitExceeded(f"it makes a number of more than {_NUMBER_BITS} bits")

    def know(self, value: Any) -> int:
        """Records the size of the caller's input, which lives until the end, so that it need not be walked again.

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
        """Returns a value's size in bytes, contents included; shared parts count as often as they occur.

        Nothing larger than the limit passes, so that any walk through a value that passed ends soon.
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
        """Counts the sizes of operands, since an operation may walk through all of them."""
        for value in values:
            if value is not None:
                self.size(value)

    def made(self, value: Any) -> Any:
        """Counts the memory of a new result and returns it; an iterator is first run to its end."""
        if value is None or value is True or value is False:
            return value
        if isinstance(value, range):  # it holds no items yet, and every pass of a loop is a step
            self.spend(_OBJECT_BYTES)
            return value
        if not isinstance(value, Iterator):
            size = self.size(value)
            self.spend(_OBJECT_BYTES + _ITEM_BYTES * len(value) if _is_list(value) else size)
            return value
        items = []  # run at once: otherwise iterators could be nested without limit
        for item in value:
            self.step()
            items.append(item)
            self.expect(_ITEM_BYTES * len(items))
        return iter(self.made(items))

    def spend(self, size: int) -> None:
        """Counts bytes of memory; they are never given back."""
        self._made_left -= size
        if self._made_left < 0:
            raise LimitExceeded(f"it makes more than {self._most_made / 2**20:.3g} MiB of values")


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict))

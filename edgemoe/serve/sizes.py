"""How much memory what was read of a request takes while it is answered."""

from __future__ import annotations

import dataclasses
import sys

import msgspec

__all__ = ["kept_bytes"]

_WRITTEN = 4  # times that what an answer repeats is in memory as it is written as JSON


def kept_bytes(found: object) -> int:
    """Returns about how many bytes the result of reading a request takes until it is answered.

    Args:
        found: a tuple of an `Ask` or several and the request, whose fields an answer may repeat; or an answer.
    """
    parts = found if isinstance(found, tuple) else (found,)
    return sum(
        _answered(part) if isinstance(part, (dict, msgspec.Struct)) else _bytes(part)
        for part in parts
    )


def _answered(part: object) -> int:
    """Returns the bytes of what an answer repeats, with its JSON, which is in the connection's buffer once more."""
    own = _bytes(part)
    # A control character takes 1 byte, and 6 in JSON.
    return max(_WRITTEN * own, own + 2 * len(msgspec.json.encode(part)))


def _bytes(value: object) -> int:
    """Returns the bytes of a value with all that is inside it; what many prompts of a request share counts once."""
    total, left, seen = 0, [value], set[int]()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        total += sys.getsizeof(one)
        if isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, (list, tuple)):
            left += one
        elif isinstance(one, msgspec.Struct):
            left += [getattr(one, name) for name in one.__struct_fields__]
        elif dataclasses.is_dataclass(one):
            total += getattr(one, "said_bytes", 0)
            left += [getattr(one, field.name) for field in dataclasses.fields(one)]
    return total

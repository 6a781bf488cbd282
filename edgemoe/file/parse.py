"""Reads JSON that somebody else wrote: whatever the bytes, it is a value of bounded size and depth, or an error."""

from __future__ import annotations

import json
from typing import Any

from edgemoe.errors import FormatError

__all__ = ["parse_json", "parse_object"]

_MOST_BYTES = 16 << 20
_MOST_DEPTH = 64  # what is deeper would fail later, where it is printed or written


def parse_json(data: bytes | bytearray | str, where: str, *, most: int = _MOST_BYTES) -> Any:
    """Returns the value of a JSON text, whose strings can all be encoded.

    Args:
        where: what errors begin with.
        most: bytes; a value takes up to some thirty times as many in memory.

    Raises:
        FormatError: not JSON, too long or too deep.
    """
    if len(data) > most:
        raise FormatError(f"{where}: has {len(data)} bytes; expected JSON of at most {most}")
    try:
        value = json.loads(data)
        is_deep = _is_deeper(value, _MOST_DEPTH)
        if not is_deep and _may_halve(data):
            json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    except RecursionError:  # the parser's own limit, which depends on its caller
        is_deep = True
    except ValueError as error:
        raise FormatError(f"{where}: not valid JSON: {error}") from None
    if is_deep:
        raise FormatError(f"{where}: not valid JSON: nested more than {_MOST_DEPTH} deep")
    return value


def parse_object(
    data: bytes | bytearray | str, where: str, *, most: int = _MOST_BYTES
) -> dict[str, Any]:
    """Returns the object that a JSON text is.

    Raises:
        FormatError: it is none; see `parse_json`.
    """
    value = parse_json(data, where, most=most)
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _may_halve(data: bytes | bytearray | str) -> bool:
    """Says whether a text may hold half of a surrogate pair, which nothing can encode: by escape, or as it is."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    return b"\\u" in data or b"\xed" in data


def _is_deeper(value: Any, depth: int) -> bool:
    level: list[Any] = [value] if isinstance(value, (list, dict)) else []
    for _ in range(depth):
        inside = (x for v in level for x in (v if isinstance(v, list) else v.values()))
        level = [x for x in inside if isinstance(x, (list, dict))]
    return bool(level)

"""Reads untrusted JSON: any bytes yield either a value of bounded size and depth, or an error."""

from __future__ import annotations

import json
from typing import Any

from edgemoe.errors import FormatError

__all__ = ["parse_json", "parse_object"]

_MOST_BYTES = 16 << 20
_MOST_DEPTH = 64  # deeper values would fail later, when they are printed or written


def parse_json(data: bytes | bytearray | str, where: str, *, most: int = _MOST_BYTES) -> Any:
    """Returns the value of a JSON text. All its strings can be encoded as UTF-8.

    Args:
        where: the beginning of error messages.
        most: the longest text accepted, in bytes; its value can take about thirty times as much memory.

    Raises:
        FormatError: the text is not JSON, too long or nested too deeply.
    """
    if len(data) > most:
        raise FormatError(f"{where}: has {len(data)} bytes; expected JSON of at most {most}")
    try:
        value = json.loads(data)
        is_deep = _is_deeper(value, _MOST_DEPTH)
        if not is_deep and _may_halve(data):
            json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    except RecursionError:  # the parser's own limit, which depends on the depth of the call stack
        is_deep = True
    except ValueError as error:
        raise FormatError(f"{where}: not valid JSON: {error}") from None
    if is_deep:
        raise FormatError(f"{where}: not valid JSON: nested more than {_MOST_DEPTH} deep")
    return value


def parse_object(
    data: bytes | bytearray | str, where: str, *, most: int = _MOST_BYTES
) -> dict[str, Any]:
    """Returns the value of a JSON text that is an object.

    Raises:
        FormatError: the text is not an object; or as `parse_json`.
    """
    value = parse_json(data, where, most=most)
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _may_halve(data: bytes | bytearray | str) -> bool:
    """Returns whether a text may contain an unpaired surrogate, which UTF-8 cannot encode, escaped or raw."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    return b"\\u" in data or b"\xed" in data


def _is_deeper(value: Any, depth: int) -> bool:
    level: list[Any] = [value] if isinstance(value, (list, dict)) else []
    for _ in range(depth):
        inside = (x for v in level for x in (v if isinstance(v, list) else v.values()))
        level = [x for x in inside if isinstance(x, (list, dict))]
    return bool(level)

"""Reads untrusted JSON: any bytes yield either a value of bounded size and depth, or an error."""

from __future__ import annotations

import json
import re
from typing import Any

from edgemoe.errors import FormatError

__all__ = ["parse_json", "parse_object", "parsed_bytes"]

_MOST_BYTES = 16 << 20
_MOST_DEPTH = 64  # deeper values would fail later, when they are printed or written
_PER_VALUE = 72  # that a decoded value and its place in a list or an object take; measured
_BETWEEN = b",:[{"  # in JSON, no value comes without one of these before it
# Characters of 4 bytes, as they are and escaped. The searches are apart, and done where they may find something: they
# keep a server's event loop waiting, for some 25 ns a byte in one pattern.
_WIDEST, _ESCAPED = re.compile(rb"[\xf0-\xff]"), re.compile(rb"\\u[dD][89abAB]")


def parse_json(data: bytes | bytearray | str, where: str, *, most: int = _MOST_BYTES) -> Any:
    """Returns the value of a JSON text. All its strings can be encoded as UTF-8.

    Args:
        where: the beginning of error messages.
        most: the longest text accepted, in bytes; its value can take about thirty times as much memory,
            see `parsed_bytes`.

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


def parsed_bytes(data: bytes | bytearray) -> int:
    """Returns the most bytes that the values of a JSON text take while they are parsed, joined and written again.

    Texts are joined twice, parts and messages. The longest is then written as JSON, in two pieces at a time.
    """
    values = _PER_VALUE * sum(map(data.count, _BETWEEN))
    is_wide, is_escaped = not data.isascii(), b"\\u" in data
    # A wide character makes all others of its text as wide: 4 bytes each, or 2.
    if (is_wide and _WIDEST.search(data)) or (is_escaped and _ESCAPED.search(data)):
        return 14 * len(data) + values
    return (9 if is_wide or is_escaped else 5) * len(data) + values


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

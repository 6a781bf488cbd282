"""Predictions of the size of results: a filter, method or operator is refused before it makes one too large."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from edgemoe.text.jinja.meter import LimitExceeded, Meter

__all__ = ["OF_FILTERS", "OF_METHODS", "Predict", "percent", "times", "width"]

_PART_BYTES = 80  # of a string of one character, with its place in a list

Predict = Callable[[Meter, Any, tuple[Any, ...], Mapping[str, Any]], None]
"""Refuses too large a result, from a value and the arguments that its filter or method is given."""


def _texts(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, str)]


def _most(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    return max((value for value in (*args, *kwargs.values()) if isinstance(value, int)), default=0)


def _widened(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    meter.expect(4 * _most(args, kwargs))


def _with_tabs(meter: Meter, value: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    meter.expect(4 * value.count("\t") * max(_most(args, kwargs), 8))


def _in_parts(meter: Meter, value: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    separator = next(iter(_texts(args, kwargs)), "")
    parts = value.count(separator) + 1 if separator else len(value) // 2 + 1
    meter.expect(meter.size(value) + _PART_BYTES * parts)


def _in_lines(meter: Meter, value: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    lines = sum(map(value.count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")) + 1
    meter.expect(meter.size(value) + _PART_BYTES * lines)


def _indented(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if isinstance(value, str):
        width = max(_most(args, kwargs), *map(len, _texts(args, kwargs)), 4)
        lines = sum(map(value.count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")) + 1
        meter.expect(meter.size(value) + lines * (_PART_BYTES + 4 * width))


def _as_characters(
    meter: Meter, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    if isinstance(value, str):
        meter.expect(_PART_BYTES * len(value))


def _joined(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    _as_characters(meter, value, args, kwargs)
    by = sum(map(meter.size, _texts(args, kwargs)))
    meter.expect(meter.size(value) + operator.length_hint(value) * by)


def _joining(meter: Meter, value: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    for items in args:
        _joined(meter, items, (value,), {})


def _replaced(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    value = str(value)
    both = [*_texts(args, {}), "", ""]
    old, new = str(kwargs.get("old", both[0])), str(kwargs.get("new", both[1 - ("old" in kwargs)]))
    times = value.count(old) if old else len(value) + 1
    meter.expect(meter.size(value) + times * meter.size(new))


def _rounded(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if any(isinstance(n, int) and abs(n) > 400 for n in (*args, *kwargs.values())):
        raise LimitExceeded("it rounds to more than 400 digits")


def _as_number(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if isinstance(value, str) and len(value) > 4300:  # Python's own limit, which 3.10.0 lacks
        raise LimitExceeded("it reads a number of more than 4300 digits")


def _formatted(meter: Meter, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    percent(meter, str(value), kwargs or args)


OF_METHODS: Mapping[str, Predict] = {
    "center": _widened, "ljust": _widened, "rjust": _widened, "zfill": _widened,
    "expandtabs": _with_tabs, "join": _joining, "replace": _replaced,
    "split": _in_parts, "rsplit": _in_parts, "splitlines": _in_lines,
}  # fmt: skip

OF_FILTERS: Mapping[str, Predict] = {
    "center": _widened, "indent": _indented, "join": _joined, "replace": _replaced, "round": _rounded,
    "format": _formatted, "int": _as_number,
    **dict.fromkeys(
        ("dictsort", "groupby", "list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr",
         "sort", "sum", "title", "unique"), _as_characters,
    ),
}  # fmt: skip


def times(meter: Meter, left: Any, right: Any) -> None:
    """Refuses `left * right` if it would be too large."""
    if isinstance(left, int) and isinstance(right, int):
        meter.expect_bits(left.bit_length() + right.bit_length())
    elif isinstance(left, int) or isinstance(right, int):
        times, value = (left, right) if isinstance(left, int) else (right, left)
        width = 1 if isinstance(value, str) and value.isascii() else 4
        size = len(value) * width if isinstance(value, str) else meter.size(value)
        meter.expect(size * max(times, 0))


def percent(meter: Meter, form: str, values: Any) -> None:
    """Refuses `form % values` if it would be too large."""
    if re.search(r"%[^%A-Za-z]*\*|%\([^)]*\(", form):
        raise LimitExceeded("it formats to a width that is a value, or by a name with brackets")
    for found in re.findall(r"%(?:\([^)]*\))?[-+ #0]*(\d*)\.?(\d*)", form):
        for digits in found:
            width(meter, digits)
    meter.expect(4 * len(form) + form.count("%") * (512 + meter.size(values)))


def width(meter: Meter, digits: str) -> None:
    """Refuses a width or precision in a format that would make too large a text."""
    meter.expect(4 * int(digits or 0) if len(digits) < 9 else 1 << 40)

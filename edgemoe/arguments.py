"""Reads arguments of callers: numbers of any library become Python's, and what is wrong gets one clear line."""

from __future__ import annotations

import operator

__all__ = ["switch", "whole"]


def whole(name: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """Returns a whole number, given as an int or as numpy's.

    Raises:
        ValueError: it is no whole number (2.0 is none), or outside the range; names the argument.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name}: expected a whole number, got {value!r}") from None
    if (least is not None and number < least) or (most is not None and number > most):
        span = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected {span}, got {number}")
    return number


def switch(name: str, value: object) -> bool:
    """Returns True or False, given as a bool or as numpy's.

    Raises:
        ValueError: it is neither; names the argument.
    """
    if isinstance(value, bool):
        return value
    if type(value).__name__ in ("bool", "bool_"):  # numpy's, whose name differs by version
        return bool(value)
    raise ValueError(f"{name}: expected True or False, got {value!r}")

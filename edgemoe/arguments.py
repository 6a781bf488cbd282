"""Checks of callers' arguments: numpy's numbers become Python's, and a wrong argument gets one clear line."""

from __future__ import annotations

import math
import operator
import os
from pathlib import Path
from typing import Any, TypeVar

from edgemoe.errors import quoted

__all__ = ["kind", "number", "path_of", "switch", "texts", "whole", "wholes"]

T = TypeVar("T")


def whole(name: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """Returns a whole number, given as an int or a numpy integer.

    Raises:
        ValueError: it is not a whole number (2.0 is not one), or outside the range; names the argument.
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


def number(name: str, value: object, least: float, most: float) -> float:
    """Returns a finite number, given as an int, a float or a number of numpy's.

    Raises:
        ValueError: it is not a number, or outside the range; names the argument.
    """
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: expected a number, got {quoted(value)}") from None
    if not least <= found <= most or not math.isfinite(found):
        span = f"{least:g} or more" if math.isinf(most) else f"{least:g} to {most:g}"
        raise ValueError(f"{name}: expected {span}, got {found}")
    return found


def wholes(name: str, value: object, least: int) -> tuple[int, ...]:
    """Returns whole numbers, given as a list, a tuple or a numpy array.

    Raises:
        ValueError: it is none of these, or an item is not a whole number or too small; names the argument.
    """
    return tuple(whole(name, item, least) for item in _items(name, value, "whole numbers"))


def texts(name: str, value: object) -> tuple[str, ...]:
    """Returns texts, none of them empty, given as a list or a tuple.

    Raises:
        ValueError: it is neither, or an item is not a text or empty; names the argument.
    """
    items = _items(name, value, "texts")
    for item in items:
        if not isinstance(item, str) or not item:
            raise ValueError(f"{name}: expected texts, none empty, got {quoted(item)}")
    return tuple(items)


def path_of(name: str, value: object) -> Path:
    """Returns a path, given as a text or a path-like object.

    Raises:
        ValueError: it is neither, or empty; names the argument.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise ValueError(f"{name}: expected a path, got {quoted(value)}")
    if not os.fspath(value):
        raise ValueError(f"{name}: expected a path, got an empty text")
    return Path(value)


def kind(name: str, value: object, expected: type[T]) -> T:
    """Returns a value that must be an instance of a class.

    Raises:
        ValueError: it is not; names the argument.
    """
    if not isinstance(value, expected):
        what = "a text" if expected is str else expected.__name__
        raise ValueError(f"{name}: expected {what}, got {quoted(value)}")
    return value


def _items(name: str, value: object, what: str) -> list[Any]:
    if (
        isinstance(value, (str, bytes))
        or not hasattr(value, "__len__")
        or not hasattr(value, "__iter__")
        or getattr(value, "shape", None) == ()  # a numpy array without dimensions: one number
    ):
        raise ValueError(f"{name}: expected a list of {what}, got {quoted(value)}")
    return list(value)


def switch(name: str, value: object) -> bool:
    """Returns True or False, given as a bool or a numpy bool.

    Raises:
        ValueError: it is neither; names the argument.
    """
    if isinstance(value, bool):
        return value
    if type(value).__name__ in ("bool", "bool_"):  # numpy's; the name depends on its version
        return bool(value)
    raise ValueError(f"{name}: expected True or False, got {value!r}")

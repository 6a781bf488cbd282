"""Conversion of frozen dataclasses to JSON values and back, guided by the types of their fields."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from edgemoe.errors import FormatError, quoted

__all__ = ["from_values", "to_values"]

T = TypeVar("T")


def to_values(value: Any) -> Any:
    """Returns the JSON values of a dataclass: its `kind`, if it has one, and its fields that are not at their defaults.

    Lists and tuples become lists of such values. Any other value is returned as it is.
    """
    if isinstance(value, (list, tuple)):
        return [to_values(v) for v in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    kind = getattr(type(value), "kind", None)
    out = {} if kind is None else {"kind": kind}
    for field in dataclasses.fields(value):
        given = getattr(value, field.name)
        if given != field.default:
            out[field.name] = to_values(given)
    return out


def from_values(cls: type[T], values: object, what: str, kinds: Mapping[str, type[Any]]) -> T:
    """Builds a dataclass from JSON values.

    Args:
        what: a name for the value in error messages, such as "model config".
        kinds: classes by their `kind`, for fields whose type is a base class with several of them.

    Raises:
        FormatError: a field is missing, unknown, of a wrong type, or refused by the class itself.
    """
    if not isinstance(values, Mapping):
        raise FormatError(f"{what}: expected an object, got {type(values).__name__}")
    fields, hints = {f.name: f for f in dataclasses.fields(cls)}, _hints(cls)  # type: ignore[arg-type]
    given = {name: v for name, v in values.items() if name != "kind" or not hasattr(cls, "kind")}
    unknown = sorted(set(given) - set(fields))
    if unknown:
        raise FormatError(f"{what}: unknown fields {', '.join(map(str, unknown))}")
    missing = sorted(
        n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in given
    )
    if missing:
        raise FormatError(f"{what}: missing fields {', '.join(missing)}")
    return cls(**{name: _read(hints[name], v, what, name, kinds) for name, v in given.items()})


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _read(hint: Any, value: Any, what: str, name: str, kinds: Mapping[str, type[Any]]) -> Any:
    """Converts a JSON value to the type `hint` of the field `name`."""

    def wrong(expected: str) -> FormatError:
        return FormatError(f"{what}: {name} must be {expected}, got {quoted(value)}")

    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        (inner,) = (a for a in get_args(hint) if a is not types.NoneType)
        return None if value is None else _read(inner, value, what, name, kinds)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong("a list")
        return tuple(_read(get_args(hint)[0], v, what, name, kinds) for v in value)
    if hint is int and type(value) is not int:
        raise wrong("a whole number")
    if hint is bool and type(value) is not bool:
        raise wrong("true or false")
    if (hint is str or origin is Literal) and not isinstance(value, str):
        raise wrong("a string")
    if hint is float:
        if type(value) not in (int, float):
            raise wrong("a number")
        try:
            return float(value)
        except OverflowError:
            raise FormatError(f"{what}: {name} is beyond any number") from None
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "kind")):
        return _spec(hint, value, what, name, kinds)
    return value


def _spec(hint: type[Any], value: Any, what: str, name: str, kinds: Mapping[str, type[Any]]) -> Any:
    if not dataclasses.is_dataclass(hint):  # one of several
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise FormatError(f"{what}: {name}: a kind {quoted(kind)} is not known")
        hint = kinds[kind]
    return from_values(hint, value, f"{what}: {name}", kinds)

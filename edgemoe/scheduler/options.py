"""Options of schedulers: one frozen dataclass per scheduler, with a help sentence per option and checked values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar

__all__ = ["Option", "check", "describe", "option", "read_options"]

T = TypeVar("T")

_WORDS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


@dataclass(frozen=True, slots=True)
class Option:
    """The description of one option that a user may set."""

    name: str
    default: Any
    help: str
    choices: tuple[str, ...]


def option(default: Any, help: str, *, choices: tuple[str, ...] = ()) -> Any:
    """Returns a dataclass field with its help sentence. The option's type is that of its default."""
    return field(default=default, metadata={"help": help, "choices": choices})


def describe(options: type) -> list[Option]:
    """Returns the options of an options dataclass, in its order."""
    return [
        Option(f.name, f.default, f.metadata["help"], f.metadata["choices"])
        for f in fields(options)
        if f.default is not MISSING
    ]


def read_options(options: type[T], given: Mapping[str, Any]) -> T:
    """Returns the options with the given values in place of defaults. Strings are converted to the default's type.

    Raises:
        ValueError: there is no such option (the message lists those that exist), or a value is wrong.
    """
    known = {f.name: f for f in fields(options)}  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"option {name}: there is no such; expected one of: {listed}")
    return options(**{name: _value(known[name], value) for name, value in given.items()})


def check(name: str, value: float, low: float, high: float) -> None:
    """Raises a ValueError that names the option if its value lies outside [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low:g} to {high:g}, got {value:g}")


def _value(f: Field[Any], value: Any) -> Any:
    default = f.default
    kind = "a switch, on or off" if isinstance(default, bool) else f"a{_KINDS[type(default)]}"
    wrong = ValueError(f"{f.name}: expected {kind}, got {value!r}")
    if isinstance(default, bool):
        got = _WORDS.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(got, bool):
            raise wrong
        return got
    if isinstance(value, bool):
        raise wrong
    if isinstance(default, str):
        choices = f.metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"{f.name}: expected one of {', '.join(choices)}, got {value!r}")
        return str(value)
    try:
        number = float(value)
        if isinstance(default, float):
            if number != number:
                raise wrong
            return number
        if number != int(number):
            raise wrong
        return int(number)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None


_KINDS = {int: " whole number", float: " number", str: " text"}

"""Reads KEY=VALUE options of schedulers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["settings", "settings_by_scheduler"]

_WORDS = {"true": True, "false": False, "on": True, "off": False, "none": None}


def settings(texts: Iterable[str]) -> dict[str, Any]:
    """Returns options by name; a value is a number, true, false, none, or else text. Dashes in names are underscores.

    Raises:
        ValueError: not KEY=VALUE.
    """
    out: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        name = key.strip().replace("-", "_")
        if not equals or not name:
            raise ValueError(f"--set: expected KEY=VALUE, got {text!r}")
        out[name] = _value(value.strip())
    return out


def settings_by_scheduler(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns options by scheduler and name, from SCHEDULER.KEY=VALUE.

    Raises:
        ValueError: not of that form.
    """
    out: dict[str, dict[str, Any]] = {}
    for text in texts:
        scheduler, dot, rest = text.partition(".")
        if not dot or not scheduler or "=" in scheduler:
            raise ValueError(f"--set: expected SCHEDULER.KEY=VALUE, got {text!r}")
        out.setdefault(scheduler, {}).update(settings([rest]))
    return out


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text

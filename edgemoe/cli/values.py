"""Readers of flags' values: a wrong value is reported as wrong usage, before any work."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable

__all__ = [
    "CACHE_TYPES", "CACHE_TYPES_TEXT", "bits_or_auto", "levels", "ram_size", "reasoning_kind", "stats_kind", "whole",
    "wholes",
]  # fmt: skip

CACHE_TYPES = ("f16", "f32", "q8_0", "q4_0", "q3_0", "q2_0")
"""A copy of `edgemoe.model.KV_TYPES`, which takes long to import."""
CACHE_TYPES_TEXT = f"{', '.join(CACHE_TYPES[:-1])} or {CACHE_TYPES[-1]}"

_LEAST_BYTES = 1 << 20
"""A smaller size without a unit is refused, as it was hardly meant as bytes."""


def ram_size(text: str) -> int:
    """Returns the bytes of a size like 4GiB, or of a percentage of the memory that this process could have now."""
    wrong = ArgumentTypeError(f"expected a size like 4GiB or 50%, got {text!r}")
    try:
        if not text.endswith("%"):
            from edgemoe.runtime.budget import parse_size

            size = parse_size(text)
            if text.strip().isdecimal() and size < _LEAST_BYTES:
                raise ArgumentTypeError(f"{text} are bytes; expected a size like {text}GiB or 50%")
            return size
        share = float(text[:-1]) / 100
    except ValueError:
        raise wrong from None
    if not 0 < share <= 1:
        raise wrong
    from edgemoe import hardware

    return int(share * (hardware.process_bytes() + hardware.available_bytes()))


def share(text: str) -> float:
    """Returns the number that a share like 10% or 0.1 means."""
    wrong = ArgumentTypeError(f"expected a share like 10% or 0.1, got {text!r}")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        raise wrong from None
    if not 0 <= number < float("inf"):
        raise wrong
    return number / 100 if text.endswith("%") else number


def bits_or_auto(text: str) -> int | str:
    """Returns a whole number, or "auto"."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise ArgumentTypeError(f"expected a whole number or auto, got {text!r}") from None


def stats_kind(text: str) -> str:
    """Returns how much is said after a reply."""
    if text not in ("short", "full", "off"):
        raise ArgumentTypeError(f"expected short, full or off, got {text!r}")
    return text


def reasoning_kind(text: str) -> str:
    """Returns how reasoning is shown."""
    if text not in ("dim", "fold", "off"):
        raise ArgumentTypeError(f"expected dim, fold or off, got {text!r}")
    return text


def whole(at_least: int) -> Callable[[str], int]:
    """Returns a reader of a whole number from `at_least`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = at_least - 1
        if value < at_least:
            raise ArgumentTypeError(f"expected a whole number from {at_least}, got {text!r}")
        return value

    return read


def wholes(at_least: int) -> Callable[[str], list[int]]:
    """Returns a reader of whole numbers from `at_least`, separated by commas."""
    one = whole(at_least)
    return lambda text: [one(part) for part in text.split(",")]


def levels(text: str) -> tuple[int, ...]:
    """Returns bits, separated by commas."""
    return tuple(wholes(1)(text))

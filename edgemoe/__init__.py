"""Runs Mixture-of-Experts language models that are larger than memory: exactly, inside a memory budget.

import edgemoe

with edgemoe.load("model.moe", ram="4GiB") as engine:
    for piece in engine.chat().say("Hello"):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgemoe.errors import (
        Cancelled,
        DeviceError,
        DeviceLost,
        EdgemoeError,
        FormatError,
        OutOfBudget,
        RangeError,
        ReadError,
    )
    from edgemoe.runtime.chat import Chat
    from edgemoe.runtime.engine import Engine, load
    from edgemoe.runtime.meter import Stats
    from edgemoe.runtime.options import EngineOptions
    from edgemoe.text.sampler import SamplingParams

__all__ = [
    "Cancelled", "Chat", "DeviceError", "DeviceLost", "EdgemoeError", "Engine", "EngineOptions", "FormatError",
    "OutOfBudget", "RangeError", "ReadError", "SamplingParams", "Stats", "load",
]  # fmt: skip

__version__ = "0.1.0"
"""The version; `pyproject.toml` and the programs read it here."""

_HOMES = {
    "Cancelled": "errors", "Chat": "runtime.chat", "EdgemoeError": "errors", "Engine": "runtime.engine",
    "EngineOptions": "runtime.options",
    "DeviceError": "errors", "DeviceLost": "errors", "FormatError": "errors", "OutOfBudget": "errors",
    "RangeError": "errors", "ReadError": "errors",
    "SamplingParams": "text.sampler", "Stats": "runtime.meter", "load": "runtime.engine",
}  # fmt: skip


if not TYPE_CHECKING:  # type checkers would look up every name through it

    def __getattr__(name: str) -> Any:
        """Imports on first use, so that `edgemoe-run --help` need not wait for numpy and the core."""
        if name in _HOMES:
            return getattr(import_module(f"edgemoe.{_HOMES[name]}"), name)
        raise AttributeError(f"module 'edgemoe' has no attribute {name!r}")

"""Reads the settings of a checkpoint's config.json. Errors name the key that is missing or wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgemoe.convert.checkpoint import Checkpoint
from edgemoe.errors import FormatError, quoted
from edgemoe.file.parse import parse_object

__all__ = ["Settings", "eos_ids", "text_settings"]

_OF_THE_WHOLE = ("tie_word_embeddings", "quantization_config", "eos_token_id")
"""Keys outside the section `text_config` that apply to the text model too."""

_LARGEST = 1 << 53  # float64 represents every integer up to here


class Settings:
    """The values of a config.json. A key with the value null counts as absent. Immutable."""

    def __init__(self, values: Mapping[str, Any], *, where: str = "config.json") -> None:
        self._values = values
        self._where = where

    def get(self, key: str) -> Any:
        """Returns the raw JSON value, None when absent."""
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None, *, at_least: int = 1) -> int:
        """Returns a whole number; without a default the key must exist."""
        value = self._value(key, default)
        if type(value) is not int or not at_least <= value <= _LARGEST:
            raise self.error(key, f"expected a whole number from {at_least}, got {quoted(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a finite number; without a default the key must exist."""
        value = self._value(key, default)
        if not _is_number(value):
            raise self.error(key, f"expected a finite number, got {quoted(value)}")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """Returns a finite number above zero; without a default the key must exist."""
        value = self.number(key, default)
        if value <= 0:
            raise self.error(key, f"must be positive, got {value}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Returns a boolean."""
        value = self._value(key, default)
        if type(value) is not bool:
            raise self.error(key, f"expected true or false, got {quoted(value)}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Returns a string; without a default the key must exist."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"expected a string, got {quoted(value)}")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """Returns a list of whole numbers, or a single one as a tuple of one; empty when absent."""
        value = self._values.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(v) is int for v in values):
            raise self.error(key, f"expected whole numbers, got {quoted(value)}")
        return tuple(values)

    def positives(self, key: str, count: int) -> tuple[float, ...]:
        """Returns a list of exactly `count` finite numbers above zero; the key must exist."""
        value = self._value(key, None)
        if not isinstance(value, list) or not all(_is_number(v) and v > 0 for v in value):
            raise self.error(key, "expected a list of positive numbers")
        if len(value) != count:
            raise self.error(key, f"expected {count} numbers, got {len(value)}")
        return tuple(float(v) for v in value)

    def section(self, key: str) -> Settings | None:
        """Returns a nested object; None when absent or empty."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(key, f"expected an object, got {quoted(value)}")
        return Settings(value, where=f"{self._where}: {key}") if value else None

    def replaced(self, **values: Any) -> Settings:
        """Returns settings with the values of some keys replaced."""
        return Settings({**self._values, **values}, where=self._where)

    def error(self, key: str, what: str) -> FormatError:
        """Returns the error for one key."""
        return FormatError(f"{self._where}: {key}: {what}")

    def _value(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        return value


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= _LARGEST if isinstance(value, int) else math.isfinite(value)


def text_settings(values: Mapping[str, Any]) -> Settings:
    """Returns the settings of the text model, which multimodal models have in the section `text_config`."""
    section = Settings(values).section("text_config")
    if section is None:
        return Settings(values)
    whole = {key: values[key] for key in _OF_THE_WHOLE if values.get(key) is not None}
    return Settings({**values["text_config"], **whole}, where="config.json: text_config")


def eos_ids(checkpoint: Checkpoint, vocab_size: int) -> tuple[int, ...]:
    """Returns the tokens that end a reply: those of generation_config.json, or else of config.json.

    Chat models list their end-of-turn token only in the former.

    Raises:
        FormatError: a token is outside the vocabulary.
    """
    name = "generation_config.json"
    if name in checkpoint.files:
        values = parse_object(checkpoint.files[name], name)
        ids = _tokens(Settings(values, where=name), vocab_size)
        if ids:
            return ids
    return _tokens(text_settings(checkpoint.config), vocab_size)


def _tokens(settings: Settings, vocab_size: int) -> tuple[int, ...]:
    key = "eos_token_id"
    ids = settings.integers(key)
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside:
        raise settings.error(key, f"{quoted(outside[0])} is outside the vocabulary of {vocab_size}")
    return ids

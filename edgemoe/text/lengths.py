"""How long a prompt may be, as text: one that cannot fit the context is refused before all of it is tokenized."""

from __future__ import annotations

__all__ = ["beginning", "beginning_length", "most_characters"]

_SURELY_LONG = 8  # characters per token; text has about four
_TEMPLATE_CHARACTERS = 4096  # that a chat template may add of its own


def beginning(text: str, context: int) -> str:
    """Returns as much of a text as shows that it is too long for a context, in tokens; all of a text that may fit."""
    return text[: beginning_length(context)]


def beginning_length(context: int) -> int:
    """Returns the most characters of a `beginning`."""
    return _SURELY_LONG * context


def most_characters(given: int, context: int) -> int:
    """Returns the characters of the longest prompt that a chat template may make of `given` characters."""
    return _SURELY_LONG * context + 2 * given + _TEMPLATE_CHARACTERS

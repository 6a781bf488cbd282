"""Runs a given text through a model as if the model had written it, so that a trace of it can be recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgemoe.runtime.engine import Engine

__all__ = ["follow", "follow_pieces"]


def follow(
    engine: Engine,
    ids: Sequence[int],
    *,
    prompt: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Computes a new sequence: its first `prompt` tokens as a prompt, the others one at a time.

    Args:
        ids: the tokens of the text.
        prompt: how many of them are the prompt.
        progress: called with the tokens done and all tokens.

    Raises:
        ValueError: the text does not fit the engine's context, or has no token after the prompt.
    """
    if not 1 <= prompt < len(ids):
        raise ValueError(f"prompt: expected 1 to {len(ids) - 1} tokens of the text, got {prompt}")
    engine.logits(ids[:prompt], last_only=True)
    for i in range(prompt, len(ids)):
        engine.extend(ids[i : i + 1])
        progress(i + 1, len(ids))


def follow_pieces(
    engine: Engine,
    ids: Sequence[int],
    *,
    length: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Computes a text as sequences of `length` tokens, each in one pass: many times as fast as one token at a time.

    Args:
        ids: the tokens of the text.
        length: tokens of each sequence; the last may be shorter.
        progress: called with the tokens done and all tokens.

    Raises:
        ValueError: a piece does not fit the engine's context.
    """
    for first in range(0, len(ids), length):
        engine.logits(ids[first : first + length], last_only=True)
        progress(min(first + length, len(ids)), len(ids))

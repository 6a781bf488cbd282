"""What a reply says about the work that it took: timings in llama.cpp's format, and the field "edgemoe"."""

from __future__ import annotations

from typing import Any

from edgemoe.runtime.requests import Figures
from edgemoe.serve.ask import Ask

__all__ = ["timing_fields", "timings", "usage_extras"]


def usage_extras(figures: Figures, ask: Ask, notes: tuple[str, ...]) -> dict[str, Any]:
    """Returns the field "edgemoe" of a reply: what the engine did for it.

    Args:
        figures: the reply's.
        ask: what was asked.
        notes: the model's.
    """
    uses = figures.hits + figures.misses
    out: dict[str, Any] = {
        "hit_rate": figures.hits / uses if uses else 1.0, "bytes_read": figures.bytes_read,
        "average_bits": round(figures.average_bits, 3), "skipped": figures.skipped_share,
        "substituted": figures.substituted_share, "beside": figures.beside,
        "logits_hash": figures.logits_hash, "ignored": ask.ignored,
    }  # fmt: skip
    if figures.changed:
        out["changed"] = figures.changed
    if notes or ask.notes:
        out["notes"] = [*notes, *ask.notes]
    return out


def timings(figures: Figures) -> dict[str, Any]:
    """Returns the figures of a reply in llama.cpp's format."""
    f = figures
    computed = f.prompt_tokens - f.cached_tokens
    return timing_fields(f.cached_tokens, computed, f.prompt_s, f.new_tokens, f.decode_s) | {
        "queue_ms": 1000 * f.queue_s
    }


def timing_fields(
    cached: int, computed: int, prompt_s: float, made: int, decode_s: float
) -> dict[str, Any]:
    """Returns llama.cpp's "timings" of tokens (reused, computed, made) and seconds (of the prompt, of decoding)."""
    later = max(made - 1, 0)
    return {
        "cache_n": cached, "prompt_n": computed, "prompt_ms": 1000 * prompt_s,
        "prompt_per_second": computed / prompt_s if prompt_s else 0.0,
        "predicted_n": made, "predicted_ms": 1000 * decode_s,
        "predicted_per_second": later / decode_s if decode_s else 0.0,
    }  # fmt: skip

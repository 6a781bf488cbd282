"""Converts a GGUF file's RoPE metadata to the `rope_scaling` of config.json."""

from __future__ import annotations

from typing import Any

from edgemoe.convert.gguf.meta import Meta
from edgemoe.errors import quoted

__all__ = ["rope_scaling"]

_P = "rope.scaling."


def rope_scaling(meta: Meta) -> dict[str, Any] | None:
    """Returns `rope_scaling`; None if RoPE is not scaled.

    Raises:
        FormatError: the kind of scaling is not supported, or a number is wrong.
    """
    if meta.rope_factors is not None:  # expressed as LongRoPE, which has such a list of divisors
        return {
            "rope_type": "longrope",
            "factor": 1.0,
            "attention_factor": 1.0,
            "short_factor": meta.rope_factors,
            "long_factor": meta.rope_factors,
        }
    kind = meta.get(_P + "type") or "linear"  # llama.cpp's default
    factor = _factor(meta)
    if kind == "none" or (kind == "linear" and factor is None):
        return None
    if kind not in ("linear", "yarn"):
        raise meta.error(
            _P + "type", f"{quoted(kind)} is not supported in GGUF; supported: none, linear, yarn"
        )
    if kind == "linear":
        for key in (_P + "attn_factor", _P + "yarn_attn_factor"):  # llama.cpp applies it here too
            if meta.positive(key, 1.0) != 1.0:
                raise meta.error(key, f"must be 1, got {meta.get(key)}")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    original = _P + "original_context_length"
    if meta.get(original):
        scaling["original_max_position_embeddings"] = meta.whole(original)
    if kind == "yarn":
        if factor is None:
            raise meta.error(_P + "factor", "is missing")
        for ours, theirs in (
            ("attention_factor", "yarn_attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            if meta.get(_P + theirs):
                scaling[ours] = meta.positive(_P + theirs)
    return scaling


def _factor(meta: Meta) -> float | None:
    # The second key is the old name.
    for key in (_P + "factor", "rope.scale_linear"):
        if meta.get(key) is not None:
            return meta.positive(key) if meta.get(key) != 0 else None
    return None

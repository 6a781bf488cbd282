"""Model configs of file version 2, in which all layers have the same attention, apart from its window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["with_mixers"]

_ATTENTION = {
    "num_heads": "num_heads", "num_kv_heads": "num_kv_heads", "head_dim": "head_dim",
    "attention_scale": "scale", "qkv_bias": "qkv_bias", "o_bias": "o_bias", "qk_norm": "qk_norm",
    "norm_after_rope": "norm_after_rope", "clip_qkv": "clip",
}  # fmt: skip
"""Names of fields in version 2, and of the same fields in `AttentionSpec`."""
_MOST_LAYERS = 1 << 12
_ROPE = {"rope_dim": "dim", "rope_scale": "scale", "rope_short_length": "short_length"}


def with_mixers(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON values of a `ModelConfig` from those of version 2.

    Invalid values are passed on unchanged, so that reading the result refuses them.
    """
    moved = {*_ATTENTION, *_ROPE, "windows"}
    values = {name: value for name, value in flat.items() if name not in moved}
    attention = {ours: flat[name] for name, ours in _ATTENTION.items() if name in flat}
    rope = {ours: flat[name] for name, ours in _ROPE.items() if flat.get(name) is not None}
    rope.setdefault("dim", flat.get("head_dim"))
    attention |= {"kind": "attention", "rope": rope}
    if "norm_eps" in flat:
        attention["norm_eps"] = flat["norm_eps"]
    layers, windows = flat.get("num_layers"), flat.get("windows") or []
    if not windows and type(layers) is int and 0 < layers < _MOST_LAYERS:
        windows = [0] * layers
    is_list = isinstance(windows, (list, tuple)) and len(windows) < _MOST_LAYERS
    kinds = {repr(w): w for w in windows} if is_list else {}
    places = {shown: i for i, shown in enumerate(kinds)}
    values["mixers"] = [attention | {"window": w} for w in kinds.values()]
    values["layer_mixers"] = [places[repr(w)] for w in windows] if is_list else windows
    return values

"""What of a model lies on a device, what runs there, and what the host keeps.

All that `CudaOps` has kernels for is the device's. A mixer of which it knows too little is run by the host, beside the
device; anything else that is unknown is refused.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import ModelConfig
from edgemoe.file.format import MoeFile
from edgemoe.specs import (
    AttentionSpec,
    ConvSpec,
    DeltaSpec,
    MambaSpec,
    MixerSpec,
    MlaSpec,
)
from edgemoe.store import (
    EMBED_ROWS,
    Told,
    has_stored_rows,
    load_rows,
    nobody,
    read_dense,
    rows_bytes,
    rows_read,
)

__all__ = [
    "MOST_HEAD_DIM",
    "Both",
    "host_bytes",
    "hosted",
    "lacks",
    "load_on",
    "places",
    "unsupported",
]

Place = Literal["device", "host", "both"]

MOST_HEAD_DIM = 640
"""Columns of a head, or of a latent's key, that a device attends with."""

_KV_TYPES = frozenset(("f16", "f32", "q8_0"))
_SCHEMES = frozenset(("nested", "mwq"))
_ACTIVATIONS = frozenset(("swiglu", "geglu", "clamped_swiglu", "relu2"))

# What the device knows, by name. What is further waits until it is known here too.
_ROPE = frozenset(("name", "dim", "scale", "short_length"))
_MIXERS: Mapping[type[MixerSpec], frozenset[str]] = {
    AttentionSpec: frozenset(
        ("num_heads", "num_kv_heads", "head_dim", "scale", "window", "qkv_bias", "o_bias", "qk_norm", "norm_eps",
         "clip", "rope", "norm_after_rope", "gate", "sinks", "shared_kv", "v_norm", "chunk", "growth", "grow_every")
    ),
    ConvSpec: frozenset(("width", "taps")),
    DeltaSpec: frozenset(
        ("key_heads", "value_heads", "key_dim", "value_dim", "taps", "norm_eps", "gate", "channel_decay", "bounded",
         "decay_rank", "gate_rank")
    ),
    MambaSpec: frozenset(
        ("num_heads", "head_dim", "groups", "state_dim", "taps", "norm_eps", "conv_bias")
    ),
    MlaSpec: frozenset(
        ("num_heads", "q_rank", "latent_dim", "nope_dim", "rope_dim", "value_dim", "scale", "rope", "norm_eps",
         "growth", "grow_every", "gate")
    ),
}  # fmt: skip
_CONFIG = frozenset(
    ("family", "vocab_size", "hidden_size", "num_layers", "context_length", "norm_eps", "tied", "mixers",
     "layer_mixers", "num_experts", "experts_per_token", "expert_hidden", "moe_layers", "scoring", "renormalise",
     "choice_bias", "gate_scale", "gate_input", "groups", "used_groups", "group_score", "router_bias", "activation",
     "expert_bias", "shared_hidden", "shared_sigmoid", "branch_norms", "out_norms", "layer_scale", "head_bias",
     "soft_cap", "embedding_multiplier", "residual_multiplier", "logits_divisor", "eos_ids")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Both:
    """Is a tensor that lies on both sides: an embedding that is the head too, what experts have beside matrices."""

    host: Any
    device: Any


def unsupported(moe: MoeFile) -> str | None:
    """Returns what of a model has neither kernels for a device nor a way around them, None when all has."""
    config = moe.config
    if name := _unknown(config, _CONFIG):
        return f"{name} {getattr(config, name)}"
    if config.activation not in _ACTIVATIONS:
        return f"the activation {config.activation}"
    if moe.scheme.name not in _SCHEMES:
        return f"the scheme {moe.scheme.name}"
    return None


def hosted(config: ModelConfig, kinds: Sequence[tuple[str, str]]) -> dict[int, str]:
    """Returns the layers whose mixers the host runs beside a device, and why.

    Args:
        kinds: what each layer's cache stores keys and values as.
    """
    layers = zip(config.mixer_by_layer, kinds, strict=True)
    reasons = [lacks(spec, keys, values) for spec, (keys, values) in layers]
    return {i: why for i, why in enumerate(reasons) if why}


def lacks(spec: MixerSpec, keys: str, values: str) -> str | None:
    """Returns what of a mixer has no kernels for a device, None when all has.

    Args:
        keys: the kind that its cache stores keys as.
        values: the same of values.
    """
    known = _MIXERS.get(type(spec))
    if known is None:
        return f"a mixer of the kind {spec.kind}"
    for part, names in ((spec, known), *((rope, _ROPE) for rope in spec.ropes)):
        if name := _unknown(part, names):
            return f"a mixer of the kind {spec.kind} with {name}"
    if not spec.cached_heads[0]:  # it stores neither keys nor values
        return None
    if spec.heads[1] > MOST_HEAD_DIM:
        return f"heads of {spec.heads[1]} columns, more than {MOST_HEAD_DIM}"
    for kind in (keys, *(() if spec.values_are_keys else (values,))):
        if kind not in _KV_TYPES:
            return f"a KV cache in {kind}"
    if keys == "q8_0" and spec.has_constant_keys:
        return "keys in 8 bits beside key biases (-ctk f16 has some)"
    return None


def _unknown(spec: Any, known: frozenset[str]) -> str | None:
    """Returns a field that is not among the known ones, and not at a default that says nothing."""
    for field in fields(spec):
        says_something = field.default is MISSING or getattr(spec, field.name) != field.default
        if field.name not in known and says_something:
            return field.name
    return None


def places(moe: MoeFile, level: int, mixers: Container[int]) -> Iterator[tuple[str, Place]]:
    """Yields where each tensor outside the routed experts lies; the host has none of an embedding whose rows it looks
    up in the file.

    Args:
        level: rungs of the matrices.
        mixers: the layers whose mixers the host runs.
    """
    config = moe.config
    kept = {name for spec in config.ropes for name in spec.tensors()} | {"head_bias"}
    for i, spec in enumerate(config.mixer_by_layer):
        if i in mixers:
            kept |= {f"layers.{i}.{name}" for name in spec.tensors(config.hidden_size)}
    for name in moe.tensors:
        last = name.rsplit(".", 1)[-1]
        if name == "embed" and has_stored_rows(moe, level):
            if config.tied:
                yield name, "device"
        elif name == "embed":
            yield name, "both" if config.tied else "host"
        elif name in kept:
            yield name, "host"
        else:
            is_both = ".expert_bias." in name or last in ("choice_bias", "router_bias")
            yield name, "both" if is_both else "device"


def host_bytes(moe: MoeFile, level: int, mixers: Container[int]) -> int:
    """Returns the host's memory of the tensors that `load_on` reads to there."""
    here = (name for name, place in places(moe, level, mixers) if place != "device")
    rows = rows_bytes(moe, level, is_alone=True) if has_stored_rows(moe, level) else 0
    return moe.basis_bytes + rows + sum(moe.tensors[name].size(level) for name in here)


def load_on(
    device: _core.Device,
    moe: MoeFile,
    level: int,
    mixers: Container[int],
    *,
    verify: bool,
    told: Told = nobody,
) -> dict[str, Any]:
    """Reads every tensor outside the routed experts to where it is used, one at a time; see `load_dense`.

    Args:
        mixers: the layers whose mixers the host runs.
    """
    where = dict(places(moe, level, mixers))
    out: dict[str, Any] = {}
    is_stored = has_stored_rows(moe, level)
    beside = rows_read(moe, 0) if is_stored and verify else 0
    for name, weight in read_dense(moe, where, level, verify=verify, told=told, beside=beside):
        place = where[name]
        there = None if place == "host" else _uploaded(device, weight)
        out[name] = weight if place == "host" else Both(weight, there) if place == "both" else there
    if is_stored:
        out[EMBED_ROWS] = load_rows(moe, None, verify=verify, told=told)
    if moe.bases is not None:
        for layer, basis in zip(moe.config.moe_layers, moe.bases, strict=True):
            # Rows of whole tiles: bytes that are moved as floats are.
            there = _uploaded(device, np.ascontiguousarray(basis).view(np.float32))
            out[f"layers.{layer}.experts.basis"] = Both(basis, there)
    return out


def _uploaded(
    device: _core.Device, weight: _core.Nested | NDArray[np.float32]
) -> _core.DeviceMatrix | _core.DeviceArray:
    if isinstance(weight, _core.Nested):
        return _core.DeviceMatrix(device, weight)
    out = _core.DeviceArray(device, weight.shape)
    out.upload(weight)
    return out

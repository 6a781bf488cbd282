"""Which parts of a model lie and run on a device, and which on the host.

Everything that `CudaOps` has kernels for runs on the device. A mixer without kernels runs on the host; anything else
without kernels is refused.
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
"""The most columns of a head, or of a latent key, for which a device has attention kernels."""

_KV_TYPES = frozenset(("f16", "f32", "q8_0"))
_SCHEMES = frozenset(("nested", "mwq"))
_ACTIVATIONS = frozenset(("swiglu", "geglu", "clamped_swiglu", "relu2"))

# The fields that the device's kernels support, by name. A field that is added to a spec counts as unsupported until it
# is added here.
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
    """A tensor with a copy on either side, such as an embedding that is also the head, or the experts' biases."""

    host: Any
    device: Any


def unsupported(moe: MoeFile) -> str | None:
    """Returns a part of a model that a device cannot run and the host cannot run for it; None if there is none."""
    config = moe.config
    if name := _unknown(config, _CONFIG):
        return f"{name} {getattr(config, name)}"
    if config.activation not in _ACTIVATIONS:
        return f"the activation {config.activation}"
    if moe.scheme.name not in _SCHEMES:
        return f"the scheme {moe.scheme.name}"
    return None


def hosted(config: ModelConfig, kinds: Sequence[tuple[str, str]]) -> dict[int, str]:
    """Returns the layers whose mixers run on the host, each with the reason.

    Args:
        kinds: for each layer, the types in which its cache stores keys and values.
    """
    layers = zip(config.mixer_by_layer, kinds, strict=True)
    reasons = [lacks(spec, keys, values) for spec, (keys, values) in layers]
    return {i: why for i, why in enumerate(reasons) if why}


def lacks(spec: MixerSpec, keys: str, values: str) -> str | None:
    """Returns a part of a mixer that a device has no kernels for; None if there is none.

    Args:
        keys: the type in which its cache stores keys.
        values: the same for values.
    """
    known = _MIXERS.get(type(spec))
    if known is None:
        return f"a mixer of the kind {spec.kind}"
    for part, names in ((spec, known), *((rope, _ROPE) for rope in spec.ropes)):
        if name := _unknown(part, names):
            return f"a mixer of the kind {spec.kind} with {name}"
    if not spec.cached_heads[0]:  # has neither keys nor values
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
    """Returns the name of a field that is not among `known` and not at its default; None if there is none."""
    for field in fields(spec):
        says_something = field.default is MISSING or getattr(spec, field.name) != field.default
        if field.name not in known and says_something:
            return field.name
    return None


def places(moe: MoeFile, level: int, mixers: Container[int]) -> Iterator[tuple[str, Place]]:
    """Yields each dense tensor's name and where it lies.

    An embedding whose rows are looked up in the file is not in the host's memory.

    Args:
        level: the level of the matrices.
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
    """Returns the bytes of the tensors that `load_on` reads into the host's memory."""
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
    """Reads every dense tensor to where it is used, one at a time; see `load_dense` for arguments and errors.

    Args:
        mixers: the layers whose mixers the host runs.

    Returns:
        The tensors by name: of the host, of the device, or `Both`.
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
            # Rows are whole tiles of 64 bytes, which are copied as if they were float32.
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

"""The common parts of families with multi-head latent attention: its spec, and the sources of its matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import MATRICES, ModelConfig
from edgemoe.convert.families.family import Source, as_ours
from edgemoe.convert.families.reading import decoder_config, num_layers
from edgemoe.convert.rope import query_growth, score_gain
from edgemoe.convert.settings import Settings
from edgemoe.errors import quoted
from edgemoe.specs import MlaSpec, RopeSpec

__all__ = ["LATENT", "SHARED", "expect", "first_dense", "latent_config", "latent_spec", "refuse"]

Array = NDArray[Any]


def _turned_last(heads: int, turned: int, values: Array) -> Array:
    """Reorders the last `turned` rows of each head, which RoPE rotates, from adjacent pairs to halves, as we rotate."""
    rows = values.reshape(heads, -1, values.shape[1])
    first = rows.shape[1] - turned
    parts = [rows[:, :first], rows[:, first::2], rows[:, first + 1 :: 2]]
    out: Array = np.concatenate(parts, axis=1).reshape(values.shape)
    return out


def _queries(values: Array, spec: MlaSpec) -> Array:
    return _turned_last(spec.num_heads, spec.rope_dim, values)


def _keys(values: Array, spec: MlaSpec) -> Array:
    return _turned_last(1, spec.rope_dim, values)


def _k_b(values: Array, spec: MlaSpec) -> Array:
    """Returns the keys' part of each head's [nope_dim + value_dim, latent_dim], transposed."""
    heads = values.reshape(spec.num_heads, spec.nope_dim + spec.value_dim, spec.latent_dim)
    part: Array = heads[:, : spec.nope_dim].transpose(0, 2, 1)
    return part.reshape(-1, spec.nope_dim)


def _v_b(values: Array, spec: MlaSpec) -> Array:
    heads = values.reshape(spec.num_heads, spec.nope_dim + spec.value_dim, spec.latent_dim)
    return heads[:, spec.nope_dim :].reshape(-1, spec.latent_dim)


def _kv_b(shape: tuple[int, ...], spec: MlaSpec) -> tuple[int, ...]:
    return spec.num_heads * (spec.nope_dim + spec.value_dim), spec.latent_dim


_P = "self_attn."
LATENT: Mapping[str, Mapping[str, Source]] = {
    MlaSpec.kind: {
        "q_direct": Source(_P + "q_proj.weight", fold=_queries, moved=as_ours),
        "q_a": Source(_P + "q_a_proj.weight"),
        "q_a_norm": Source(_P + "q_a_layernorm.weight"),
        "q_b": Source(_P + "q_b_proj.weight", fold=_queries, moved=as_ours),
        "kv_a": Source(_P + "kv_a_proj_with_mqa.weight", fold=_keys, moved=as_ours),
        "kv_a_norm": Source(_P + "kv_a_layernorm.weight"),
        "k_b": Source(_P + "kv_b_proj.weight", fold=_k_b, moved=_kv_b),
        "v_b": Source(_P + "kv_b_proj.weight", fold=_v_b, moved=_kv_b),
    }
}
"""The sources of the matrices, for `Family.mixers`."""

SHARED: Mapping[str, Source] = {
    f"shared.{x}": Source(f"mlp.shared_experts.{x}_proj.weight") for x in MATRICES
}
"""The sources of the shared experts."""


def expect(settings: Settings, key: str, default: str, *others: str) -> str:
    """Returns the value of a key, which must be `default` (assumed if absent) or one of `others`.

    Raises:
        FormatError: it has another value.
    """
    value, known = settings.text(key, default), (default, *others)
    if value not in known:
        raise settings.error(
            key, f"{quoted(value)} is not supported; supported: {', '.join(known)}"
        )
    return value


def refuse(settings: Settings, **wrong: bool) -> None:
    """Checks that no flag has the given unsupported value, which no published model has.

    Raises:
        FormatError: a flag has it; the message names the first one.
    """
    for key, value in wrong.items():
        if settings.flag(key, not value) == value:
            raise settings.error(key, f"{str(value).lower()} is not supported for this family")


def first_dense(settings: Settings, default: int) -> tuple[int, ...]:
    """Returns the layers with routed experts: all but the first ones, `default` of them if config.json does not say.

    Raises:
        FormatError: config.json asks for another arrangement.
    """
    if settings.integer("moe_layer_freq", 1) != 1:
        raise settings.error("moe_layer_freq", "only 1 is supported")
    first = settings.integer("first_k_dense_replace", default, at_least=0)
    return tuple(range(first, num_layers(settings)))


def latent_config(
    settings: Settings, *, family: str, moe_layers: tuple[int, ...], **switches: Any
) -> ModelConfig:
    """Returns the config of a family, with the fields that all these families share; `switches` are the other fields.

    Raises:
        FormatError: a key is missing, wrong, or asks for what the runtime cannot do.
    """
    width, first = settings.integer("moe_intermediate_size"), settings.integer("intermediate_size")
    shared = width * settings.integer("n_shared_experts", at_least=0)
    layers = range(num_layers(settings))
    return decoder_config(
        settings,
        family=family,
        mixers=latent_spec(settings),
        num_experts=settings.integer("n_routed_experts"),
        expert_hidden=width,
        moe_layers=moe_layers,
        shared_hidden=tuple(shared if i in moe_layers else first for i in layers),
        gate_scale=settings.positive("routed_scaling_factor", 1.0),
        **switches,
    )


def latent_spec(settings: Settings) -> MlaSpec:
    """Returns the mixer of latent attention.

    Raises:
        FormatError: a key is missing, wrong, or asks for what the runtime cannot do.
    """
    refuse(settings, attention_bias=True, rope_interleave=False)
    heads = settings.integer("num_attention_heads")
    if settings.integer("num_key_value_heads", heads) != heads:
        raise settings.error("num_key_value_heads", f"expected {heads}, as num_attention_heads")
    nope, turned = settings.integer("qk_nope_head_dim"), settings.integer("qk_rope_head_dim")
    growth, grow_every = query_growth(settings)
    return MlaSpec(
        num_heads=heads,
        q_rank=settings.integer("q_lora_rank", 0, at_least=0),
        latent_dim=settings.integer("kv_lora_rank"),
        nope_dim=nope,
        rope_dim=turned,
        value_dim=settings.integer("v_head_dim"),
        scale=(nope + turned) ** -0.5 * score_gain(settings),
        rope=RopeSpec(dim=turned),
        growth=growth,
        grow_every=grow_every,
    )

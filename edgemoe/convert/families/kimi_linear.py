"""Kimi-Linear: Kimi Delta Attention, with a decay per channel; every fourth layer is latent attention without RoPE."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import MATRICES, ModelConfig
from edgemoe.convert.families.deepseek_v3 import sigmoid_router
from edgemoe.convert.families.family import Family, Source, choosing
from edgemoe.convert.families.latent import LATENT, expect, latent_spec
from edgemoe.convert.families.reading import by_type, decoder_config, num_layers
from edgemoe.convert.settings import Settings
from edgemoe.specs import DeltaSpec, MixerSpec

__all__ = ["FAMILY", "delta_sources", "hybrid_config", "with_usual_names"]

Array = NDArray[Any]
_FULL, _LINEAR = "full_attention", "linear_attention"
_USUAL = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts": "num_local_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}
"""Keys of the released config.json, and the names under which transformers 5 writes them."""


def with_usual_names(settings: Settings) -> Settings:
    """Returns config.json with the keys that transformers 5 writes."""
    found = {ours: settings.get(theirs) for theirs, ours in _USUAL.items()}
    return settings.replaced(**{key: v for key, v in found.items() if v is not None})


def _config(settings: Settings) -> ModelConfig:
    settings = with_usual_names(settings)
    expect(settings, "moe_router_activation_func", "sigmoid")
    linear = settings.section("linear_attn_config") or Settings({})
    width = linear.integer("head_dim", settings.integer("linear_head_dim", 128))
    heads = linear.integer("num_heads", settings.integer("linear_num_heads", 32))
    taps = linear.integer("short_conv_kernel_size", settings.integer("linear_conv_kernel_dim", 4))
    delta = DeltaSpec(
        key_heads=heads, value_heads=heads, key_dim=width, value_dim=width, taps=taps,
        norm_eps=settings.number("rms_norm_eps"), gate="sigmoid", channel_decay=True,
        decay_rank=width, gate_rank=width,
    )  # fmt: skip
    if settings.get("layer_types") is None:
        settings = settings.replaced(layer_types=_layer_types(settings, linear))
    latent = dataclasses.replace(latent_spec(settings), rope=None)
    mixers = by_type(settings, {_LINEAR: delta, _FULL: latent})
    return hybrid_config(settings, family="kimi_linear", mixers=mixers, first_dense=1)


def _layer_types(settings: Settings, linear: Settings) -> list[str]:
    """Returns the kind of each layer; releases list the layers of each kind, numbered from 1."""
    layers = num_layers(settings)
    if linear.get("full_attn_layers") is None:
        return [_FULL if i and i % 4 == 0 else _LINEAR for i in range(layers)]
    full = linear.integers("full_attn_layers")
    if sorted((*full, *linear.integers("kda_layers"))) != list(range(1, layers + 1)):
        raise linear.error(
            "full_attn_layers", f"expected, with kda_layers, the numbers from 1 to {layers}"
        )
    return [_FULL if i + 1 in full else _LINEAR for i in range(layers)]


def hybrid_config(
    settings: Settings, *, family: str, mixers: list[MixerSpec], first_dense: int
) -> ModelConfig:
    """Returns the config of Kimi-Linear and Ling-3.0, which share experts like DeepSeek-V3's.

    Args:
        mixers: the mixer of each layer.
        first_dense: how many leading layers are dense, if config.json does not say.
    """
    layers = num_layers(settings)
    kinds = settings.get("mlp_layer_types")
    if kinds is None:
        first = settings.integer("first_k_dense_replace", first_dense, at_least=0)
        kinds = ["dense" if i < first else "sparse" for i in range(layers)]
    elif not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - {"dense", "sparse"}:
        raise settings.error("mlp_layer_types", f"expected {layers} of 'dense' and 'sparse'")
    width = settings.integer("moe_intermediate_size")
    shared = width * settings.integer("n_shared_experts", 1, at_least=0)
    dense = settings.integer("intermediate_size") if "dense" in kinds else 0
    return decoder_config(
        settings,
        family=family,
        mixers=mixers,
        num_experts=settings.integer("num_local_experts"),
        expert_hidden=width,
        moe_layers=tuple(i for i, kind in enumerate(kinds) if kind == "sparse"),
        shared_hidden=tuple(shared if kind == "sparse" else dense for kind in kinds),
        gate_scale=settings.positive("routed_scaling_factor", 1.0),
        **sigmoid_router(settings),
    )


def _joined(parts: list[Array], _: object) -> Array:
    return np.concatenate(parts)


def _taps(parts: list[Array], _: object) -> Array:
    return np.asarray(np.concatenate(parts).T)


def delta_sources(place: str) -> dict[str, Source]:
    """Returns the sources of the Kimi Delta Attention tensors that Ling-3.0 stores alike; names begin with `place`."""
    q, k, v = (f"{place}{x}_proj.weight" for x in "qkv")
    conv, *more = (f"{place}{x}_conv1d.weight" for x in "qkv")
    return {
        "qkv": Source(q, more=(k, v), fold=_joined),
        "conv": Source(conv, more=tuple(more), fold=_taps),
        "beta": Source(f"{place}b_proj.weight"),
        "decay_rate": Source(f"{place}A_log", fold=lambda x, spec: np.exp(x).reshape(-1)),
        "decay_bias": Source(f"{place}dt_bias"),
        "head_norm": Source(f"{place}o_norm.weight"),
    }


_MOE = "block_sparse_moe."
_SHARED: Mapping[str, Source] = {
    f"shared.{x}": Source(f"{_MOE}shared_experts.{x}_proj.weight") for x in MATRICES
}

FAMILY = Family(
    config=_config,
    mixers={
        **LATENT,
        DeltaSpec.kind: {
            **delta_sources("self_attn."),
            "decay_in": Source("self_attn.f_a_proj.weight"),
            "decay": Source("self_attn.f_b_proj.weight"),
            "z_in": Source("self_attn.g_a_proj.weight"),
            "z_out": Source("self_attn.g_b_proj.weight"),
        },
    },
    experts=(
        choosing(
            {
                "router": Source(f"{_MOE}gate.weight"),
                "gate": Source(f"{_MOE}experts.{{expert}}.w1.weight"),
                "up": Source(f"{_MOE}experts.{{expert}}.w3.weight"),
                "down": Source(f"{_MOE}experts.{{expert}}.w2.weight"),
            },
            f"{_MOE}gate.e_score_correction_bias",
        ),
    ),
    shared=_SHARED,
)

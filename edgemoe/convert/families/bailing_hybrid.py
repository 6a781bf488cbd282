"""Ling-3.0: Kimi Delta Attention with bounded decays; every sixth layer is gated latent attention."""

from __future__ import annotations

import dataclasses

from edgemoe.config import ModelConfig
from edgemoe.convert.families.family import (
    FUSED_EXPERTS,
    NAMED_EXPERTS,
    Family,
    Source,
    choosing,
    further_layers,
)
from edgemoe.convert.families.kimi_linear import delta_sources, hybrid_config, with_usual_names
from edgemoe.convert.families.latent import LATENT, SHARED, expect, latent_spec
from edgemoe.convert.families.reading import by_type, num_layers
from edgemoe.convert.settings import Settings
from edgemoe.errors import quoted
from edgemoe.specs import DeltaSpec, MlaSpec

__all__ = ["FAMILY"]

_BOUND = -5.0
_BIAS = "mlp.gate.expert_bias"


def _config(settings: Settings) -> ModelConfig:
    settings = with_usual_names(settings)
    expect(settings, "score_function", "sigmoid")
    expect(settings, "gated_attention_proj_granularity_type", "head_wise")
    bounded, bound = (
        settings.flag("kda_safe_gate", True),
        settings.number("kda_lower_bound", _BOUND),
    )
    if bounded and bound != _BOUND:
        raise settings.error("kda_lower_bound", f"expected {_BOUND:g}, got {bound:g}")
    if not settings.flag("no_kda_lora", True):
        raise settings.error("no_kda_lora", "false is not supported")
    for key in ("expert_swiglu_limit_list", "share_expert_swiglu_limit_list"):
        limits = settings.get(key)
        if limits is not None and (not isinstance(limits, list) or any(limits)):
            raise settings.error(key, f"limits of SwiGLU are not supported, got {quoted(limits)}")
    heads, width = settings.integer("num_attention_heads"), settings.integer("head_dim", 128)
    if (
        settings.get("linear_head_dim") is not None
    ):  # transformers 5 then writes the rotated columns as head_dim
        width = settings.integer("linear_head_dim")
    delta = DeltaSpec(
        key_heads=heads, value_heads=heads, key_dim=width, value_dim=width,
        taps=settings.integer("short_conv_kernel_size", 4), norm_eps=settings.number("rms_norm_eps"),
        gate="sigmoid", channel_decay=True, bounded=bounded,
    )  # fmt: skip
    latent = dataclasses.replace(latent_spec(settings), gate="sigmoid_head")
    if settings.get("layer_types") is None:
        every = settings.integer("layer_group_size", 6)
        kinds = [
            "linear_attention" if (i + 1) % every else "full_attention"
            for i in range(num_layers(settings))
        ]
        settings = settings.replaced(layer_types=kinds)
    mixers = by_type(settings, {"linear_attention": delta, "full_attention": latent})
    return hybrid_config(settings, family="bailing_hybrid", mixers=mixers, first_dense=2)


def _moved(source: Source) -> Source:
    return dataclasses.replace(source, name=source.name.replace("self_attn.", "attention."))


_OUT = Source("attention.dense.weight", other="attention.o_proj.weight")

FAMILY = Family(
    config=_config,
    default_theta=6_000_000.0,
    rope=lambda settings, spec: with_usual_names(settings),
    model={"embed": Source("word_embeddings.weight", other="embed_tokens.weight")},
    mixers={
        MlaSpec.kind: {
            **{name: _moved(source) for name, source in LATENT[MlaSpec.kind].items()},
            "q_gate": Source("attention.g_proj.weight"),
            "o": _OUT,
        },
        DeltaSpec.kind: {
            **delta_sources("attention."),
            "decay": Source("attention.f_proj.weight"),
            "z": Source("attention.g_proj.weight"),
            "o": _OUT,
        },
    },
    experts=(choosing(NAMED_EXPERTS, _BIAS), choosing(FUSED_EXPERTS, _BIAS)),
    shared=SHARED,
    left_out=further_layers,
)

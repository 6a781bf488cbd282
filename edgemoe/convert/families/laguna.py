"""Laguna: full-attention layers have fewer heads and another RoPE than sliding-window ones; a softplus gate per head.

The router is that of DeepSeek-V3: sigmoid scores, a choice bias and a scaling factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe.config import MATRICES, ModelConfig
from edgemoe.convert.families.family import FUSED_EXPERTS, NAMED_EXPERTS, Family, Source, choosing
from edgemoe.convert.families.reading import (
    attention_spec,
    decoder_config,
    layer_types,
    num_layers,
    table_of,
)
from edgemoe.convert.rope import rotated_columns
from edgemoe.convert.settings import Settings
from edgemoe.errors import quoted
from edgemoe.specs import AttentionSpec, RopeSpec

__all__ = ["FAMILY"]

_FULL, _SLIDING = "full_attention", "sliding_attention"
_TABLES = {"rope_full": _FULL, "rope": _SLIDING}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    _FULL: {"rope_type": "default", "rope_theta": 500_000.0, "partial_rotary_factor": 0.5},
    _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
}


def _config(settings: Settings) -> ModelConfig:
    if settings.get("gating") not in (None, True, "per-head"):
        raise settings.error("gating", f"{quoted(settings.get('gating'))} is not supported")
    if settings.flag("moe_apply_router_weight_on_input", False):
        raise settings.error("moe_apply_router_weight_on_input", "true is not supported")
    if settings.number("moe_router_logit_softcapping", 0.0) > 0:
        raise settings.error("moe_router_logit_softcapping", "a cap of logits is not supported")
    layers = num_layers(settings)
    kinds = layer_types(settings, _FULL, _SLIDING) or (_FULL,) * layers
    heads = settings.integers("num_attention_heads_per_layer")
    if not heads:
        heads = (settings.integer("num_attention_heads"),) * layers
    if len(heads) != layers:
        raise settings.error("num_attention_heads_per_layer", f"expected {layers} numbers")
    types = settings.get("mlp_layer_types") or ["dense"] + ["sparse"] * (layers - 1)
    if not isinstance(types, list) or len(types) != layers or set(types) - {"dense", "sparse"}:
        raise settings.error("mlp_layer_types", f"expected {layers} of dense and sparse")
    dense = settings.integer("intermediate_size")
    shared = settings.integer("shared_expert_intermediate_size")
    return decoder_config(
        settings,
        family="laguna",
        mixers=[_attention(settings, *layer) for layer in zip(kinds, heads, strict=True)],
        expert_hidden=settings.integer("moe_intermediate_size"),
        moe_layers=tuple(i for i, kind in enumerate(types) if kind == "sparse"),
        scoring="sigmoid",
        choice_bias=True,
        renormalise=True,
        gate_scale=settings.positive("moe_routed_scaling_factor", 1.0),
        shared_hidden=tuple(shared if kind == "sparse" else dense for kind in types),
    )


def _attention(settings: Settings, kind: str, heads: int) -> AttentionSpec:
    """Returns the attention of one layer."""
    if settings.flag("attention_bias", False):
        raise settings.error("attention_bias", "true is not supported")
    head_dim, is_full = settings.integer("head_dim", 128), kind == _FULL
    own = table_of(settings, kind, _DEFAULTS[kind])
    return attention_spec(
        own, rope="rope_full" if is_full else "rope", rotated=rotated_columns(own, head_dim),
        head_dim=head_dim, num_heads=heads, qk_norm="head", gate="softplus_head",
        window=0 if is_full else settings.integer("sliding_window", 512),
    )  # fmt: skip


def _rope(settings: Settings, spec: RopeSpec) -> Settings:
    kind = _TABLES[spec.name]
    return table_of(settings, kind, _DEFAULTS[kind])


def _shared(name: str) -> dict[str, Source]:
    return {f"shared.{x}": Source(f"mlp.{name}.{x}_proj.weight") for x in MATRICES}


FAMILY = Family(
    config=_config,
    rope=_rope,
    layer={"q_gate": Source("self_attn.g_proj.weight")},
    experts=(  # as released, and as in memory in transformers 5
        choosing(
            {**NAMED_EXPERTS, **_shared("shared_expert")}, "mlp.experts.e_score_correction_bias"
        ),
        choosing(
            {**FUSED_EXPERTS, **_shared("shared_experts")}, "mlp.gate.e_score_correction_bias"
        ),
    ),
)

"""`laguna`: heads, windows and RoPE that differ by layer, and a gate for each head."""

from __future__ import annotations

from typing import Any

from edgemoe.convert.gguf.architecture import (
    ATTENTION,
    DENSE_FFN,
    NAMED_EXPERTS,
    QK_NORM,
    Architecture,
)
from edgemoe.convert.gguf.meta import Meta
from edgemoe.convert.gguf.rope import rope_scaling

__all__ = ["ARCHITECTURE"]

_EVERY = 4  # every fourth layer has no window, which is not in the metadata


def _config(meta: Meta) -> dict[str, Any]:
    count, head_dim = meta.layers, meta.whole("attention.key_length")
    heads = meta.per_layer("attention.head_count", count)
    window = meta.whole("attention.sliding_window", 0, at_least=0)
    slides = [window > 0 and i % _EVERY != 0 for i in range(count)]
    dense = meta.whole("leading_dense_block_count", 0, at_least=0)
    turned = meta.whole("rope.dimension_count", head_dim)
    full = {
        "rope_type": "default",
        **(rope_scaling(meta) or {}),
        "rope_theta": meta.positive("rope.freq_base"),
        "partial_rotary_factor": turned / head_dim,
    }
    sliding = {
        "rope_type": "default",
        "rope_theta": meta.positive("rope.freq_base_swa", full["rope_theta"]),
        "partial_rotary_factor": meta.whole("rope.dimension_count_swa", turned) / head_dim,
    }
    is_wide = meta.rows("attn_gate.weight") == heads[0] * head_dim
    return {
        "num_attention_heads": heads[0],
        "num_attention_heads_per_layer": heads,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in slides],
        "mlp_layer_types": ["dense" if i < dense else "sparse" for i in range(count)],
        "sliding_window": window or None,
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        "gating": "per-element" if is_wide else "per-head",
        "shared_expert_intermediate_size": meta.rows("ffn_gate_shexp.weight"),
        "moe_routed_scaling_factor": meta.positive("expert_weights_scale", 1.0),
        "moe_router_logit_softcapping": 0.0,
        "moe_apply_router_weight_on_input": False,
    }


ARCHITECTURE = Architecture(
    model_type="laguna",
    config=_config,
    layer={
        **ATTENTION,
        **QK_NORM,
        **DENSE_FFN,
        **NAMED_EXPERTS,
        "attn_gate": "self_attn.g_proj",
        "exp_probs_b.bias": "mlp.experts.e_score_correction_bias",
        **{f"ffn_{x}_shexp": f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")},
    },
)

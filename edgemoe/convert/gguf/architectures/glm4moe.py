"""`glm4moe`: GLM-4.5 to 4.7 (-Air)."""

from __future__ import annotations

from typing import Any

from edgemoe.convert.gguf.architecture import (
    ATTENTION_POST,
    DENSE_FFN,
    NAMED_EXPERTS,
    QK_NORM,
    Architecture,
    dense_layers,
)
from edgemoe.convert.gguf.meta import Meta

__all__ = ["ARCHITECTURE", "SHARED_EXPERTS", "sigmoid_router"]

SHARED_EXPERTS = {f"ffn_{x}_shexp": f"mlp.shared_experts.{x}_proj" for x in ("gate", "up", "down")}
"""The names of ungated shared experts."""


def sigmoid_router(meta: Meta) -> dict[str, Any]:
    """Returns the config.json keys of a sigmoid router with groups."""
    if meta.whole("expert_gating_func", 2) != 2:
        raise meta.error(
            "expert_gating_func", f"must be 2 (sigmoid), got {meta.get('expert_gating_func')}"
        )
    return {
        "norm_topk_prob": meta.flag("expert_weights_norm", False),
        "routed_scaling_factor": meta.positive("expert_weights_scale", 1.0),
        "n_group": meta.whole("expert_group_count", 1),
        "topk_group": meta.whole("expert_group_used_count", 1),
    }


def _config(meta: Meta) -> dict[str, Any]:
    head_dim = meta.whole("attention.key_length")
    shared = meta.rows("ffn_gate_shexp.weight")
    return {
        **sigmoid_router(meta),
        "n_routed_experts": meta.whole("expert_count"),
        "n_shared_experts": shared // max(meta.rows("ffn_gate_exps.weight"), 1),
        "first_k_dense_replace": len(dense_layers(meta)),
        "partial_rotary_factor": meta.whole("rope.dimension_count", head_dim) / head_dim,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in meta.shapes,
    }


ARCHITECTURE = Architecture(
    model_type="glm4_moe",
    config=_config,
    layer={
        **ATTENTION_POST,
        **QK_NORM,
        **DENSE_FFN,
        **NAMED_EXPERTS,
        **SHARED_EXPERTS,
        "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    },
)

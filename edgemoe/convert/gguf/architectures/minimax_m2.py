"""`minimax-m2`."""

from __future__ import annotations

from typing import Any

from edgemoe.convert.gguf.architecture import ATTENTION, QK_NORM, Architecture
from edgemoe.convert.gguf.meta import Meta

__all__ = ["ARCHITECTURE"]


def _config(meta: Meta) -> dict[str, Any]:
    if meta.whole("expert_gating_func", 2) != 2:
        raise meta.error(
            "expert_gating_func", f"must be 2 (sigmoid), got {meta.get('expert_gating_func')}"
        )
    head_dim = meta.whole("attention.key_length")
    rotated = meta.whole("rope.dimension_count", head_dim)
    return {
        "intermediate_size": meta.rows("ffn_gate_exps.weight"),
        "rotary_dim": rotated,
        "partial_rotary_factor": rotated / head_dim,
    }


ARCHITECTURE = Architecture(
    model_type="minimax_m2",
    config=_config,
    layer={
        **ATTENTION,
        **QK_NORM,
        "ffn_gate_inp": "block_sparse_moe.gate",
        "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
        "ffn_gate_exps.weight": "block_sparse_moe.experts.{expert}.w1.weight",
        "ffn_up_exps.weight": "block_sparse_moe.experts.{expert}.w3.weight",
        "ffn_down_exps.weight": "block_sparse_moe.experts.{expert}.w2.weight",
    },
)

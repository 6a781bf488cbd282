"""`ernie4_5-moe`: RoPE pairs in adjacent rows of q and k, as in the checkpoints."""

from __future__ import annotations

from typing import Any

from edgemoe.convert.gguf.architecture import (
    ATTENTION,
    DENSE_FFN,
    NAMED_EXPERTS,
    Architecture,
)
from edgemoe.convert.gguf.architectures.glm4moe import SHARED_EXPERTS
from edgemoe.convert.gguf.meta import Meta

__all__ = ["ARCHITECTURE"]


def _config(meta: Meta) -> dict[str, Any]:
    width, sparse = meta.rows("ffn_gate_exps.weight"), meta.layers_with("ffn_gate_inp.weight")
    return {
        "moe_num_experts": meta.whole("expert_count"),
        "moe_k": meta.whole("expert_used_count"),
        "moe_num_shared_experts": meta.rows("ffn_gate_shexp.weight") // max(width, 1),
        "moe_layer_interval": meta.whole("interleave_moe_layer_step", 1),
        "moe_layer_start_index": sparse[0] if sparse else meta.layers,
        "moe_layer_end_index": sparse[-1] if sparse else meta.layers,
    }


ARCHITECTURE = Architecture(
    model_type="ernie4_5_moe",
    config=_config,
    layer={
        **ATTENTION,
        **DENSE_FFN,
        **NAMED_EXPERTS,
        **SHARED_EXPERTS,
        "exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias",
    },
)

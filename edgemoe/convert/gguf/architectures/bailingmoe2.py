"""`bailingmoe2`: Ling-2.0 and Ring-2.0."""

from __future__ import annotations

from typing import Any

from edgemoe.convert.gguf.architecture import DENSE_FFN, NAMED_EXPERTS, Architecture, dense_layers
from edgemoe.convert.gguf.architectures.glm4moe import SHARED_EXPERTS, sigmoid_router
from edgemoe.convert.gguf.meta import Meta

__all__ = ["ARCHITECTURE"]


def _config(meta: Meta) -> dict[str, Any]:
    head_dim = meta.whole("attention.key_length")
    shared = meta.rows("ffn_gate_shexp.weight")
    return {
        **sigmoid_router(meta),
        "num_shared_experts": shared // max(meta.rows("ffn_gate_exps.weight"), 1),
        "first_k_dense_replace": len(dense_layers(meta)),
        "rotary_dim": meta.whole("rope.dimension_count", head_dim),
        "use_qkv_bias": "blk.0.attn_qkv.bias" in meta.shapes,
        "use_bias": "blk.0.attn_output.bias" in meta.shapes,
    }


ARCHITECTURE = Architecture(
    model_type="bailing_moe",
    config=_config,
    layer={
        "attn_norm": "input_layernorm",
        "attn_qkv": "attention.query_key_value",
        "attn_q_norm": "attention.query_layernorm",
        "attn_k_norm": "attention.key_layernorm",
        "attn_output": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        **DENSE_FFN,
        **NAMED_EXPERTS,
        **SHARED_EXPERTS,
        "exp_probs_b.bias": "mlp.gate.expert_bias",
    },
)

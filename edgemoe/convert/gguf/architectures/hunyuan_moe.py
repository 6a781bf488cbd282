"""`hunyuan-moe`: the RoPE base is stored with its NTK scaling applied."""

from __future__ import annotations

from typing import Any

from edgemoe.convert.gguf.architecture import ATTENTION, NAMED_EXPERTS, Architecture
from edgemoe.convert.gguf.meta import Meta

__all__ = ["ARCHITECTURE"]


def _config(meta: Meta) -> dict[str, Any]:
    return {
        "moe_topk": meta.whole("expert_used_count"),
        "intermediate_size": meta.rows("ffn_gate_shexp.weight"),
        "num_shared_expert": 1,
        "use_qk_norm": True,
    }


ARCHITECTURE = Architecture(
    model_type="hunyuan_v1_moe",
    config=_config,
    layer={
        **ATTENTION,
        **NAMED_EXPERTS,
        "attn_q_norm": "self_attn.query_layernorm",
        "attn_k_norm": "self_attn.key_layernorm",
        "ffn_gate_inp": "mlp.gate.wg",
        **{f"ffn_{x}_shexp": f"mlp.shared_mlp.{x}_proj" for x in ("gate", "up", "down")},
    },
)

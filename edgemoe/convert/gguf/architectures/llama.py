"""`llama`: dense Llama, or Mixtral if there are experts."""

from __future__ import annotations

from typing import Any

from edgemoe.convert.gguf.architecture import ATTENTION, DENSE_FFN, HALVES, Architecture
from edgemoe.convert.gguf.meta import Meta

__all__ = ["ARCHITECTURE"]


def _config(meta: Meta) -> dict[str, Any]:
    head_dim = meta.whole("attention.key_length", 0, at_least=0) or (
        meta.whole("embedding_length") // meta.whole("attention.head_count")
    )
    if meta.whole("rope.dimension_count", head_dim) != head_dim:
        raise meta.error(
            "rope.dimension_count",
            f"must be the head's {head_dim}, got {meta.get('rope.dimension_count')}",
        )
    if not meta.get("expert_count"):
        return {
            "architectures": ["LlamaForCausalLM"],
            "intermediate_size": meta.whole("feed_forward_length"),
            "mlp_bias": "blk.0.ffn_gate.bias" in meta.shapes,
        }
    return {"model_type": "mixtral", "intermediate_size": meta.rows("ffn_gate_exps.weight")}


ARCHITECTURE = Architecture(
    model_type="llama",
    others=("mixtral",),
    config=_config,
    layer={
        **ATTENTION,
        **DENSE_FFN,
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps.weight": "block_sparse_moe.experts.{expert}.w1.weight",
        "ffn_up_exps.weight": "block_sparse_moe.experts.{expert}.w3.weight",
        "ffn_down_exps.weight": "block_sparse_moe.experts.{expert}.w2.weight",
    },
    halves=HALVES,
)

"""`qwen2moe`: a gated shared expert; llama.cpp never renormalises the gates of the routed ones."""

from __future__ import annotations

from typing import Any

from edgemoe.convert.gguf.architecture import (
    ATTENTION,
    NAMED_EXPERTS,
    Architecture,
)
from edgemoe.convert.gguf.meta import Meta

__all__ = ["ARCHITECTURE", "SHARED_EXPERT"]

SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{x}_shexp": f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")},
}
"""The names of a gated shared expert."""


def _config(meta: Meta) -> dict[str, Any]:
    return {
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": meta.rows("ffn_gate_shexp.weight"),
        "qkv_bias": "blk.0.attn_q.bias" in meta.shapes,
        "use_sliding_window": False,
    }


ARCHITECTURE = Architecture(
    model_type="qwen2_moe",
    config=_config,
    layer={**ATTENTION, **NAMED_EXPERTS, **SHARED_EXPERT},
)

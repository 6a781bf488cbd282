"""`granitemoe`, with and without a shared expert: rows of q and k permuted, gate and up stored separately."""

from __future__ import annotations

from typing import Any

from edgemoe.convert.gguf.architecture import ATTENTION, HALVES, Architecture, joined
from edgemoe.convert.gguf.meta import Meta

__all__ = ["ARCHITECTURE", "EXPERTS", "SHARED", "multipliers"]

EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_down_exps.weight": "block_sparse_moe.output_linear.weight.{expert}",
    "ffn_down_shexp": "shared_mlp.output_linear",
}
SHARED = {
    "block_sparse_moe.input_linear.weight.{expert}": joined(
        "ffn_gate_exps.weight", "ffn_up_exps.weight"
    ),
    "shared_mlp.input_linear.weight": joined("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
}


def multipliers(meta: Meta) -> dict[str, Any]:
    """Returns Granite's four multipliers, with neutral values where the file has none."""
    head_dim = meta.whole("embedding_length") // meta.whole("attention.head_count")
    return {
        "attention_multiplier": meta.positive("attention.scale", head_dim**-0.5),
        "embedding_multiplier": meta.positive("embedding_scale", 1.0),
        "residual_multiplier": meta.positive("residual_scale", 1.0),
        "logits_scaling": meta.positive("logit_scale", 1.0),
    }


def _config(meta: Meta) -> dict[str, Any]:
    shared = meta.rows("ffn_gate_shexp.weight")
    return {
        "model_type": "granitemoeshared" if shared else "granitemoe",
        "shared_intermediate_size": shared,
        "intermediate_size": meta.rows("ffn_gate_exps.weight"),
        **multipliers(meta),
    }


ARCHITECTURE = Architecture(
    model_type="granitemoe",
    others=("granitemoeshared",),
    config=_config,
    layer={**ATTENTION, **EXPERTS},
    made=SHARED,
    halves=HALVES,
)

"""`lfm2moe`: short convolutions in most layers, attention in the others."""

from __future__ import annotations

from typing import Any

from edgemoe.convert.gguf.architecture import Architecture
from edgemoe.convert.gguf.meta import Meta

__all__ = ["ARCHITECTURE"]

_MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}


def _config(meta: Meta) -> dict[str, Any]:
    if meta.whole("expert_gating_func", 2) != 2:
        raise meta.error(
            "expert_gating_func", f"must be 2 (sigmoid), got {meta.get('expert_gating_func')}"
        )
    attention = set(meta.layers_with("attn_q.weight"))
    return {
        "layer_types": ["full_attention" if i in attention else "conv" for i in range(meta.layers)],
        "num_dense_layers": meta.whole("leading_dense_block_count", 0, at_least=0),
        "conv_L_cache": meta.whole("shortconv.l_cache"),
        "conv_bias": False,
        "norm_eps": meta.positive("attention.layer_norm_rms_epsilon"),
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "routed_scaling_factor": meta.positive("expert_weights_scale", 1.0),
    }


ARCHITECTURE = Architecture(
    model_type="lfm2_moe",
    config=_config,
    whole={"token_embd_norm.weight": "model.embedding_norm.weight"},
    layer={
        "attn_norm": "operator_norm",
        "ffn_norm": "ffn_norm",
        **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
        **{f"attn_{x}_norm": f"self_attn.{x}_layernorm" for x in "qk"},
        "attn_output": "self_attn.out_proj",
        **{f"shortconv.{x}": f"conv.{x}" for x in ("in_proj", "conv", "out_proj")},
        **{f"ffn_{ours}": f"feed_forward.{theirs}" for ours, theirs in _MATRICES.items()},
        "ffn_gate_inp": "feed_forward.gate",
        "exp_probs_b.bias": "feed_forward.expert_bias",
        **{
            f"ffn_{ours}_exps.weight": f"feed_forward.experts.{{expert}}.{theirs}.weight"
            for ours, theirs in _MATRICES.items()
        },
    },
)

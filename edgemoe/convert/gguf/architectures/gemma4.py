"""`gemma4` with experts: norms around them, heads that differ by layer, values equal to keys in some layers."""

from __future__ import annotations

from typing import Any

from edgemoe.convert.gguf.architecture import DENSE_FFN, QK_NORM, Architecture, joined
from edgemoe.convert.gguf.meta import Meta

__all__ = ["ARCHITECTURE"]

_STILL = 1e10  # a frequency divided by this or more does not rotate


def _config(meta: Meta) -> dict[str, Any]:
    count = meta.layers
    slides = meta.per_layer("attention.sliding_window_pattern", count, bool)
    heads = meta.per_layer("attention.head_count_kv", count)
    wide, narrow = (meta.whole(f"attention.key_length{x}") for x in ("", "_swa"))
    of = {
        kind: next((h for h, s in zip(heads, slides, strict=True) if s is kind), None)
        for kind in (True, False)
    }
    if meta.get("attention.shared_kv_layers"):
        raise meta.error(
            "attention.shared_kv_layers", "keys and values that layers share are not supported"
        )
    if meta.get("embedding_length_per_layer_input"):
        raise meta.error(
            "embedding_length_per_layer_input", "embeddings by layer are not supported"
        )
    full = {
        "rope_type": "proportional",
        "rope_theta": meta.positive("rope.freq_base"),
        "partial_rotary_factor": _turned(meta),
    }
    sliding = {"rope_type": "default", "rope_theta": meta.positive("rope.freq_base_swa", 10000.0)}
    return {
        "head_dim": narrow,
        "global_head_dim": wide,
        "num_key_value_heads": of[True] or of[False],
        "num_global_key_value_heads": of[False],
        "attention_k_eq_v": not all(f"blk.{i}.attn_v.weight" in meta.shapes for i in range(count)),
        "layer_types": ["sliding_attention" if s else "full_attention" for s in slides],
        "sliding_window": meta.whole("attention.sliding_window"),
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        "final_logit_softcapping": meta.optional("final_logit_softcapping"),
        "enable_moe_block": True,
        "top_k_experts": meta.whole("expert_used_count"),
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    }


def _turned(meta: Meta) -> float:
    """Returns the share of a head that RoPE rotates in layers without a window; the rest is divided by 1e30."""
    factors = meta.rope_factors or [1.0]
    return sum(factor < _STILL for factor in factors) / len(factors)


ARCHITECTURE = Architecture(
    model_type="gemma4_text",
    config=_config,
    layer={
        "attn_norm": "input_layernorm",
        **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
        **QK_NORM,
        "attn_output": "self_attn.o_proj",
        "post_attention_norm": "post_attention_layernorm",
        **DENSE_FFN,
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "post_ffw_norm_1": "post_feedforward_layernorm_1",
        "post_ffw_norm_2": "post_feedforward_layernorm_2",
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
        "layer_output_scale.weight": "layer_scalar",
        "ffn_gate_inp": "router.proj",
        "ffn_gate_inp.scale": "router.scale",
        "ffn_gate_up_exps.weight": "experts.gate_up_proj.{expert}",
        "ffn_down_exps.weight": "experts.down_proj.{expert}",
        "ffn_down_exps.scale": "router.per_expert_scale",
    },
    made={"experts.gate_up_proj.{expert}": joined("ffn_gate_exps.weight", "ffn_up_exps.weight")},
)

"""`kimi-linear`, and `bailingmoe3` (Ling-3.0): delta rules with a decay per channel, and latent attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgemoe.convert.gguf.architecture import (
    DENSE_FFN,
    NAMED_EXPERTS,
    Architecture,
    Made,
    flat,
    log_rate,
)
from edgemoe.convert.gguf.architectures.deepseek2 import KV_B
from edgemoe.convert.gguf.architectures.glm4moe import SHARED_EXPERTS
from edgemoe.convert.gguf.meta import Meta

__all__ = ["BAILINGMOE3", "KIMI_LINEAR"]

_SIGMOID = 2


def _config(meta: Meta) -> dict[str, Any]:
    function = meta.whole("expert_gating_func", _SIGMOID)
    if function != _SIGMOID:
        raise meta.error("expert_gating_func", f"must be 2 (sigmoid), got {function}")
    linear, turned = set(meta.layers_with("ssm_a")), meta.whole("rope.dimension_count")
    heads = meta.most("attention.head_count")
    return {
        "layer_types": [
            "linear_attention" if i in linear else "full_attention" for i in range(meta.layers)
        ],
        "linear_num_heads": meta.rows("ssm_beta.weight"),
        "linear_head_dim": meta.whole("kda.head_dim"),
        "num_key_value_heads": heads,
        "q_lora_rank": meta.get("attention.q_lora_rank"),
        "kv_lora_rank": meta.whole("attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": meta.whole("attention.key_length_mla") - turned,
        "v_head_dim": meta.whole("attention.value_length_mla"),
        "num_local_experts": meta.whole("expert_count"),
        "n_shared_experts": meta.whole("expert_shared_count", 1, at_least=0),
        "first_k_dense_replace": meta.whole("leading_dense_block_count", 0, at_least=0),
        "n_group": meta.whole("expert_group_count", 1),
        "topk_group": meta.whole("expert_group_used_count", 1),
        "norm_topk_prob": meta.flag("expert_weights_norm", True),
        "routed_scaling_factor": meta.positive("expert_weights_scale", 1.0),
    }


def _kimi(meta: Meta) -> dict[str, Any]:
    return {**_config(meta), "linear_conv_kernel_dim": meta.whole("ssm.conv_kernel")}


def _ling(meta: Meta) -> dict[str, Any]:
    return {
        **_config(meta),
        "short_conv_kernel_size": meta.whole("ssm.conv_kernel"),
        "kda_safe_gate": meta.flag("kda.safe_gate", True),
        "kda_lower_bound": meta.get("kda.gate_lower_bound"),
        "expert_swiglu_limit_list": meta.get("swiglu_clamp_exp"),
        "share_expert_swiglu_limit_list": meta.get("swiglu_clamp_shexp"),
    }


def _taps(name: str) -> Made:
    """Returns the convolution taps of each channel [C, taps], which are stored with axes of size 1 in between."""
    return Made(
        (name,),
        lambda config, values: values[0].reshape(-1, values[0].shape[-1]),
        lambda config, shapes: (int(np.prod(shapes[0][:-1])), shapes[0][-1]),
    )


def _layer(place: str) -> Mapping[str, str]:
    return {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{f"attn_{x}": f"{place}{x}_proj" for x in "qkv"},
        "attn_q_a": f"{place}q_a_proj",
        "attn_q_a_norm": f"{place}q_a_layernorm",
        "attn_q_b": f"{place}q_b_proj",
        "attn_kv_a_mqa": f"{place}kv_a_proj_with_mqa",
        "attn_kv_a_norm": f"{place}kv_a_layernorm",
        "attn_kv_b": f"{place}kv_b_proj",
        "ssm_beta": f"{place}b_proj",
        "ssm_dt.bias": f"{place}dt_bias",
        "ssm_norm": f"{place}o_norm",
        **DENSE_FFN,
    }


def _made(place: str, sign: float) -> Mapping[str, Made]:
    return {
        f"{place}kv_b_proj.weight": KV_B,
        f"{place}A_log": flat("ssm_a", lambda x: log_rate(x, sign)),
        **{f"{place}{x}_conv1d.weight": _taps(f"ssm_conv1d_{x}.weight") for x in "qkv"},
    }


_MOE = "block_sparse_moe."

KIMI_LINEAR = Architecture(
    model_type="kimi_linear",
    config=_kimi,
    layer={
        **_layer("self_attn."),
        "attn_output": "self_attn.o_proj",
        **{
            f"ssm_{name}_{x}": f"self_attn.{name}_{x}_proj"
            for name in ("f", "g")
            for x in ("a", "b")
        },
        "ffn_gate_inp": f"{_MOE}gate",
        "exp_probs_b.bias": f"{_MOE}gate.e_score_correction_bias",
        "ffn_gate_exps.weight": f"{_MOE}experts.{{expert}}.w1.weight",
        "ffn_up_exps.weight": f"{_MOE}experts.{{expert}}.w3.weight",
        "ffn_down_exps.weight": f"{_MOE}experts.{{expert}}.w2.weight",
        **{f"ffn_{x}_shexp": f"{_MOE}shared_experts.{x}_proj" for x in ("gate", "up", "down")},
    },
    made=_made("self_attn.", -1.0),
)

BAILINGMOE3 = Architecture(
    model_type="bailing_hybrid",
    config=_ling,
    layer={
        **_layer("attention."),
        "attn_output": "attention.dense",
        "attn_gate": "attention.g_proj",
        "ssm_f_a": "attention.f_proj",
        "ssm_g_a": "attention.g_proj",
        **NAMED_EXPERTS,
        **SHARED_EXPERTS,
        "exp_probs_b.bias": "mlp.gate.expert_bias",
    },
    made=_made("attention.", 1.0),
)

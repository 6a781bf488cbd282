"""`deepseek2`: DeepSeek-V2 and V3, Kimi-K2 and GLM-4.7-Flash, told apart by the router; `mistral4`: Mistral-Small-4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgemoe.convert.gguf.architecture import (
    ATTENTION,
    DENSE_FFN,
    NAMED_EXPERTS,
    Architecture,
    Array,
    Made,
    joined,
)
from edgemoe.convert.gguf.architectures.glm4moe import SHARED_EXPERTS
from edgemoe.convert.gguf.meta import Meta
from edgemoe.convert.gguf.rope import rope_scaling

__all__ = ["ARCHITECTURE", "KV_B", "MISTRAL4"]

_SOFTMAX, _SIGMOID = 1, 2
_GLM_VOCABULARY = (
    154880  # GLM's first files omit the router's function or give a wrong one: it is a sigmoid
)


def _config(meta: Meta) -> dict[str, Any]:
    is_glm = meta.shapes["token_embd.weight"][0] == _GLM_VOCABULARY
    function = _SIGMOID if is_glm else meta.whole("expert_gating_func", _SOFTMAX)
    if function not in (_SOFTMAX, _SIGMOID):
        raise meta.error(
            "expert_gating_func", f"must be 1 (softmax) or 2 (sigmoid), got {function}"
        )
    is_sigmoid = function == _SIGMOID
    groups, turned = meta.whole("expert_group_count", 1), meta.whole("rope.dimension_count")
    unlimited = "noaux_tc" if is_sigmoid else "greedy"
    # Older files do not split kv_b, and give the sizes of keys and values as those of the head.
    key, value = (
        meta.whole(f"attention.{x}_length_mla", meta.whole(f"attention.{x}_length"))
        for x in ("key", "value")
    )
    return {
        "model_type": ("glm4_moe_lite" if is_glm else "deepseek_v3")
        if is_sigmoid
        else "deepseek_v2",
        "num_key_value_heads": meta.whole("attention.head_count"),
        "head_dim": turned,
        "q_lora_rank": meta.get("attention.q_lora_rank"),
        "kv_lora_rank": meta.whole("attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": key - turned,
        "v_head_dim": value,
        "n_routed_experts": meta.whole("expert_count"),
        "n_shared_experts": meta.whole("expert_shared_count", 0, at_least=0),
        "first_k_dense_replace": meta.whole("leading_dense_block_count", 0, at_least=0),
        "scoring_func": "sigmoid" if is_sigmoid else "softmax",
        "topk_method": "group_limited_greedy" if groups > 1 and not is_sigmoid else unlimited,
        "n_group": groups,
        "topk_group": meta.whole("expert_group_used_count", 1),
        "norm_topk_prob": meta.flag("expert_weights_norm", False),
        "routed_scaling_factor": meta.positive("expert_weights_scale", 1.0),
        "rope_scaling": _scaling(meta),
    }


def _mistral(meta: Meta) -> dict[str, Any]:
    config, growth = _config(meta), "attention.temperature_scale"
    if meta.get(growth) and config["rope_scaling"]:
        config["rope_scaling"]["llama_4_scaling_beta"] = meta.positive(growth)
    width = meta.rows("ffn_gate_exps.weight") or meta.rows("ffn_gate_up_exps.weight") // 2
    return {**config, "model_type": "mistral4", "moe_intermediate_size": width}


def _scaling(meta: Meta) -> dict[str, Any] | None:
    """Adds the gain of scores: files store a tenth of `mscale_all_dim`, and in all models `mscale` equals that."""
    scaling, gain = rope_scaling(meta), "rope.scaling.yarn_log_multiplier"
    if scaling is None or not meta.get(gain):
        return scaling
    factor = round(10 * meta.positive(gain), 6)
    return {**scaling, "mscale": factor, "mscale_all_dim": factor}


def _kv_b(config: Mapping[str, Any], values: Sequence[Array]) -> Array:
    """Joins for each head the rows of keys [nope, latent], which are stored transposed, and of values [v, latent]."""
    keys, heads = values
    rows = np.concatenate([keys.transpose(0, 2, 1), heads], axis=1)
    return rows.reshape(-1, rows.shape[2])


_LAYER = {
    **ATTENTION,
    **DENSE_FFN,
    **NAMED_EXPERTS,
    **SHARED_EXPERTS,
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}
KV_B = Made(
    ("attn_k_b.weight", "attn_v_b.weight"),
    _kv_b,
    lambda config, shapes: (
        shapes[0][0] * (shapes[0][2] + shapes[1][1]),
        shapes[0][1],
    ),
)
"""The joint matrix of all heads' keys and values, which files store as two."""
_MADE = {"self_attn.kv_b_proj.weight": KV_B}

ARCHITECTURE = Architecture(
    model_type="deepseek_v2",
    others=("deepseek_v3", "glm4_moe_lite"),
    config=_config,
    layer=_LAYER,
    made=_MADE,
)
MISTRAL4 = Architecture(  # gate and up of experts are one stack; some files have them split
    model_type="mistral4",
    config=_mistral,
    layer={
        **_LAYER,
        "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj.{expert}",
        "ffn_down_exps.weight": "mlp.experts.down_proj.{expert}",
    },
    made={
        **_MADE,
        "mlp.experts.gate_up_proj.{expert}": joined("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    },
)

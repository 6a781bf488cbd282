"""`qwen3next`, and `qwen35moe`, whose value heads are tiled, while checkpoints have them grouped by key head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgemoe.convert.gguf.architecture import (
    ATTENTION_POST,
    NAMED_EXPERTS,
    QK_NORM,
    Architecture,
    Array,
    Made,
    log_rate,
    one,
)
from edgemoe.convert.gguf.architectures.qwen2moe import SHARED_EXPERT
from edgemoe.convert.gguf.meta import Meta

__all__ = ["QWEN3NEXT", "QWEN35", "grouped"]

Config = Mapping[str, Any]


def _config(meta: Meta) -> dict[str, Any]:
    linear = set(meta.layers_with("ssm_conv1d.weight"))
    heads, head_dim = meta.whole("ssm.time_step_rank"), meta.whole("attention.key_length")
    return {
        "layer_types": [
            "linear_attention" if i in linear else "full_attention" for i in range(meta.layers)
        ],
        "linear_num_key_heads": meta.whole("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": meta.whole("ssm.state_size"),
        "linear_value_head_dim": meta.whole("ssm.inner_size") // heads,
        "linear_conv_kernel_dim": meta.whole("ssm.conv_kernel"),
        "partial_rotary_factor": meta.whole("rope.dimension_count") / head_dim,
        "shared_expert_intermediate_size": meta.rows("ffn_gate_shexp.weight"),
        "norm_topk_prob": True,
    }


def _less_one(name: str) -> Made:
    """Returns a norm's weight as its offset from 1, as checkpoints have it; the file holds the sum."""
    return one(name, lambda config, x: x - np.float32(1))


def _joined_heads(config: Config, values: Sequence[Array]) -> Array:
    """Joins [q, k, v] and z so that the rows of q, k, v and z of each key head follow one another."""
    qkv, z = values
    heads, dim = config["linear_num_key_heads"], config["linear_key_head_dim"]
    q, k, v = np.split(qkv, [heads * dim, 2 * heads * dim])
    parts = [x.reshape(heads, -1, x.shape[1]) for x in (q, k, v, z)]
    return np.concatenate(parts, axis=1).reshape(-1, qkv.shape[1])


_NORMS: Mapping[str, Made] = {
    "input_layernorm.weight": _less_one("attn_norm.weight"),
    "post_attention_layernorm.weight": _less_one("post_attention_norm.weight"),
    "self_attn.q_norm.weight": _less_one("attn_q_norm.weight"),
    "self_attn.k_norm.weight": _less_one("attn_k_norm.weight"),
}
_FINAL: Mapping[str, Made] = {"model.norm.weight": _less_one("output_norm.weight")}
_LAYER: Mapping[str, str] = {
    **ATTENTION_POST,
    **QK_NORM,
    **NAMED_EXPERTS,
    **SHARED_EXPERT,
    "ssm_norm": "linear_attn.norm",
}

QWEN3NEXT = Architecture(
    model_type="qwen3_next",
    config=_config,
    layer={
        **_LAYER,
        "ssm_ba": "linear_attn.in_proj_ba",
        "ssm_dt.bias": "linear_attn.dt_bias",
        "ssm_conv1d": "linear_attn.conv1d",
        "ssm_out": "linear_attn.out_proj",
    },
    made={
        **_NORMS,
        "linear_attn.in_proj_qkvz.weight": Made(
            ("attn_qkv.weight", "attn_gate.weight"),
            _joined_heads,
            lambda config, shapes: (shapes[0][0] + shapes[1][0], shapes[0][1]),
        ),
        "linear_attn.A_log": one("ssm_a", lambda config, x: log_rate(x)),
    },
    made_whole=_FINAL,
)


def grouped(x: Array, keys: int, dim: int) -> Array:
    """Reorders value heads of `dim` rows from tiled (one per key head, in turns) to grouped by key head."""
    heads = x.reshape(-1, keys, dim, *x.shape[1:])
    return np.asarray(heads.swapaxes(0, 1).reshape(x.shape))


def _grouped(config: Config, x: Array, dim: int) -> Array:
    return grouped(x, config["linear_num_key_heads"], dim)


def _grouped_last(config: Config, x: Array) -> Array:
    """Groups the value heads, which come after all of q and k."""
    first = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = _grouped(config, x[first:], config["linear_value_head_dim"])
    return np.concatenate([x[:first], values])


def _rows(name: str, change: Callable[[Array], Array] = lambda x: x) -> Made:
    return one(name, lambda config, x: _grouped(config, change(x), 1))


QWEN35 = Architecture(
    model_type="qwen3_5_moe_text",
    config=_config,
    layer=_LAYER,
    made={
        **_NORMS,
        "linear_attn.in_proj_qkv.weight": one("attn_qkv.weight", _grouped_last),
        "linear_attn.in_proj_z.weight": one(
            "attn_gate.weight",
            lambda config, x: _grouped(config, x, config["linear_value_head_dim"]),
        ),
        "linear_attn.in_proj_b.weight": _rows("ssm_beta.weight"),
        "linear_attn.in_proj_a.weight": _rows("ssm_alpha.weight"),
        "linear_attn.A_log": _rows("ssm_a", log_rate),
        "linear_attn.dt_bias": _rows("ssm_dt.bias"),
        "linear_attn.conv1d.weight": one("ssm_conv1d.weight", _grouped_last),
        "linear_attn.out_proj.weight": one(
            "ssm_out.weight",
            lambda config, x: _grouped(config, x.T, config["linear_value_head_dim"]).T,
        ),
    },
    made_whole=_FINAL,
)

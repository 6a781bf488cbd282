"""The supported families, by the `model_type` of config.json."""

from __future__ import annotations

from collections.abc import Mapping

from edgemoe.convert.families import (
    bailing_hybrid,
    deepseek_v2,
    deepseek_v3,
    ernie4_5_moe,
    gemma4,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granitemoe,
    granitemoehybrid,
    hunyuan_v1_moe,
    kimi_linear,
    laguna,
    lfm2_moe,
    llama4,
    minimax_m2,
    mistral4,
    mixtral,
    nemotron_h,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    qwen3_vl_moe,
)
from edgemoe.convert.families.family import Family

__all__ = ["FAMILIES"]

FAMILIES: Mapping[str, Family] = {
    "bailing_hybrid": bailing_hybrid.FAMILY,
    "deepseek_v2": deepseek_v2.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
    "ernie4_5_moe": ernie4_5_moe.FAMILY,
    "gemma4": gemma4.FAMILY,
    "gemma4_text": gemma4.FAMILY,
    "glm4_moe": glm4_moe.FAMILY,
    "glm4_moe_lite": glm4_moe_lite.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "granitemoe": granitemoe.FAMILY,
    "granitemoehybrid": granitemoehybrid.FAMILY,
    "granitemoeshared": granitemoe.FAMILY,
    "hunyuan_v1_moe": hunyuan_v1_moe.FAMILY,
    "kimi_k2": deepseek_v3.FAMILY,
    "kimi_linear": kimi_linear.FAMILY,
    "laguna": laguna.FAMILY,
    "lfm2_moe": lfm2_moe.FAMILY,
    "llama4": llama4.FAMILY,
    "llama4_text": llama4.FAMILY,
    "minimax_m2": minimax_m2.FAMILY,
    "mistral3": mistral4.FAMILY,
    "mistral4": mistral4.FAMILY,
    "mixtral": mixtral.FAMILY,
    "nemotron_h": nemotron_h.FAMILY,
    "olmoe": olmoe.FAMILY,
    "phimoe": phimoe.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3_5_moe": qwen3_5_moe.FAMILY,
    "qwen3_5_moe_text": qwen3_5_moe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "qwen3_next": qwen3_next.FAMILY,
    "qwen3_vl_moe": qwen3_vl_moe.FAMILY,
    "qwen3_vl_moe_text": qwen3_vl_moe.FAMILY,
}

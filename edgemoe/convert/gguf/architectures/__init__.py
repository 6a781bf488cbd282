"""The supported architectures of GGUF files, by the file's `general.architecture`."""

from __future__ import annotations

from collections.abc import Mapping

from edgemoe.convert.gguf.architecture import Architecture
from edgemoe.convert.gguf.architectures import (
    bailingmoe2,
    deepseek2,
    ernie4_5_moe,
    gemma4,
    glm4moe,
    gpt_oss,
    granitehybrid,
    granitemoe,
    hunyuan_moe,
    kimi_linear,
    laguna,
    lfm2moe,
    llama,
    llama4,
    minimax_m2,
    nemotron_h_moe,
    olmoe,
    qwen2moe,
    qwen3moe,
    qwen3next,
)

__all__ = ["ARCHITECTURES"]

ARCHITECTURES: Mapping[str, Architecture] = {
    "bailingmoe2": bailingmoe2.ARCHITECTURE,
    "bailingmoe3": kimi_linear.BAILINGMOE3,
    "deepseek2": deepseek2.ARCHITECTURE,
    "ernie4_5-moe": ernie4_5_moe.ARCHITECTURE,
    "gemma4": gemma4.ARCHITECTURE,
    "glm4moe": glm4moe.ARCHITECTURE,
    "gpt-oss": gpt_oss.ARCHITECTURE,
    "granitehybrid": granitehybrid.ARCHITECTURE,
    "granitemoe": granitemoe.ARCHITECTURE,
    "hunyuan-moe": hunyuan_moe.ARCHITECTURE,
    "kimi-linear": kimi_linear.KIMI_LINEAR,
    "laguna": laguna.ARCHITECTURE,
    "lfm2moe": lfm2moe.ARCHITECTURE,
    "llama": llama.ARCHITECTURE,
    "llama4": llama4.ARCHITECTURE,
    "minimax-m2": minimax_m2.ARCHITECTURE,
    "mistral4": deepseek2.MISTRAL4,
    "nemotron_h_moe": nemotron_h_moe.ARCHITECTURE,
    "olmoe": olmoe.ARCHITECTURE,
    "qwen2moe": qwen2moe.ARCHITECTURE,
    "qwen35moe": qwen3next.QWEN35,
    "qwen3moe": qwen3moe.ARCHITECTURE,
    "qwen3next": qwen3next.QWEN3NEXT,
    "qwen3vlmoe": qwen3moe.ARCHITECTURE,
}

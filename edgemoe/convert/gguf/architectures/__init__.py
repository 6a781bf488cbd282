"""The architectures of GGUF files that are read, by the file's `general.architecture`."""

from __future__ import annotations

from collections.abc import Mapping

from edgemoe.convert.gguf.architecture import Architecture
from edgemoe.convert.gguf.architectures import (
    deepseek2,
    ernie4_5_moe,
    glm4moe,
    gpt_oss,
    granitemoe,
    hunyuan_moe,
    llama,
    minimax_m2,
    olmoe,
    qwen2moe,
    qwen3moe,
    qwen3next,
)

__all__ = ["ARCHITECTURES"]

ARCHITECTURES: Mapping[str, Architecture] = {
    "deepseek2": deepseek2.ARCHITECTURE,
    "ernie4_5-moe": ernie4_5_moe.ARCHITECTURE,
    "glm4moe": glm4moe.ARCHITECTURE,
    "gpt-oss": gpt_oss.ARCHITECTURE,
    "granitemoe": granitemoe.ARCHITECTURE,
    "hunyuan-moe": hunyuan_moe.ARCHITECTURE,
    "llama": llama.ARCHITECTURE,
    "minimax-m2": minimax_m2.ARCHITECTURE,
    "olmoe": olmoe.ARCHITECTURE,
    "qwen2moe": qwen2moe.ARCHITECTURE,
    "qwen35moe": qwen3next.QWEN35,
    "qwen3moe": qwen3moe.ARCHITECTURE,
    "qwen3next": qwen3next.QWEN3NEXT,
    "qwen3vlmoe": qwen3moe.ARCHITECTURE,
}

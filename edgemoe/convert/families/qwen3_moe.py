"""Qwen3-MoE: RMS norm of q and k per head, an explicit head size, dense layers in between."""

from __future__ import annotations

from edgemoe.config import ModelConfig
from edgemoe.convert.families.family import Family
from edgemoe.convert.families.reading import (
    attention_spec,
    decoder_config,
    num_layers,
    sparse_layers,
    window,
)
from edgemoe.convert.settings import Settings

__all__ = ["FAMILY"]


def _config(settings: Settings) -> ModelConfig:
    layers, moe_layers = num_layers(settings), sparse_layers(settings)
    width = 0 if len(moe_layers) == layers else settings.integer("intermediate_size")
    bias = settings.flag("attention_bias", False)
    attention = attention_spec(
        settings,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        window=window(settings) if settings.flag("use_sliding_window", False) else 0,
    )
    return decoder_config(
        settings,
        family="qwen3_moe",
        mixers=attention,
        expert_hidden=settings.integer("moe_intermediate_size"),
        moe_layers=moe_layers,
        renormalise=settings.flag("norm_topk_prob", False),
        shared_hidden=tuple(0 if i in moe_layers else width for i in range(layers)),
    )


FAMILY = Family(config=_config)

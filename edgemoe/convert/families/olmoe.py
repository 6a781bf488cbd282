"""OLMoE: RMS norm over the whole q and k projections, optional clipping of q, k and v."""

from __future__ import annotations

from edgemoe.config import ModelConfig
from edgemoe.convert.families.family import Family
from edgemoe.convert.families.reading import attention_spec, decoder_config, num_layers, window
from edgemoe.convert.settings import Settings

__all__ = ["FAMILY"]


def _config(settings: Settings) -> ModelConfig:
    if window(settings):
        # transformers' attention kernels disagree about this key: some use it, some do not.
        raise settings.error("sliding_window", "is not supported for OLMoE")
    clip = settings.get("clip_qkv")
    bias = settings.flag("attention_bias", False)
    attention = attention_spec(
        settings,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="full",
        clip=None if clip is None else settings.number("clip_qkv"),
    )
    return decoder_config(
        settings,
        family="olmoe",
        mixers=attention,
        expert_hidden=settings.integer("intermediate_size"),
        moe_layers=tuple(range(num_layers(settings))),
        renormalise=settings.flag("norm_topk_prob", False),
    )


FAMILY = Family(config=_config)

"""Qwen3.5 and Qwen3.6 MoE: Qwen3-Next with separately stored projections; the vision tower is left out."""

from __future__ import annotations

from edgemoe.config import ModelConfig
from edgemoe.convert.families import qwen3_next
from edgemoe.convert.families.family import Family, Source
from edgemoe.convert.families.reading import decoder_config, num_layers
from edgemoe.convert.settings import Settings

__all__ = ["FAMILY"]


def _config(settings: Settings) -> ModelConfig:
    layers = num_layers(settings)
    return decoder_config(
        settings,
        family="qwen3_5_moe",
        mixers=qwen3_next.mixers(settings),
        expert_hidden=settings.integer("moe_intermediate_size"),
        moe_layers=tuple(range(layers)),
        renormalise=True,
        shared_hidden=(settings.integer("shared_expert_intermediate_size"),) * layers,
        shared_sigmoid=True,
    )


def _left_out(config: ModelConfig, name: str) -> str:
    if name.startswith(("model.visual.", "visual.")):
        return "the vision tower"
    return qwen3_next.left_out(config, name)


FAMILY = Family(
    config=_config,
    roots=("model.language_model.", "model."),
    model={"norm": qwen3_next.NORM},
    layer=qwen3_next.LAYER,
    mixers={
        "delta": {
            **qwen3_next.DELTA,
            "qkv": Source("linear_attn.in_proj_qkv.weight"),
            "z": Source("linear_attn.in_proj_z.weight"),
            "beta": Source("linear_attn.in_proj_b.weight"),
            "decay": Source("linear_attn.in_proj_a.weight"),
        }
    },
    shared=qwen3_next.SHARED,
    left_out=_left_out,
)

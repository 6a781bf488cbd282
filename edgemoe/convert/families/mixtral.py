"""Mixtral: softmax router with renormalised gates, optional sliding window in every layer."""

from __future__ import annotations

from edgemoe.config import ModelConfig
from edgemoe.convert.families.family import FUSED_EXPERTS, Family, Source
from edgemoe.convert.families.reading import attention_spec, decoder_config, num_layers, window
from edgemoe.convert.settings import Settings

__all__ = ["FAMILY"]


def _config(settings: Settings) -> ModelConfig:
    layers = num_layers(settings)
    return decoder_config(
        settings,
        family="mixtral",
        mixers=attention_spec(settings, window=window(settings)),
        expert_hidden=settings.integer("intermediate_size"),
        moe_layers=tuple(range(layers)),
        renormalise=True,
    )


FAMILY = Family(
    config=_config,
    default_theta=1_000_000.0,
    experts=(
        {
            "router": Source("block_sparse_moe.gate.weight"),
            "gate": Source("block_sparse_moe.experts.{expert}.w1.weight"),
            "up": Source("block_sparse_moe.experts.{expert}.w3.weight"),
            "down": Source("block_sparse_moe.experts.{expert}.w2.weight"),
        },
        FUSED_EXPERTS,
    ),
)

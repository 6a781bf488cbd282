"""DeepSeek-V2 (-Lite, -Coder): latent attention, softmax router with groups, dense layers first."""

from __future__ import annotations

from edgemoe.config import ModelConfig
from edgemoe.convert.families.family import Family, further_layers
from edgemoe.convert.families.latent import (
    LATENT,
    SHARED,
    expect,
    first_dense,
    latent_config,
    refuse,
)
from edgemoe.convert.settings import Settings

__all__ = ["FAMILY"]


def _config(settings: Settings) -> ModelConfig:
    expect(settings, "scoring_func", "softmax")
    refuse(settings, norm_topk_prob=True, mlp_bias=True)
    in_groups = expect(settings, "topk_method", "greedy", "group_limited_greedy") != "greedy"
    return latent_config(
        settings,
        family="deepseek_v2",
        moe_layers=first_dense(settings, 0),
        groups=settings.integer("n_group") if in_groups else 1,
        used_groups=settings.integer("topk_group") if in_groups else 1,
        group_score="max",
    )


FAMILY = Family(config=_config, mixers=LATENT, shared=SHARED, left_out=further_layers)

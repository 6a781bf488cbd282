"""Mistral-Small-4: latent attention whose queries grow with the position, softmax router."""

from __future__ import annotations

from edgemoe.config import ModelConfig
from edgemoe.convert.families.family import Family
from edgemoe.convert.families.latent import LATENT, SHARED, first_dense, latent_config
from edgemoe.convert.settings import Settings

__all__ = ["FAMILY"]


def _config(settings: Settings) -> ModelConfig:
    return latent_config(
        settings,
        family="mistral4",
        moe_layers=first_dense(settings, 0),
        renormalise=settings.flag("norm_topk_prob", True),
        groups=settings.integer("n_group", 1),
        used_groups=settings.integer("topk_group", 1),
        group_score="top2",
    )


FAMILY = Family(config=_config, mixers=LATENT, shared=SHARED)

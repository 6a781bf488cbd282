"""DeepSeek-V3 and R1, Kimi-K2: latent attention, sigmoid router with a choice bias and groups, dense layers first."""

from __future__ import annotations

from typing import Any

from edgemoe.config import ModelConfig
from edgemoe.convert.families.family import (
    FUSED_EXPERTS,
    NAMED_EXPERTS,
    Family,
    choosing,
    further_layers,
)
from edgemoe.convert.families.latent import LATENT, SHARED, expect, first_dense, latent_config
from edgemoe.convert.settings import Settings

__all__ = ["FAMILY", "SIGMOID_EXPERTS", "sigmoid_router"]

_BIAS = "mlp.gate.e_score_correction_bias"
SIGMOID_EXPERTS = (choosing(NAMED_EXPERTS, _BIAS), choosing(FUSED_EXPERTS, _BIAS))
"""The ways in which experts are stored, with the router's choice bias."""


def sigmoid_router(settings: Settings) -> dict[str, Any]:
    """Returns the `ModelConfig` fields of a sigmoid router, which config.json need not name.

    Raises:
        FormatError: config.json names another kind of router.
    """
    expect(settings, "scoring_func", "sigmoid")
    expect(settings, "topk_method", "noaux_tc")
    return {
        "scoring": "sigmoid",
        "choice_bias": True,
        "renormalise": settings.flag("norm_topk_prob", True),
        "groups": settings.integer("n_group", 1),
        "used_groups": settings.integer("topk_group", 1),
        "group_score": "top2",
    }


def _config(settings: Settings) -> ModelConfig:
    return latent_config(
        settings,
        family="deepseek_v3",
        moe_layers=first_dense(settings, 3),
        **sigmoid_router(settings),
    )


FAMILY = Family(
    config=_config,
    experts=SIGMOID_EXPERTS,
    mixers=LATENT,
    shared=SHARED,
    left_out=further_layers,
)

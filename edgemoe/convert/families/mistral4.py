"""Mistral-Small-4: latent attention whose queries grow with the position, softmax router."""

from __future__ import annotations

from edgemoe.config import ModelConfig
from edgemoe.convert.families.family import Family
from edgemoe.convert.families.latent import LATENT, SHARED, expect, first_dense, latent_config
from edgemoe.convert.settings import Settings

__all__ = ["FAMILY"]

_OTHERS = ("vision_tower.", "multi_modal_projector.")


def _config(settings: Settings) -> ModelConfig:
    expect(settings, "model_type", "mistral4")  # a mistral3 config can wrap other text models too
    return latent_config(
        settings,
        family="mistral4",
        moe_layers=first_dense(settings, 0),
        renormalise=settings.flag("norm_topk_prob", True),
        groups=settings.integer("n_group", 1),
        used_groups=settings.integer("topk_group", 1),
        group_score="top2",
    )


def _left_out(config: ModelConfig, name: str) -> str:
    return "the vision tower" if name.removeprefix("model.").startswith(_OTHERS) else ""


FAMILY = Family(
    config=_config,
    mixers=LATENT,
    shared=SHARED,
    roots=("model.", "model.language_model.", "language_model.model."),
    left_out=_left_out,
)

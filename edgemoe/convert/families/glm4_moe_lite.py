"""GLM-4.7-Flash: latent attention, sigmoid router with a choice bias, a dense layer first."""

from __future__ import annotations

from edgemoe.config import ModelConfig
from edgemoe.convert.families.deepseek_v3 import SIGMOID_EXPERTS, sigmoid_router
from edgemoe.convert.families.family import Family, further_layers
from edgemoe.convert.families.latent import LATENT, SHARED, first_dense, latent_config
from edgemoe.convert.families.reading import num_layers
from edgemoe.convert.settings import Settings

__all__ = ["FAMILY"]


def _moe_layers(settings: Settings) -> tuple[int, ...]:
    kinds = settings.get("mlp_layer_types")
    if kinds is None:
        return first_dense(settings, 1)
    count = num_layers(settings)
    if not isinstance(kinds, list) or len(kinds) != count or not {*kinds} <= {"dense", "sparse"}:
        raise settings.error("mlp_layer_types", f'expected {count} of "dense" and "sparse"')
    return tuple(i for i, kind in enumerate(kinds) if kind == "sparse")


def _config(settings: Settings) -> ModelConfig:
    return latent_config(
        settings,
        family="glm4_moe_lite",
        moe_layers=_moe_layers(settings),
        **sigmoid_router(settings),
    )


FAMILY = Family(
    config=_config,
    experts=SIGMOID_EXPERTS,
    mixers=LATENT,
    shared=SHARED,
    left_out=further_layers,
)

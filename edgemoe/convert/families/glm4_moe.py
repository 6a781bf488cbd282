"""GLM-4.5, 4.6 and 4.7 (-Air): sigmoid router with a choice bias, partial RoPE, dense layers first."""

from __future__ import annotations

from edgemoe.config import MATRICES, ModelConfig
from edgemoe.convert.families.family import (
    FUSED_EXPERTS,
    NAMED_EXPERTS,
    Family,
    Source,
    choosing,
    further_layers,
)
from edgemoe.convert.families.reading import attention_spec, decoder_config, num_layers
from edgemoe.convert.rope import rotated_columns
from edgemoe.convert.settings import Settings

__all__ = ["FAMILY"]

_BIAS = "mlp.gate.e_score_correction_bias"


def _config(settings: Settings) -> ModelConfig:
    layers, dense = num_layers(settings), settings.integer("first_k_dense_replace", 1, at_least=0)
    width = settings.integer("moe_intermediate_size")
    shared = width * settings.integer("n_shared_experts", 1)
    first = settings.integer("intermediate_size")
    head_dim = settings.integer("head_dim", 128)
    attention = attention_spec(
        settings,
        head_dim=head_dim,
        rotated=rotated_columns(settings, head_dim),
        qkv_bias=settings.flag("attention_bias", False),
        qk_norm="head" if settings.flag("use_qk_norm", False) else "none",
    )
    return decoder_config(
        settings,
        family="glm4_moe",
        mixers=attention,
        num_experts=settings.integer("n_routed_experts"),
        expert_hidden=width,
        moe_layers=tuple(range(dense, layers)),
        scoring="sigmoid",
        choice_bias=True,
        renormalise=settings.flag("norm_topk_prob", True),
        gate_scale=settings.positive("routed_scaling_factor", 1.0),
        groups=settings.integer("n_group", 1),
        used_groups=settings.integer("topk_group", 1),
        group_score="top2",
        shared_hidden=tuple(first if i < dense else shared for i in range(layers)),
    )


FAMILY = Family(
    config=_config,
    default_theta=1_000_000.0,
    experts=(choosing(NAMED_EXPERTS, _BIAS), choosing(FUSED_EXPERTS, _BIAS)),
    shared={f"shared.{x}": Source(f"mlp.shared_experts.{x}_proj.weight") for x in MATRICES},
    left_out=further_layers,
)

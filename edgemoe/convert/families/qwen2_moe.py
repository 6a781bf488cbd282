"""Qwen2-MoE: biases on q, k and v, a shared expert with a sigmoid gate, dense layers in between."""

from __future__ import annotations

from edgemoe.config import MATRICES, ModelConfig
from edgemoe.convert.families.family import Family, Source
from edgemoe.convert.families.reading import (
    attention_spec,
    by_layer,
    decoder_config,
    layer_types,
    num_layers,
    sparse_layers,
    window,
)
from edgemoe.convert.settings import Settings

__all__ = ["FAMILY"]


def _config(settings: Settings) -> ModelConfig:
    layers, moe_layers = num_layers(settings), sparse_layers(settings)
    dense = 0 if len(moe_layers) == layers else settings.integer("intermediate_size")
    shared = settings.integer("shared_expert_intermediate_size")
    attention = attention_spec(settings, qkv_bias=settings.flag("qkv_bias", True))
    return decoder_config(
        settings,
        family="qwen2_moe",
        mixers=by_layer(_windows(settings, layers), attention),
        expert_hidden=settings.integer("moe_intermediate_size"),
        moe_layers=moe_layers,
        renormalise=settings.flag("norm_topk_prob", False),
        shared_hidden=tuple(shared if i in moe_layers else dense for i in range(layers)),
        shared_sigmoid=True,
    )


def _windows(settings: Settings, layers: int) -> tuple[int, ...]:
    """Returns the window of every layer, from `layer_types` or from the rule that preceded it."""
    uses_window = settings.flag("use_sliding_window", False)
    types = layer_types(settings, "full_attention", "sliding_attention")
    if types is None:
        last = settings.integer("max_window_layers", 28, at_least=0)
        sliding = [uses_window and i % 2 == 0 and i < last for i in range(layers)]
    else:
        sliding = [t == "sliding_attention" for t in types]
    width = window(settings)
    if any(sliding) and not (uses_window and width):
        raise settings.error("sliding_window", "is missing, yet some layers have one")
    return tuple(width if slides else 0 for slides in sliding)


FAMILY = Family(
    config=_config,
    shared={
        **{f"shared.{x}": Source(f"mlp.shared_expert.{x}_proj.weight") for x in MATRICES},
        "shared.sigmoid": Source("mlp.shared_expert_gate.weight", row=True),
    },
)

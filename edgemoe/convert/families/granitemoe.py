"""GraniteMoe and GraniteMoeShared: softmax over the chosen experts, four scalar multipliers."""

from __future__ import annotations

from edgemoe.config import ModelConfig
from edgemoe.convert.families.family import Family, Source
from edgemoe.convert.families.reading import attention_spec, decoder_config, num_layers
from edgemoe.convert.settings import Settings

__all__ = ["FAMILY", "scalars"]


def _config(settings: Settings) -> ModelConfig:
    layers = num_layers(settings)
    bias = settings.flag("attention_bias", False)
    shared = 0
    if settings.text("model_type") == "granitemoeshared":
        shared = settings.integer("shared_intermediate_size", 0, at_least=0)
    attention = attention_spec(
        settings, qkv_bias=bias, o_bias=bias, scale=settings.number("attention_multiplier", 1.0)
    )
    return decoder_config(
        settings,
        family="granitemoe",
        mixers=attention,
        expert_hidden=settings.integer("intermediate_size"),
        moe_layers=tuple(range(layers)),
        scoring="softmax_topk",
        shared_hidden=(shared,) * layers,
        **scalars(settings),
    )


def scalars(settings: Settings) -> dict[str, float]:
    """Returns the `ModelConfig` fields of the scalar multipliers of Granite models."""
    return {
        "embedding_multiplier": settings.number("embedding_multiplier", 1.0),
        "residual_multiplier": settings.number("residual_multiplier", 1.0),
        "logits_divisor": settings.number("logits_scaling", 1.0),
    }


FAMILY = Family(
    config=_config,
    experts=(
        {
            "router": Source("block_sparse_moe.router.layer.weight"),
            "gate": Source("block_sparse_moe.input_linear.weight.{expert}", half=0),
            "up": Source("block_sparse_moe.input_linear.weight.{expert}", half=1),
            "down": Source("block_sparse_moe.output_linear.weight.{expert}"),
        },
        {
            "router": Source("block_sparse_moe.router.weight"),
            "gate": Source("block_sparse_moe.experts.gate_up_proj.{expert}", half=0),
            "up": Source("block_sparse_moe.experts.gate_up_proj.{expert}", half=1),
            "down": Source("block_sparse_moe.experts.down_proj.{expert}"),
        },
    ),
    shared={
        "shared.gate": Source("shared_mlp.input_linear.weight", half=0),
        "shared.up": Source("shared_mlp.input_linear.weight", half=1),
        "shared.down": Source("shared_mlp.output_linear.weight"),
    },
)

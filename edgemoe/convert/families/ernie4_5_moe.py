"""ERNIE-4.5: softmax router with a choice bias, RoPE on adjacent columns, ungated shared experts."""

from __future__ import annotations

from edgemoe.config import MATRICES, ModelConfig
from edgemoe.convert.families.family import FUSED_EXPERTS, NAMED_EXPERTS, Family, Source, choosing
from edgemoe.convert.families.reading import attention_spec, decoder_config, num_layers
from edgemoe.convert.settings import Settings

__all__ = ["FAMILY"]

_BIAS = "mlp.moe_statics.e_score_correction_bias"
_LEAST = 1e-12
"""No sum of gates is below this, so a smaller floor (`moe_norm_min`) has no effect. The runtime has no floor."""


def _config(settings: Settings) -> ModelConfig:
    layers, step = num_layers(settings), settings.integer("moe_layer_interval", 1)
    first = settings.integer("moe_layer_start_index", 1, at_least=0)
    last = settings.integer("moe_layer_end_index", -1, at_least=-1)
    last = layers - 1 if last < 0 else last
    moe_layers = tuple(i for i in range(layers) if first <= i <= last and (i + 1) % step == 0)
    width = settings.integer("moe_intermediate_size")
    shared = width * settings.integer("moe_num_shared_experts", 2, at_least=0)
    dense = settings.integer("intermediate_size")
    bias = settings.flag("use_bias", False)
    if bias:
        raise settings.error("use_bias", "biases in the FFNs are not supported")
    if (floor := settings.number("moe_norm_min", _LEAST)) > _LEAST:
        raise settings.error("moe_norm_min", f"expected at most {_LEAST:g}, got {floor:g}")
    return decoder_config(
        settings,
        family="ernie4_5_moe",
        mixers=attention_spec(settings),
        num_experts=settings.integer("moe_num_experts"),
        experts_per_token=settings.integer("moe_k"),
        expert_hidden=width,
        moe_layers=moe_layers,
        choice_bias=True,
        renormalise=True,
        shared_hidden=tuple(shared if i in moe_layers else dense for i in range(layers)),
    )


def _left_out(config: ModelConfig, name: str) -> str:
    return "layers that predict several tokens" if name.startswith("model.mtp_") else ""


FAMILY = Family(
    config=_config,
    default_theta=500_000.0,
    experts=tuple(choosing(e, _BIAS, row=True) for e in (NAMED_EXPERTS, FUSED_EXPERTS)),
    shared={f"shared.{x}": Source(f"mlp.shared_experts.{x}_proj.weight") for x in MATRICES},
    layer={x: Source(f"self_attn.{x}_proj.weight", interleaved=True) for x in "qk"},
    left_out=_left_out,
)

"""Hunyuan-A13B: norm of q and k after RoPE, ungated shared expert, NTK-scaled RoPE base."""

from __future__ import annotations

from edgemoe.config import MATRICES, ModelConfig
from edgemoe.convert.families.family import FUSED_EXPERTS, NAMED_EXPERTS, Family, Source
from edgemoe.convert.families.reading import attention_spec, decoder_config, num_layers
from edgemoe.convert.settings import Settings

__all__ = ["FAMILY"]


def _everywhere(settings: Settings, key: str, default: int) -> int:
    """Returns a number that may be given once or for each layer, and must be the same for all."""
    values = set(settings.integers(key)) or {default}
    if len(values) > 1 or min(values) < 1:
        raise settings.error(key, "numbers that differ by layer are not supported")
    return values.pop()


def _config(settings: Settings) -> ModelConfig:
    layers = num_layers(settings)
    dense = settings.integer("intermediate_size")
    if not settings.flag("use_qk_norm", True):
        raise settings.error("use_qk_norm", "false is not supported")
    bias = settings.flag("attention_bias", False)
    attention = attention_spec(
        settings, qkv_bias=bias, o_bias=bias, qk_norm="head", norm_after_rope=True
    )
    return decoder_config(
        settings,
        family="hunyuan_v1_moe",
        mixers=attention,
        experts_per_token=_everywhere(settings, "moe_topk", 1),
        num_experts=_everywhere(settings, "num_experts", 1),
        expert_hidden=_everywhere(settings, "moe_intermediate_size", dense),
        moe_layers=tuple(range(layers)),
        renormalise=True,
        shared_hidden=(dense * _everywhere(settings, "num_shared_expert", 1),) * layers,
    )


_ROUTER = {"router": Source("mlp.gate.wg.weight")}

FAMILY = Family(
    config=_config,
    experts=({**NAMED_EXPERTS, **_ROUTER}, {**FUSED_EXPERTS, **_ROUTER}),
    shared={f"shared.{x}": Source(f"mlp.shared_mlp.{x}_proj.weight") for x in MATRICES},
    layer={
        "q_norm": Source("self_attn.query_layernorm.weight"),
        "k_norm": Source("self_attn.key_layernorm.weight"),
    },
)

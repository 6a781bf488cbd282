"""Gemma 4 26B-A4B: experts parallel to an FFN, each with norms before and after; two head sizes; values equal to keys.

Norm weights are plain, not offsets from 1. A layer's scale is folded into its last norm, an expert's scale into its
w_down, and the scale of the router's input becomes a norm. The vision and audio towers are left out.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig
from edgemoe.convert.families.family import Family, Source
from edgemoe.convert.families.reading import (
    attention_spec,
    decoder_config,
    layer_types,
    num_layers,
    table_of,
)
from edgemoe.convert.settings import Settings
from edgemoe.errors import quoted
from edgemoe.specs import AttentionSpec, RopeSpec

__all__ = ["FAMILY"]

_FULL, _SLIDING = "full_attention", "sliding_attention"
_TABLES = {"rope_full": _FULL, "rope": _SLIDING}
_EXPECTED = {
    "enable_moe_block": (False, True),
    "attention_bias": (False, False),
    "attention_k_eq_v": (False, True),
    "use_double_wide_mlp": (False, False),
}
"""For each flag: the default of transformers' class, and the supported value."""


def _config(settings: Settings) -> ModelConfig:
    for key, (absent, supported) in _EXPECTED.items():
        if settings.flag(key, absent) != supported:
            raise settings.error(key, f"{str(not supported).lower()} is not supported")
    for key, default in (("hidden_size_per_layer_input", 256), ("num_kv_shared_layers", 0)):
        if (found := settings.integer(key, default, at_least=0)) != 0:
            raise settings.error(key, f"only 0 is supported, got {found}")
    if settings.get("use_bidirectional_attention") == "all":
        raise settings.error("use_bidirectional_attention", "'all' is not supported")
    activation = settings.text("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise settings.error(
            "hidden_activation",
            f"{quoted(activation)} is not supported; supported: gelu_pytorch_tanh",
        )
    layers, hidden_size = num_layers(settings), settings.integer("hidden_size")
    kinds = layer_types(settings, _FULL, _SLIDING) or tuple(
        _SLIDING if (i + 1) % 6 else _FULL for i in range(layers)
    )
    cap = settings.get("final_logit_softcapping")
    return decoder_config(
        settings,
        family="gemma4",
        mixers=[_attention(settings, i, kind) for i, kind in enumerate(kinds)],
        experts_per_token=settings.integer("top_k_experts"),
        num_experts=settings.integer("num_experts"),
        expert_hidden=settings.integer("moe_intermediate_size"),
        moe_layers=tuple(range(layers)),
        renormalise=True,
        shared_hidden=(settings.integer("intermediate_size"),) * layers,
        activation="geglu",
        branch_norms=True,
        out_norms=True,
        layer_scale=True,
        soft_cap=None if cap is None else settings.positive("final_logit_softcapping"),
        embedding_multiplier=math.sqrt(hidden_size),
        tied=settings.flag("tie_word_embeddings", True),
    )


def _attention(settings: Settings, layer: int, kind: str) -> AttentionSpec:
    """Returns the attention of one layer. In full-attention layers, values are the keys. The sizes of these layers are
    under other keys of config.json or, as transformers 5 writes it, in a section for each layer."""
    own = Settings({})
    if (sections := settings.section("per_layer_config")) is not None:
        digits = len(str(num_layers(settings) - 1))
        own = sections.section(f"{layer:0{digits}}") or sections.section(str(layer)) or own
    elif kind == _FULL:
        own = Settings({
            "head_dim": settings.integer("global_head_dim", 512),
            "num_key_value_heads": settings.get("num_global_key_value_heads"),
        })  # fmt: skip
    usual: dict[str, Any] = {"scale": 1.0, "qk_norm": "head", "v_norm": True}
    sizes: dict[str, Any] = {
        "head_dim": own.integer("head_dim", settings.integer("head_dim", 256)),
        "num_kv_heads": own.integer(
            "num_key_value_heads", settings.integer("num_key_value_heads", 4)
        ),
    }
    if kind == _FULL:
        return attention_spec(settings, rope="rope_full", shared_kv=True, **usual, **sizes)
    return attention_spec(
        settings, window=settings.integer("sliding_window", 512), **usual, **sizes
    )


def _rope(settings: Settings, spec: RopeSpec) -> Settings:
    """Returns the settings of one RoPE table; full-attention layers rotate a quarter of the pairs of all columns."""
    kind = _TABLES[spec.name]
    default: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
    if kind == _FULL:
        default = {
            "rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0,
        }  # fmt: skip
    return table_of(settings, kind, default)


def _scale(stored: NDArray[Any], _: object) -> NDArray[Any]:
    """Folds 1 / sqrt(D) into the scale: the router's input is x / rms(x) * scale / sqrt(D)."""
    return np.asarray(stored * len(stored) ** -0.5)


def _left_out(config: ModelConfig, name: str) -> str:
    if name.startswith(("model.vision_tower.", "model.embed_vision.")):
        return "the vision tower"
    if name.startswith(("model.audio_tower.", "model.embed_audio.")):
        return "the audio tower"
    return ""


_ROUTER = {
    "router": Source("router.proj.weight"),
    "router_norm": Source("router.scale", fold=_scale),
    "experts_norm": Source("pre_feedforward_layernorm_2.weight"),
    "experts_out_norm": Source("post_feedforward_layernorm_2.weight"),
}

FAMILY = Family(
    config=_config,
    rope=_rope,
    roots=("model.language_model.", "model."),
    layer={
        "attn_out_norm": Source("post_attention_layernorm.weight"),
        "ffn_norm": Source("pre_feedforward_layernorm.weight"),
        "ffn_out_norm": Source("post_feedforward_layernorm.weight", times="layer_scalar"),
        "layer_scale": Source("layer_scalar"),
    },
    experts=(
        {
            **_ROUTER,
            "gate": Source("experts.gate_up_proj.{expert}", half=0),
            "up": Source("experts.gate_up_proj.{expert}", half=1),
            "down": Source("experts.down_proj.{expert}", times="router.per_expert_scale"),
        },
        {
            **_ROUTER,
            "gate": Source("experts.{expert}.gate_proj.weight"),
            "up": Source("experts.{expert}.up_proj.weight"),
            "down": Source("experts.{expert}.down_proj.weight", times="router.per_expert_scale"),
        },
    ),
    shared={
        **{f"shared.{x}": Source(f"mlp.{x}_proj.weight") for x in ("gate", "up", "down")},
        "shared.out_norm": Source("post_feedforward_layernorm_1.weight"),
    },
    left_out=_left_out,
)

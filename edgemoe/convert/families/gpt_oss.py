"""gpt-oss: attention sinks, a window in every other layer, biases everywhere, a clamped GLU.

Experts are stored with inputs first, [D, 2H] and [H, D], with gate and up in alternate columns. The release has them
in MXFP4, which is presented in the same form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig
from edgemoe.convert.families.family import Family, Source
from edgemoe.convert.families.reading import (
    attention_spec,
    by_layer,
    decoder_config,
    layer_types,
    num_layers,
)
from edgemoe.convert.settings import Settings
from edgemoe.errors import quoted

__all__ = ["FAMILY"]

Array = NDArray[Any]


def _config(settings: Settings) -> ModelConfig:
    for key, expected in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if (found := settings.number(key, expected)) != expected:
            raise settings.error(key, f"expected {expected:g} for this family, got {found:g}")
    if (kind := settings.text("hidden_act", "silu")) != "silu":
        raise settings.error("hidden_act", f"{quoted(kind)} is not supported; supported: silu")
    layers = num_layers(settings)
    kinds = layer_types(settings, "full_attention", "sliding_attention") or tuple(
        ("sliding_attention", "full_attention")[i % 2] for i in range(layers)
    )
    width, bias = settings.integer("sliding_window", 128), settings.flag("attention_bias", True)
    attention = attention_spec(
        settings, head_dim=settings.integer("head_dim", 64), qkv_bias=bias, o_bias=bias, sinks=True
    )
    return decoder_config(
        settings,
        family="gpt_oss",
        mixers=by_layer([width if k == "sliding_attention" else 0 for k in kinds], attention),
        expert_hidden=settings.integer("intermediate_size"),
        moe_layers=tuple(range(layers)),
        scoring="softmax_topk",
        router_bias=True,
        activation="clamped_swiglu",
        expert_bias=True,
    )


def _even(stored: Array, _: object) -> Array:
    return np.asarray(stored[:, 0::2])


def _odd(stored: Array, _: object) -> Array:
    return np.asarray(stored[:, 1::2])


def _even_rows(stored: Array, _: object) -> Array:
    return np.asarray(stored[:, 0::2].T)


def _odd_rows(stored: Array, _: object) -> Array:
    return np.asarray(stored[:, 1::2].T)


def _both(shape: tuple[int, ...], _: object) -> tuple[int, ...]:
    return shape[0], 2 * shape[1]


def _both_rows(shape: tuple[int, ...], _: object) -> tuple[int, ...]:
    return shape[1], 2 * shape[0]


def _turned(shape: tuple[int, ...], _: object) -> tuple[int, ...]:
    return shape[::-1]


def _transposed(stored: Array, _: object) -> Array:
    return np.asarray(stored.T)


FAMILY = Family(
    config=_config,
    default_theta=150_000.0,
    layer={"sinks": Source("self_attn.sinks")},
    experts=(
        {
            "router": Source("mlp.router.weight"),
            "router_bias": Source("mlp.router.bias"),
            "gate": Source("mlp.experts.gate_up_proj.{expert}", fold=_even_rows, moved=_both_rows),
            "up": Source("mlp.experts.gate_up_proj.{expert}", fold=_odd_rows, moved=_both_rows),
            "down": Source("mlp.experts.down_proj.{expert}", fold=_transposed, moved=_turned),
            "expert_bias.gate": Source("mlp.experts.gate_up_proj_bias", fold=_even, moved=_both),
            "expert_bias.up": Source("mlp.experts.gate_up_proj_bias", fold=_odd, moved=_both),
            "expert_bias.down": Source("mlp.experts.down_proj_bias"),
        },
    ),
)

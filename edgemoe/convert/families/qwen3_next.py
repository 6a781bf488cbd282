"""Qwen3-Next and Qwen3-Coder-Next: three of four layers are Gated DeltaNet, the fourth is gated attention.

Norm weights are stored as offsets from 1. Projections are stored jointly: the query and gate of each attention head,
and everything for each key head of DeltaNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import MATRICES, ModelConfig
from edgemoe.convert.families.family import Family, Fold, Source
from edgemoe.convert.families.reading import (
    attention_spec,
    by_type,
    decoder_config,
    num_layers,
    sparse_layers,
)
from edgemoe.convert.rope import rotated_columns
from edgemoe.convert.settings import Settings
from edgemoe.specs import AttentionSpec, DeltaSpec, MixerSpec

__all__ = ["DELTA", "FAMILY", "LAYER", "NORM", "SHARED", "left_out", "mixers"]

Array = NDArray[Any]


def _config(settings: Settings) -> ModelConfig:
    layers, moe_layers = num_layers(settings), sparse_layers(settings)
    dense = 0 if len(moe_layers) == layers else settings.integer("intermediate_size")
    shared = settings.integer("shared_expert_intermediate_size")
    return decoder_config(
        settings,
        family="qwen3_next",
        mixers=mixers(settings),
        expert_hidden=settings.integer("moe_intermediate_size"),
        moe_layers=moe_layers,
        renormalise=settings.flag("norm_topk_prob", True),
        shared_hidden=tuple(shared if i in moe_layers else dense for i in range(layers)),
        shared_sigmoid=True,
    )


def mixers(settings: Settings) -> list[MixerSpec]:
    """Returns the mixer of every layer."""
    for key, supported in (("attention_bias", False), ("attn_output_gate", True)):
        if settings.flag(key, supported) != supported:
            raise settings.error(key, f"{str(not supported).lower()} is not supported")
    head_dim = settings.integer("head_dim", 256)
    attention = attention_spec(
        settings, head_dim=head_dim, rotated=rotated_columns(settings, head_dim, 0.25),
        qk_norm="head", gate="sigmoid",
    )  # fmt: skip
    delta = DeltaSpec(
        key_heads=settings.integer("linear_num_key_heads"),
        value_heads=settings.integer("linear_num_value_heads"),
        key_dim=settings.integer("linear_key_head_dim"),
        value_dim=settings.integer("linear_value_head_dim"),
        taps=settings.integer("linear_conv_kernel_dim"),
        norm_eps=settings.number("rms_norm_eps"),
    )
    if settings.get("layer_types") is None:
        every = settings.integer("full_attention_interval", 4)
        return [delta if (i + 1) % every else attention for i in range(num_layers(settings))]
    return by_type(settings, {"linear_attention": delta, "full_attention": attention})


def plus_one(x: Array, spec: Any) -> Array:
    """Returns a norm's weight from its stored offset from 1."""
    return np.add(x, np.float32(1))


def _of_head(half: int) -> Fold:
    """Returns a fold that picks from each attention head its query's rows (0) or its gate's (1), which follow them."""

    def fold(x: Array, spec: AttentionSpec) -> Array:
        parts = x.reshape(spec.num_heads, 2, spec.head_dim, -1)
        return parts[:, half].reshape(spec.q_width, -1)

    return fold


def _parts(x: Array, spec: DeltaSpec, *widths: int) -> list[Array]:
    """Splits each key head's rows into parts of the given numbers of rows; returns each part for all heads."""
    heads = x.reshape(spec.key_heads, sum(widths), -1)
    cuts = np.split(heads, np.cumsum(widths)[:-1], axis=1)
    return [cut.reshape(-1, x.shape[1]) for cut in cuts]


def _qkvz(x: Array, spec: DeltaSpec) -> list[Array]:
    values = spec.value_width // spec.key_heads
    return _parts(x, spec, spec.key_dim, spec.key_dim, values, values)


def _ba(x: Array, spec: DeltaSpec) -> list[Array]:
    return _parts(x, spec, *[spec.value_heads // spec.key_heads] * 2)


NORM = Source("norm.weight", fold=plus_one)

LAYER: Mapping[str, Source] = {
    "attn_norm": Source("input_layernorm.weight", fold=plus_one),
    "ffn_norm": Source("post_attention_layernorm.weight", fold=plus_one),
    "q": Source("self_attn.q_proj.weight", fold=_of_head(0)),
    "q_gate": Source("self_attn.q_proj.weight", fold=_of_head(1)),
    "q_norm": Source("self_attn.q_norm.weight", fold=plus_one),
    "k_norm": Source("self_attn.k_norm.weight", fold=plus_one),
}

DELTA: Mapping[str, Source] = {
    "o": Source("linear_attn.out_proj.weight"),
    "conv": Source("linear_attn.conv1d.weight", fold=lambda x, spec: x.T),
    "decay_rate": Source("linear_attn.A_log", fold=lambda x, spec: np.exp(x)),
    "decay_bias": Source("linear_attn.dt_bias"),
    "head_norm": Source("linear_attn.norm.weight"),
}
"""The sources of the DeltaNet tensors that Qwen3.5 stores alike."""

SHARED: Mapping[str, Source] = {
    **{f"shared.{x}": Source(f"mlp.shared_expert.{x}_proj.weight") for x in MATRICES},
    "shared.sigmoid": Source("mlp.shared_expert_gate.weight", row=True),
}


def left_out(config: ModelConfig, name: str) -> str:
    """See `Family.left_out`."""
    return "layers that predict several tokens" if name.startswith("mtp.") else ""


FAMILY = Family(
    config=_config,
    model={"norm": NORM},
    layer=LAYER,
    mixers={
        "delta": {
            **DELTA,
            "qkv": Source(
                "linear_attn.in_proj_qkvz.weight", fold=lambda x, s: np.concatenate(_qkvz(x, s)[:3])
            ),
            "z": Source("linear_attn.in_proj_qkvz.weight", fold=lambda x, s: _qkvz(x, s)[3]),
            "beta": Source("linear_attn.in_proj_ba.weight", fold=lambda x, s: _ba(x, s)[0]),
            "decay": Source("linear_attn.in_proj_ba.weight", fold=lambda x, s: _ba(x, s)[1]),
        }
    },
    shared=SHARED,
    left_out=left_out,
)

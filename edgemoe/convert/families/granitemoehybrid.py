"""Granite-4.0-H: Mamba-2 with a few layers of attention without positions; experts parallel to a shared FFN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig
from edgemoe.convert.families import granitemoe
from edgemoe.convert.families.family import Fold, Source
from edgemoe.convert.families.reading import attention_spec, by_type, decoder_config, num_layers
from edgemoe.convert.settings import Settings
from edgemoe.errors import quoted
from edgemoe.specs import MambaSpec

__all__ = ["FAMILY", "mamba_sources"]

_NO_LIMIT = ("None", "[0.0, inf]", "[0.0, {'__float__': 'Infinity'}]")
"""The spellings of a time step limit that never applies."""


def _config(settings: Settings) -> ModelConfig:
    layers, bias = num_layers(settings), settings.flag("attention_bias", False)
    attention = attention_spec(
        settings, qkv_bias=bias, o_bias=bias, scale=settings.number("attention_multiplier", 1.0)
    )
    positions = settings.get("position_embedding_type")
    if positions != "rope":
        if positions not in (None, "nope"):
            raise settings.error("position_embedding_type", f"{quoted(positions)} is not supported")
        attention = replace(attention, rope=None)
    mamba = _mamba(settings)
    return decoder_config(
        settings,
        family="granitemoehybrid",
        mixers=by_type(
            settings,
            {"mamba": mamba, "linear_attention": mamba, "attention": attention, "full_attention": attention},
        ),
        expert_hidden=settings.integer("intermediate_size"),
        moe_layers=tuple(range(layers)),
        scoring="softmax_topk",
        shared_hidden=(settings.integer("shared_intermediate_size", 1024, at_least=0),) * layers,
        **granitemoe.scalars(settings),
    )  # fmt: skip


def _mamba(settings: Settings) -> MambaSpec:
    if settings.flag("mamba_proj_bias", False):
        raise settings.error("mamba_proj_bias", "true is not supported")
    if str(settings.get("time_step_limit")) not in _NO_LIMIT:
        raise settings.error("time_step_limit", "steps that are cut are not supported")
    width = settings.integer("mamba_expand", 2) * settings.integer("hidden_size")
    heads, head_dim = settings.integer("mamba_n_heads"), settings.get("mamba_d_head")
    if head_dim in (None, "auto"):
        head_dim = width // heads
    if head_dim * heads != width:
        raise settings.error("mamba_d_head", f"expected {width // heads}, got {quoted(head_dim)}")
    return MambaSpec(
        num_heads=heads,
        head_dim=head_dim,
        groups=settings.integer("mamba_n_groups", 1),
        state_dim=settings.integer("mamba_d_state"),
        taps=settings.integer("mamba_d_conv", 4),
        norm_eps=settings.number("rms_norm_eps"),
        conv_bias=settings.flag("mamba_conv_bias", True),
    )


def _rows(part: int) -> Fold:
    """Returns a fold that picks from the input projection the rows of the gate (0), of x, B and C (1) or steps (2)."""

    def fold(x: NDArray[Any], spec: MambaSpec) -> NDArray[Any]:
        ends = (
            0,
            spec.width,
            spec.width + spec.channels,
            spec.width + spec.channels + spec.num_heads,
        )
        return x[ends[part] : ends[part + 1]] if len(x) == ends[-1] else x

    return fold


def mamba_sources(place: str) -> dict[str, Source]:
    """Returns the sources of Mamba-2's tensors, whose names within a layer begin with `place`."""
    return {
        "x_gate": Source(f"{place}.in_proj.weight", fold=_rows(0)),
        "xbc": Source(f"{place}.in_proj.weight", fold=_rows(1)),
        "step": Source(f"{place}.in_proj.weight", fold=_rows(2)),
        "conv": Source(f"{place}.conv1d.weight", fold=lambda x, spec: x.T),
        "conv_bias": Source(f"{place}.conv1d.bias"),
        "decay_rate": Source(f"{place}.A_log", fold=lambda x, spec: np.exp(x)),
        "step_bias": Source(f"{place}.dt_bias"),
        "skip": Source(f"{place}.D"),
        "head_norm": Source(f"{place}.norm.weight"),
        "o": Source(f"{place}.out_proj.weight"),
    }


FAMILY = replace(granitemoe.FAMILY, config=_config, mixers={"mamba": mamba_sources("mamba")})

"""Llama-4-Scout: chunked attention, except in layers without positions; one expert, its input times its gate.

Queries and keys are normalised after RoPE, without a weight. Experts are stored with inputs first, [D, 2H] and [H, D].
The vision tower is left out.
"""

from __future__ import annotations

import dataclasses

from edgemoe.config import MATRICES, ModelConfig
from edgemoe.convert.families.family import Family, Source
from edgemoe.convert.families.qwen3_vl_moe import transposed, transposed_gate, transposed_up
from edgemoe.convert.families.reading import attention_spec, decoder_config, layer_types, num_layers
from edgemoe.convert.settings import Settings
from edgemoe.errors import quoted
from edgemoe.specs import AttentionSpec

__all__ = ["FAMILY"]

_FULL, _CHUNKED = "full_attention", "chunked_attention"


def _config(settings: Settings) -> ModelConfig:
    layers, chunk = num_layers(settings), settings.integer("attention_chunk_size", 8192)
    turns = settings.integers("no_rope_layers")
    every = settings.integer("no_rope_layer_interval", 4)
    turns = turns or tuple(int((i + 1) % every != 0) for i in range(layers))
    if len(turns) != layers:
        raise settings.error(
            "no_rope_layers", f"expected a list of {layers} numbers, got {len(turns)}"
        )
    kinds = layer_types(settings, _FULL, _CHUNKED) or [_CHUNKED if t else _FULL for t in turns]
    if settings.get("moe_layers") is None:
        step = settings.integer("interleave_moe_layer_step", 1)
        moe_layers = tuple(range(step - 1, layers, step))
    else:
        moe_layers = settings.integers("moe_layers")
    width = settings.integer("intermediate_size")
    dense = width if len(moe_layers) == layers else settings.integer("intermediate_size_mlp")
    return decoder_config(
        settings,
        family="llama4",
        mixers=[
            _attention(settings, bool(turn), chunk if kind == _CHUNKED else 0)
            for turn, kind in zip(turns, kinds, strict=True)
        ],
        expert_hidden=width,
        experts_per_token=settings.integer("num_experts_per_tok", 1),
        moe_layers=moe_layers,
        shared_hidden=tuple(width if i in moe_layers else dense for i in range(layers)),
        scoring="sigmoid",
        gate_input=True,
    )


def _attention(settings: Settings, turns: bool, chunk: int) -> AttentionSpec:
    """Returns the attention of one layer; without RoPE, queries grow with the position instead."""
    bias = settings.flag("attention_bias", False)
    spec = attention_spec(settings, qkv_bias=bias, o_bias=bias, chunk=chunk)
    changes: dict[str, object] = {}
    if not turns:
        changes["rope"] = None
        if _is_tuned(settings):
            changes["growth"] = settings.positive("attn_scale", 0.1)
            changes["grow_every"] = settings.integer("floor_scale", 8192)
    elif settings.flag("use_qk_norm", True):
        changes |= {"qk_norm": "unit", "norm_after_rope": True}
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


def _is_tuned(settings: Settings) -> bool:
    """Returns whether queries grow with the position; early releases have this flag as a number."""
    key = "attn_temperature_tuning"
    value = settings.get(key)
    if not isinstance(value, (bool, int, type(None))):
        raise settings.error(key, f"expected true or false, got {quoted(value)}")
    return value is None or bool(value)


def _left_out(config: ModelConfig, name: str) -> str:
    sees = name.startswith(("vision_model.", "multi_modal_projector."))
    return "the vision tower" if sees else ""


_FFN = "feed_forward."

FAMILY = Family(
    config=_config,
    default_theta=500_000.0,
    roots=("language_model.model.", "model.language_model.", "model."),
    layer={
        **{
            f"{x}{end}": Source(f"self_attn.{x}_proj.{kind}", interleaved=True)
            for x in "qk"
            for end, kind in (("", "weight"), ("_bias", "bias"))
        },
        **{f"shared.{x}": Source(f"{_FFN}{x}_proj.weight") for x in MATRICES},
    },
    experts=(
        {
            "router": Source(f"{_FFN}router.weight"),
            "gate": Source(f"{_FFN}experts.gate_up_proj.{{expert}}", fold=transposed_gate),
            "up": Source(f"{_FFN}experts.gate_up_proj.{{expert}}", fold=transposed_up),
            "down": Source(f"{_FFN}experts.down_proj.{{expert}}", fold=transposed),
        },
    ),
    shared={f"shared.{x}": Source(f"{_FFN}shared_expert.{x}_proj.weight") for x in MATRICES},
    left_out=_left_out,
)

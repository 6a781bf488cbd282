"""Ling-2.0, Ring-2.0 (mini, flash, 1T): sigmoid router, choice bias, groups; partial RoPE; one matrix for q, k, v."""

from __future__ import annotations

from functools import partial
from typing import Any

from numpy.typing import NDArray

from edgemoe.config import ModelConfig
from edgemoe.convert.families.family import (
    FUSED_EXPERTS,
    NAMED_EXPERTS,
    Family,
    Source,
    choosing,
    further_layers,
)
from edgemoe.convert.families.latent import SHARED, expect
from edgemoe.convert.families.reading import attention_spec, decoder_config, num_layers
from edgemoe.convert.rope import rotated_columns
from edgemoe.convert.settings import Settings
from edgemoe.specs import AttentionSpec

__all__ = ["FAMILY"]

_BIAS = "mlp.gate.expert_bias"


def _config(settings: Settings) -> ModelConfig:
    names = settings.get("architectures")
    if names == ["BailingMoeForCausalLM"]:  # has the same model_type
        raise settings.error("architectures", "Ling-1 (BailingMoeForCausalLM) is not supported")
    expect(settings, "score_function", "sigmoid")
    for key in ("use_qk_norm", "moe_router_enable_expert_bias", "norm_topk_prob"):
        if not settings.flag(key, True):
            raise settings.error(key, "false is not supported")
    layers, dense = num_layers(settings), settings.integer("first_k_dense_replace", 0, at_least=0)
    width, first = settings.integer("moe_intermediate_size"), settings.integer("intermediate_size")
    shared = settings.integer("moe_shared_expert_intermediate_size", width)
    shared *= settings.integer("num_shared_experts", 0, at_least=0)
    head_dim = settings.integer("head_dim", 128)
    attention = attention_spec(
        settings,
        head_dim=head_dim,
        # Ling-1T gives the number of rotated columns, mini and flash their share.
        rotated=settings.integer("rotary_dim", rotated_columns(settings, head_dim)),
        qkv_bias=settings.flag("use_qkv_bias", False),
        o_bias=settings.flag("use_bias", False),
        qk_norm="head",
    )
    return decoder_config(
        settings,
        family="bailing_moe",
        mixers=attention,
        num_experts=settings.integer("num_experts"),
        expert_hidden=width,
        moe_layers=tuple(range(dense, layers)),
        scoring="sigmoid",
        choice_bias=True,
        renormalise=True,
        gate_scale=settings.positive("routed_scaling_factor", 1.0),
        groups=settings.integer("n_group", 1),
        used_groups=settings.integer("topk_group", 1),
        group_score="top2",
        shared_hidden=tuple(first if i < dense else shared for i in range(layers)),
    )


def _rows(index: int, values: NDArray[Any], spec: AttentionSpec) -> NDArray[Any]:
    """Returns the rows of the queries (index 0), keys (1) or values (2) of a joint matrix or bias."""
    counts = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    start = sum(counts[:index]) * spec.head_dim
    return values[start : start + counts[index] * spec.head_dim]


def _all_rows(shape: tuple[int, ...], spec: AttentionSpec) -> tuple[int, ...]:
    return (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim, *shape[1:]


_P = "attention."

FAMILY = Family(
    config=_config,
    model={"embed": Source("word_embeddings.weight", other="embed_tokens.weight")},
    layer={
        **{
            name + ours: Source(
                f"{_P}query_key_value.{theirs}", fold=partial(_rows, i), moved=_all_rows
            )
            for i, name in enumerate("qkv")
            for ours, theirs in (("", "weight"), ("_bias", "bias"))
        },
        "q_norm": Source(_P + "query_layernorm.weight"),
        "k_norm": Source(_P + "key_layernorm.weight"),
        "o": Source(_P + "dense.weight"),
        "o_bias": Source(_P + "dense.bias"),
    },
    experts=(choosing(NAMED_EXPERTS, _BIAS), choosing(FUSED_EXPERTS, _BIAS)),
    shared=SHARED,
    left_out=further_layers,
)

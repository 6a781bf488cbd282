"""LFM2-MoE and LFM2.5: short convolutions between layers of attention, sigmoid router with a choice bias."""

from __future__ import annotations

from edgemoe.config import ModelConfig
from edgemoe.convert.families.family import Family, Source
from edgemoe.convert.families.reading import attention_spec, by_type, decoder_config, num_layers
from edgemoe.convert.settings import Settings
from edgemoe.specs import ConvSpec

__all__ = ["FAMILY"]


def _config(settings: Settings) -> ModelConfig:
    if settings.flag("conv_bias", False):
        raise settings.error("conv_bias", "true is not supported")
    layers, eps = num_layers(settings), settings.number("norm_eps")
    dense = settings.integer("num_dense_layers", 2, at_least=0)
    width = settings.integer("intermediate_size") if dense else 0
    conv = ConvSpec(width=settings.integer("hidden_size"), taps=settings.integer("conv_L_cache", 3))
    attention = attention_spec(settings, norm_eps=eps, qk_norm="head")
    return decoder_config(
        settings,
        family="lfm2_moe",
        mixers=by_type(settings, {"conv": conv, "full_attention": attention}),
        norm_eps=eps,
        tied=settings.flag("tie_embedding", settings.flag("tie_word_embeddings", True)),
        expert_hidden=settings.integer("moe_intermediate_size"),
        moe_layers=tuple(range(dense, layers)),
        scoring="sigmoid",
        choice_bias=settings.flag("use_expert_bias", True),
        renormalise=settings.flag("norm_topk_prob", True),
        gate_scale=settings.positive("routed_scaling_factor", 1.0),
        shared_hidden=tuple(width if i < dense else 0 for i in range(layers)),
    )


def _third(x: int) -> Source:
    """Returns the source of one of the three projections that are stored as one: b (0), c (1) or u (2)."""
    return Source(
        "conv.in_proj.weight",
        fold=lambda w, spec: w.reshape(3, -1, w.shape[1])[x],
        moved=lambda shape, spec: (3 * shape[0], shape[1]),
    )


_ROUTER = {
    "router": Source("feed_forward.gate.weight"),
    "choice_bias": Source("feed_forward.expert_bias"),
}
_W = {"gate": "w1", "up": "w3", "down": "w2"}

FAMILY = Family(
    config=_config,
    default_theta=1e6,
    model={"norm": Source("embedding_norm.weight")},
    layer={
        "attn_norm": Source("operator_norm.weight"),
        "ffn_norm": Source("ffn_norm.weight"),
        "o": Source("self_attn.out_proj.weight"),
        "q_norm": Source("self_attn.q_layernorm.weight"),
        "k_norm": Source("self_attn.k_layernorm.weight"),
        **{f"shared.{x}": Source(f"feed_forward.{w}.weight") for x, w in _W.items()},
    },
    mixers={
        "conv": {
            "b": _third(0), "c": _third(1), "u": _third(2),
            "o": Source("conv.out_proj.weight"),
            "conv": Source(
                "conv.conv.weight", fold=lambda w, spec: w.T,
                moved=lambda shape, spec: (shape[1], 1, shape[0]),
            ),
        }
    },
    experts=(
        {
            **_ROUTER,
            **{x: Source(f"feed_forward.experts.{{expert}}.{w}.weight") for x, w in _W.items()},
        },
        {
            **_ROUTER,
            "gate": Source("feed_forward.experts.gate_up_proj.{expert}", half=0),
            "up": Source("feed_forward.experts.gate_up_proj.{expert}", half=1),
            "down": Source("feed_forward.experts.down_proj.{expert}"),
        },
    ),
)  # fmt: skip

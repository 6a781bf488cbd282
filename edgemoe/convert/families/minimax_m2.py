"""MiniMax-M2: sigmoid router with a choice bias, partial RoPE, RMS norm over the whole q and k projections."""

from __future__ import annotations

from edgemoe.config import ModelConfig
from edgemoe.convert.families.family import FUSED_EXPERTS, Family, Source, choosing, further_layers
from edgemoe.convert.families.reading import attention_spec, decoder_config, num_layers
from edgemoe.convert.rope import rotated_columns
from edgemoe.convert.settings import Settings
from edgemoe.errors import quoted

__all__ = ["FAMILY"]


def _config(settings: Settings) -> ModelConfig:
    head_dim = settings.integer("head_dim", 128)
    for key, known in (("scoring_func", "sigmoid"), ("qk_norm_type", "per_layer")):
        if settings.text(key, known) != known:
            raise settings.error(
                key, f"{quoted(settings.get(key))} is not supported; supported: {known}"
            )
    for key in ("use_qk_norm", "use_routing_bias"):
        if not settings.flag(key, True):
            raise settings.error(key, "false is not supported")
    attention = attention_spec(
        settings,
        head_dim=head_dim,
        rotated=settings.integer("rotary_dim", rotated_columns(settings, head_dim)),
        qk_norm="full",
    )
    return decoder_config(
        settings,
        family="minimax_m2",
        mixers=attention,
        expert_hidden=settings.integer("intermediate_size"),
        moe_layers=tuple(range(num_layers(settings))),
        scoring="sigmoid",
        choice_bias=True,
        renormalise=True,
    )


_NAMED = {
    "router": Source("block_sparse_moe.gate.weight"),
    "gate": Source("block_sparse_moe.experts.{expert}.w1.weight"),
    "up": Source("block_sparse_moe.experts.{expert}.w3.weight"),
    "down": Source("block_sparse_moe.experts.{expert}.w2.weight"),
}

FAMILY = Family(
    config=_config,
    default_theta=5_000_000.0,
    experts=(
        choosing(_NAMED, "block_sparse_moe.e_score_correction_bias"),
        choosing(FUSED_EXPERTS, "mlp.e_score_correction_bias"),
    ),
    left_out=further_layers,
)

"""Nemotron-3-Nano: Mamba-2, attention without positions, experts without w_gate; mixers and FFNs stored as layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgemoe.config import ModelConfig
from edgemoe.convert.families.family import Family, Source
from edgemoe.convert.families.granitemoehybrid import mamba_sources
from edgemoe.convert.families.reading import attention_spec, decoder_config
from edgemoe.convert.settings import Settings
from edgemoe.errors import quoted
from edgemoe.specs import MambaSpec, MixerSpec

__all__ = ["FAMILY"]

_PATTERN = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
_ALSO = {"linear_attention": "mamba", "full_attention": "attention"}
_MOST_LAYERS = 4096


def _config(settings: Settings) -> ModelConfig:
    for key in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias"):
        if settings.flag(key, False):
            raise settings.error(key, "true is not supported")
    for key, known in (("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu")):
        if settings.text(key, known) != known:
            raise settings.error(
                key, f"{quoted(settings.get(key))} is not supported; supported: {known}"
            )
    if settings.get("moe_latent_size") is not None:
        raise settings.error("moe_latent_size", "experts of a latent are not supported")
    eps = settings.number("layer_norm_epsilon", 1e-5)
    attention = attention_spec(settings, head_dim=settings.integer("head_dim", 128), norm_eps=eps)
    kinds: Mapping[str, MixerSpec] = {
        "mamba": _mamba(settings, eps),
        "attention": replace(attention, rope=None),
    }
    pairs = _pairs(settings)
    shared = settings.integer("moe_shared_expert_intermediate_size") * settings.integer(
        "n_shared_experts", 1, at_least=0
    )
    dense = settings.integer("intermediate_size", 0, at_least=0)
    widths = {"moe": shared, "mlp": dense, "": 0}
    return decoder_config(
        settings,
        family="nemotron_h",
        num_layers=len(pairs),
        mixers=[kinds[mixer] for mixer, _ in pairs],
        norm_eps=eps,
        num_experts=settings.integer("n_routed_experts"),
        expert_hidden=settings.integer("moe_intermediate_size"),
        moe_layers=tuple(i for i, (_, ffn) in enumerate(pairs) if ffn == "moe"),
        scoring="sigmoid",
        choice_bias=True,
        renormalise=settings.flag("norm_topk_prob", True),
        gate_scale=settings.positive("routed_scaling_factor", 1.0),
        groups=settings.integer("n_group", 1),
        used_groups=settings.integer("topk_group", 1),
        group_score="top2",
        activation="relu2",
        shared_hidden=tuple(widths[ffn] for _, ffn in pairs),
    )


def _mamba(settings: Settings, eps: float) -> MambaSpec:
    return MambaSpec(
        num_heads=settings.integer("mamba_num_heads"),
        head_dim=settings.integer("mamba_head_dim"),
        groups=settings.integer("n_groups"),
        state_dim=settings.integer("ssm_state_size"),
        taps=settings.integer("conv_kernel", 4),
        norm_eps=eps,
        conv_bias=settings.flag("use_conv_bias", True),
    )


def _pairs(settings: Settings) -> list[tuple[str, str]]:
    """Returns for each layer of ours its mixer and its FFN, "" for none; each of them is stored as a layer."""
    pairs: list[tuple[str, str]] = []
    for kind in _kinds(settings):
        if kind in ("mamba", "attention"):
            pairs.append((kind, ""))
        elif pairs and not pairs[-1][1]:
            pairs[-1] = (pairs[-1][0], kind)
        else:
            raise settings.error(
                "layers_block_type", f"{kind} that follows no mixer is not supported"
            )
    return pairs


def _kinds(settings: Settings) -> Sequence[str]:
    pattern = settings.get("hybrid_override_pattern")
    key = "layers_block_type" if settings.get("layers_block_type") is not None else "layer_types"
    kinds = settings.get(key)
    if kinds is None and isinstance(pattern, str):
        key, kinds = "hybrid_override_pattern", [_PATTERN.get(c, c) for c in pattern]
    if not isinstance(kinds, list) or not 0 < len(kinds) <= _MOST_LAYERS:
        raise settings.error(key, f"expected a list of kinds of layers, got {quoted(kinds)}")
    kinds = [_ALSO.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    for kind in kinds:
        if kind not in _PATTERN.values():
            raise settings.error(key, f"{quoted(kind)} is not supported")
    return kinds


_ROUTER = {
    "router": Source("mixer.gate.weight"),
    "choice_bias": Source("mixer.gate.e_score_correction_bias"),
}

FAMILY = Family(
    config=_config,
    roots=("backbone.", "model."),
    apart=True,
    model={"embed": Source("embeddings.weight"), "norm": Source("norm_f.weight")},
    layer={
        "attn_norm": Source("norm.weight"),
        "ffn_norm": Source("norm.weight"),
        **{x: Source(f"mixer.{x}_proj.weight") for x in "qkvo"},
        **{f"shared.{x}": Source(f"mixer.{x}_proj.weight") for x in ("up", "down")},
    },
    mixers={"mamba": mamba_sources("mixer")},
    shared={f"shared.{x}": Source(f"mixer.shared_experts.{x}_proj.weight") for x in ("up", "down")},
    experts=(
        {
            **_ROUTER,
            **{x: Source(f"mixer.experts.{{expert}}.{x}_proj.weight") for x in ("up", "down")},
        },
        {**_ROUTER, **{x: Source(f"mixer.experts.{x}_proj.{{expert}}") for x in ("up", "down")}},
    ),
    left_out=lambda config, name: (
        "layers that predict several tokens" if name.startswith("mtp.") else ""
    ),
)

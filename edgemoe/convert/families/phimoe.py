"""Phi-3.5-MoE: SparseMixer, LayerNorm and biases everywhere; its LayerNorms become RMS norms, see `centred`.

transformers 5 uses LongRoPE's short factors for sequences of all lengths. Here sequences beyond the original length
have the long factors, as in the released code.
"""

from __future__ import annotations

from edgemoe.config import ModelConfig
from edgemoe.convert.checkpoint import Checkpoint
from edgemoe.convert.families.centred import Biases, Centred
from edgemoe.convert.families.family import Family, Source
from edgemoe.convert.families.reading import attention_spec, decoder_config, num_layers, window
from edgemoe.convert.settings import Settings
from edgemoe.specs import RopeSpec

__all__ = ["FAMILY"]

_JITTER = 0.01
_MOE = "block_sparse_moe."


def _config(settings: Settings) -> ModelConfig:
    if (found := settings.number("router_jitter_noise", _JITTER)) != _JITTER:
        raise settings.error(
            "router_jitter_noise", f"expected {_JITTER:g} for this family, got {found:g}"
        )
    if (chosen := settings.integer("num_experts_per_tok", 2)) != 2:
        raise settings.error("num_experts_per_tok", f"expected 2 for this family, got {chosen}")
    if settings.flag("tie_word_embeddings", False):
        raise settings.error("tie_word_embeddings", "true is not supported for this family")
    bias = settings.flag("attention_bias", False)
    return decoder_config(
        settings,
        family="phimoe",
        mixers=attention_spec(settings, window=window(settings), qkv_bias=True, o_bias=bias),
        expert_hidden=settings.integer("intermediate_size"),
        experts_per_token=chosen,
        moe_layers=tuple(range(num_layers(settings))),
        scoring="sparsemixer",
        router_bias=True,
        expert_bias=True,
        head_bias=True,
    )


def _rope(settings: Settings, spec: RopeSpec) -> Settings:
    """Returns the settings with the factor of cos and sin under the key that `rope` reads."""
    key = "rope_scaling" if settings.section("rope_scaling") else "rope_parameters"
    parameters = settings.section(key)
    if parameters is None or parameters.get("long_mscale") is None:
        return settings
    short, long = (parameters.positive(f"{x}_mscale") for x in ("short", "long"))
    if short != long:
        raise parameters.error("long_mscale", f"expected {short:g}, as short_mscale, got {long:g}")
    return settings.replaced(**{key: {**settings.get(key), "attention_factor": short}})


def _view(checkpoint: Checkpoint, config: ModelConfig) -> Centred:
    stored, biases = checkpoint.shapes, {}
    writers: list[str] = []
    zeros: dict[str, tuple[int, ...]] = {}
    experts = range(config.num_experts)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        before, between = (f"{layer}{n}_layernorm.bias" for n in ("input", "post_attention"))
        for x in "qkv":
            place = f"{layer}self_attn.{x}_proj."
            own = f"{place}bias" if config.mixers[0].o_bias else ""  # type: ignore[attr-defined]
            biases[f"{place}bias"] = Biases(before, [f"{place}weight"], own, stacked=False)
        moe = layer + _MOE
        biases[f"{moe}gate.bias"] = Biases(between, [f"{moe}gate.weight"], stacked=False)
        for name, matrix in (("gate", "w1"), ("up", "w3")):
            matrices = [f"{moe}experts.{e}.{matrix}.weight" for e in experts]
            biases[f"{moe}experts.{name}_bias"] = Biases(between, matrices, stacked=True)
        zeros[f"{moe}experts.down_bias"] = (config.num_experts, config.hidden_size)
        writers += [f"{layer}self_attn.o_proj.{kind}" for kind in ("weight", "bias")]
        writers += [f"{moe}experts.{e}.w2.weight" for e in experts]
    head = "lm_head.bias" if "lm_head.bias" in stored else ""
    biases["lm_head.bias"] = Biases("model.norm.bias", ["lm_head.weight"], head, stacked=False)
    return Centred(
        checkpoint, embed="model.embed_tokens.weight", writers=writers, biases=biases, zeros=zeros
    )


FAMILY = Family(
    config=_config,
    default_theta=1_000_000.0,
    rope=_rope,
    view=_view,
    experts=(
        {
            "router": Source(f"{_MOE}gate.weight"),
            "router_bias": Source(f"{_MOE}gate.bias"),
            "gate": Source(f"{_MOE}experts.{{expert}}.w1.weight"),
            "up": Source(f"{_MOE}experts.{{expert}}.w3.weight"),
            "down": Source(f"{_MOE}experts.{{expert}}.w2.weight"),
            "expert_bias.gate": Source(f"{_MOE}experts.gate_bias"),
            "expert_bias.up": Source(f"{_MOE}experts.up_bias"),
            "expert_bias.down": Source(f"{_MOE}experts.down_bias"),
        },
    ),
)

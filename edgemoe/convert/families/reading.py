"""The parts of config.json that families read alike: the decoder's fields, attention, and the kinds of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgemoe.config import ModelConfig
from edgemoe.convert.rope import check_rotated
from edgemoe.convert.settings import Settings
from edgemoe.errors import quoted
from edgemoe.specs import AttentionSpec, MixerSpec, RopeSpec

__all__ = [
    "attention_spec",
    "by_layer",
    "by_type",
    "decoder_config",
    "layer_types",
    "num_layers",
    "sparse_layers",
    "table_of",
    "window",
]

_MAX_LAYERS = 4096


def decoder_config(
    settings: Settings,
    *,
    family: str,
    mixers: Sequence[MixerSpec] | MixerSpec,
    **switches: Any,
) -> ModelConfig:
    """Returns a config with the fields that all families share filled in.

    `SourceModel` later sets the fields that depend on RoPE, `context_length` among them, and `eos_ids`.

    Args:
        mixers: the mixer of each layer, or one for all.
        switches: the other fields of `ModelConfig`.

    Raises:
        FormatError: a key is missing, wrong, or asks for what the runtime cannot do.
    """
    if "activation" not in switches:
        activation = settings.text("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise settings.error(
                "hidden_act", f"{quoted(activation)} is not supported; supported: silu"
            )
    hidden_size = settings.integer("hidden_size")
    count = switches.get("num_layers") or num_layers(settings)
    layers = [mixers] * count if isinstance(mixers, MixerSpec) else list(mixers)
    distinct = list(dict.fromkeys(layers))
    fields: dict[str, Any] = {
        "family": family,
        "vocab_size": settings.integer("vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": count,
        "mixers": tuple(distinct),
        "layer_mixers": tuple(map(distinct.index, layers)),
        "context_length": settings.integer("max_position_embeddings"),
        "tied": settings.flag("tie_word_embeddings", False),
    }
    if "num_experts" not in switches:
        # Qwen3-MoE has num_local_experts in files of transformers 5, and num_experts in earlier ones.
        local = "num_experts" if settings.get("num_local_experts") is None else "num_local_experts"
        fields["num_experts"] = settings.integer(local)
    if "norm_eps" not in switches:
        fields["norm_eps"] = settings.number("rms_norm_eps")
    if "experts_per_token" not in switches:
        fields["experts_per_token"] = settings.integer("num_experts_per_tok")
    return ModelConfig(**{**fields, **switches})


def attention_spec(
    settings: Settings, *, rope: str = "rope", rotated: int | None = None, **switches: Any
) -> AttentionSpec:
    """Returns an attention spec with the fields that most families share filled in.

    Args:
        rope: the name of the RoPE table.
        rotated: leading columns of each head that RoPE rotates; None for all.
        switches: the other fields of `AttentionSpec`.

    Raises:
        FormatError: a key is missing, wrong, or asks for what the runtime cannot do.
    """
    num_heads = settings.integer("num_attention_heads")
    head_dim = switches.get("head_dim") or settings.integer(
        "head_dim", settings.integer("hidden_size") // num_heads
    )
    dim = head_dim if rotated is None else rotated
    check_rotated(settings, head_dim, dim)
    fields: dict[str, Any] = {
        "num_heads": num_heads,
        "num_kv_heads": settings.integer("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
        "rope": RopeSpec(name=rope, dim=dim),
    }
    if "norm_eps" not in switches:
        fields["norm_eps"] = settings.number("rms_norm_eps")
    return AttentionSpec(**{**fields, **switches})


def by_layer(windows: Sequence[int], spec: AttentionSpec) -> list[AttentionSpec]:
    """Returns the attention of every layer, which differ only in their windows."""
    return [replace(spec, window=width) for width in windows]


def by_type(settings: Settings, kinds: Mapping[str, MixerSpec]) -> list[MixerSpec]:
    """Returns the mixer of every layer, by the names in `layer_types`."""
    count, types = num_layers(settings), settings.get("layer_types")
    if not isinstance(types, list) or len(types) != count:
        raise settings.error(
            "layer_types", f"expected a list of {count} names, got {quoted(types)}"
        )
    for name in types:
        if not isinstance(name, str) or name not in kinds:
            raise settings.error("layer_types", f"{quoted(name)} is not supported")
    return [kinds[name] for name in types]


def num_layers(settings: Settings) -> int:
    """Returns the number of layers, which is bounded so that a wrong number costs no time or memory."""
    count = settings.integer("num_hidden_layers")
    if count > _MAX_LAYERS:
        raise settings.error("num_hidden_layers", f"at most {_MAX_LAYERS} are supported: {count}")
    return count


def sparse_layers(settings: Settings) -> tuple[int, ...]:
    """Returns the layers with routed experts, by the rules of the Qwen families."""
    step = settings.integer("decoder_sparse_step", 1)
    dense = settings.integers("mlp_only_layers")
    return tuple(i for i in range(num_layers(settings)) if i not in dense and (i + 1) % step == 0)


def layer_types(settings: Settings, *names: str) -> tuple[str, ...] | None:
    """Returns the kind of every layer, each one of `names`; None if config.json does not list them.

    Raises:
        FormatError: the list has another length, or a kind that is not in `names`.
    """
    types, layers = settings.get("layer_types"), num_layers(settings)
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != layers:
        raise settings.error(
            "layer_types", f"expected a list of {layers} names, got {quoted(types)}"
        )
    unknown = [t for t in types if t not in names]
    if unknown:
        raise settings.error("layer_types", f"{quoted(unknown[0])} is not supported")
    return tuple(types)


def table_of(settings: Settings, kind: str, default: Mapping[str, Any]) -> Settings:
    """Returns config.json with the `rope_parameters` of one kind of layers at the top level; see `Family.rope`.

    Args:
        kind: the kind of layers, a section of `rope_parameters`.
        default: the parameters if config.json has no `rope_parameters`.
    """
    tables = settings.section("rope_parameters")
    own = default if tables is None else tables.get(kind)
    return settings.replaced(rope_parameters=own, rope_scaling=None)


def window(settings: Settings) -> int:
    """Returns the sliding window of config.json in tokens; 0 for none."""
    return settings.integer("sliding_window", 0, at_least=0)

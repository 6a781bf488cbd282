"""What families read of a config.json alike: the decoder's fields, attention, and what each layer is."""

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
    """Fills in what all families share.

    What RoPE decides, `context_length` too, and `eos_ids` are left to whoever opens the checkpoint.

    Args:
        mixers: of each layer, or the one of all.
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
        # Qwen3-MoE says num_local_experts on disk since transformers 5, and num_experts before.
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
    """Fills in what attention of most families shares.

    Args:
        rope: the table by which positions turn queries and keys.
        rotated: leading columns of each head that it turns; None for all.
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
    """Returns attention of every layer, which differs by its window alone."""
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
    """Returns the number of layers, bounded so that a wrong one costs no time or memory."""
    count = settings.integer("num_hidden_layers")
    if count > _MAX_LAYERS:
        raise settings.error("num_hidden_layers", f"at most {_MAX_LAYERS} are supported: {count}")
    return count


def sparse_layers(settings: Settings) -> tuple[int, ...]:
    """Returns the layers with routed experts of the Qwen families."""
    step = settings.integer("decoder_sparse_step", 1)
    dense = settings.integers("mlp_only_layers")
    return tuple(i for i in range(num_layers(settings)) if i not in dense and (i + 1) % step == 0)


def layer_types(settings: Settings, *names: str) -> tuple[str, ...] | None:
    """Returns the name of every layer's kind, each of which is one of `names`; None where config.json has none.

    Raises:
        FormatError: there are more or fewer, or another one.
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
    """Returns config.json with the `rope_parameters` of one kind of layers, a section of them; see `Family.rope`.

    Args:
        default: what they are where config.json has none.
    """
    tables = settings.section("rope_parameters")
    own = default if tables is None else tables.get(kind)
    return settings.replaced(rope_parameters=own, rope_scaling=None)


def window(settings: Settings) -> int:
    """Returns the sliding window of config.json, 0 for none."""
    return settings.integer("sliding_window", 0, at_least=0)

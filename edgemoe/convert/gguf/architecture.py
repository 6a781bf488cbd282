"""Architectures of GGUF files: how their names and metadata map to those of a Hugging Face checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.gguf.meta import Meta
from edgemoe.convert.gguf.rope import rope_scaling

__all__ = [
    "ATTENTION",
    "ATTENTION_POST",
    "DENSE_FFN",
    "HALVES",
    "NAMED_EXPERTS",
    "QK_NORM",
    "Architecture",
    "Array",
    "Made",
    "dense_layers",
    "flat",
    "joined",
    "log_rate",
    "one",
    "settings",
]

Array: TypeAlias = NDArray[np.float32]
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that is computed from stored tensors, rather than only renamed."""

    of: tuple[str, ...]
    """Names of the stored tensors within a block, with endings; of stacks of experts, one matrix of each is taken."""
    make: Callable[[Mapping[str, Any], Sequence[Array]], Array]
    """Computes the tensor from config.json and the stored values."""
    shape: Callable[[Mapping[str, Any], Sequence[Shape]], Shape]
    """Computes its shape from config.json and the stored shapes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A mapping of one architecture of GGUF files to Hugging Face checkpoints. Immutable."""

    model_type: str
    """The model_type of config.json, unless `config` returns another one."""
    others: tuple[str, ...] = ()
    """The other model_types that `config` may return."""
    config: Callable[[Meta], dict[str, Any]]
    """Returns config.json without the common keys, which `settings` adds; raises FormatError for unknown values."""
    layer: Mapping[str, str]
    """Names within a block, and the corresponding names within `model.layers.I.`.

    Names with an ending (`.weight`, `.bias`) are complete; names without one apply to all endings. `{expert}` marks
    a tensor that is a stack with one matrix for each expert.
    """
    made: Mapping[str, Made] = field(default_factory=dict)
    """Tensors that must be computed, by their names within `model.layers.I.`."""
    halves: Mapping[str, str] = field(default_factory=dict)
    """Names within a block, without ending, of q and k whose rows llama.cpp has reordered to adjacent RoPE pairs, where
    the checkpoint has them half a head apart; and the key of config.json that has their number of heads."""
    whole: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors outside the blocks that do not have their usual names in the checkpoint."""
    made_whole: Mapping[str, Made] = field(default_factory=dict)
    """Tensors outside the blocks that must be computed, by their names in the checkpoint."""
    rope: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `rope_scaling` that the file does not give."""
    prefix: str = "model.layers."
    """The prefix of the names of a layer's tensors, before its number."""

    @property
    def makes(self) -> frozenset[str]:
        """Every model_type that files of the architecture may have."""
        return frozenset((self.model_type, *self.others))


ATTENTION: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
"""The usual names of a block's norms and attention."""

ATTENTION_POST: Mapping[str, str] = {
    ("post_attention_norm" if name == "ffn_norm" else name): ours
    for name, ours in ATTENTION.items()
}
"""The same for architectures that name the norm before the FFN after the attention that precedes it."""

QK_NORM: Mapping[str, str] = {f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"}

DENSE_FFN: Mapping[str, str] = {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}

NAMED_EXPERTS: Mapping[str, str] = {
    "ffn_gate_inp": "mlp.gate",
    **{
        f"ffn_{x}_exps.weight": f"mlp.experts.{{expert}}.{x}_proj.weight"
        for x in ("gate", "up", "down")
    },
}

HALVES: Mapping[str, str] = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def joined(*of: str) -> Made:
    """Returns a tensor that concatenates the rows of several matrices."""
    return Made(
        of,
        lambda config, values: np.concatenate(values),
        lambda config, shapes: (sum(shape[0] for shape in shapes), *shapes[0][1:]),
    )


def one(name: str, make: Callable[[Mapping[str, Any], Array], Array]) -> Made:
    """Returns a tensor that changes the values of a stored one but not its shape."""
    return Made(
        (name,), lambda config, values: make(config, values[0]), lambda config, shapes: shapes[0]
    )


def flat(name: str, change: Callable[[Array], Array] = lambda x: x) -> Made:
    """Returns a tensor that is a stored one flattened, with its values changed."""
    return Made(
        (name,),
        lambda config, values: change(values[0]).reshape(-1),
        lambda config, shapes: (math.prod(shapes[0]),),
    )


def log_rate(x: Array, sign: float = -1.0) -> Array:
    """Returns A_log from a file's `sign` * exp(A_log)."""
    with np.errstate(all="ignore"):  # NaN stays NaN, which the users of tensors check for
        return np.log(sign * x.astype(np.float64)).astype(np.float32)


def dense_layers(meta: Meta) -> list[int]:
    """Returns the layers without routed experts."""
    sparse = set(meta.layers_with("ffn_gate_inp.weight"))
    return [i for i in range(meta.layers) if i not in sparse]


def settings(meta: Meta) -> dict[str, Any]:
    """Returns the keys of config.json that all families share, without special tokens."""
    embedding = meta.shapes.get("token_embd.weight")
    if embedding is None:
        raise meta.missing("token_embd.weight")
    hidden, heads = meta.whole("embedding_length"), meta.most("attention.head_count")
    head_dim = meta.whole("attention.key_length", hidden // heads)
    latent = meta.get("attention.kv_lora_rank") is not None  # keys are then wider than values
    if not latent and meta.whole("attention.value_length", head_dim) != head_dim:
        raise meta.error(
            "attention.value_length",
            f"must be the head's {head_dim}, got {meta.get('attention.value_length')}",
        )
    names = meta.shapes
    out: dict[str, Any] = {
        "vocab_size": embedding[0],
        "hidden_size": hidden,
        "num_hidden_layers": meta.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": meta.most("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": meta.whole("context_length"),
        "rms_norm_eps": meta.positive(
            "attention.layer_norm_rms_epsilon", meta.get("attention.layer_norm_epsilon")
        ),
        "rope_theta": meta.positive("rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(meta),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
    }
    if meta.get("expert_count"):
        out |= {
            "num_experts": meta.whole("expert_count"),
            "num_experts_per_tok": meta.whole("expert_used_count"),
            "moe_intermediate_size": meta.rows("ffn_down_exps.weight", columns=True),
        }
    if meta.get("feed_forward_length"):
        out["intermediate_size"] = meta.most("feed_forward_length")
    return out

"""Causal attention over keys and values, and its rotary position embedding (RoPE)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from edgemoe.errors import quoted
from edgemoe.specs.mixer import LIMIT, MixerSpec, need, need_numbers, need_sizes
from edgemoe.specs.tensor import TensorSpec

__all__ = ["AttentionSpec", "RopeSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """How positions rotate queries and keys. Layers with equal specs share the computed rotations."""

    name: str = "rope"
    """The name of the tensor with its frequencies; it begins with "rope"."""
    dim: int
    """How many leading columns of each head are rotated. Column i is paired with column i + dim / 2."""
    scale: float = 1.0
    """Multiplies cos and sin (YaRN's attention factor)."""
    short_length: int = 0
    """Sequences of up to so many tokens use the frequencies of the tensor `NAME_short` (LongRoPE); 0: there is none."""

    def __post_init__(self) -> None:
        need(
            type(self.name) is str and self.name.startswith("rope") and self.name.isidentifier(),
            f"a table of RoPE has the name {quoted(self.name)}",
        )
        need_sizes(self, "dim")
        need(self.dim % 2 == 0, f"columns that are rotated must be even, got {self.dim}")
        need_numbers(self, "scale")
        need_sizes(self, "short_length", least=0)

    def frequencies(self, length: int) -> str:
        """Returns the name of the frequency tensor for a sequence of `length` tokens, which applies to all of them."""
        is_short = self.short_length and length <= self.short_length
        return f"{self.name}_short" if is_short else self.name

    def tensors(self) -> dict[str, TensorSpec]:
        """Returns its frequency tensors, [dim / 2], by their names in the file."""
        lengths = (self.short_length + 1, *([1] if self.short_length else []))
        return {self.frequencies(n): TensorSpec.f32(self.dim // 2) for n in lengths}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec(MixerSpec):
    """Causal multi-head attention, also with fewer heads for keys and values (grouped-query attention)."""

    kind: ClassVar[str] = "attention"

    num_heads: int
    """The number of query heads, a multiple of `num_kv_heads`."""
    num_kv_heads: int
    """The number of heads of keys and values."""
    head_dim: int
    """Columns of each head."""
    scale: float
    """Multiplies q · k."""
    rope: RopeSpec | None
    """None: queries and keys are not rotated (NoPE)."""
    window: int = 0
    """A token sees so many positions, its own included; 0 for all."""
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["none", "head", "unit", "full"] = "none"
    """The RMS norm of q and k: "head" is per head with a weight [head_dim], "unit" per head without a weight, "full"
    over the whole projection."""
    norm_eps: float = 1e-6
    """The epsilon of that norm and of `v_norm`."""
    norm_after_rope: bool = False
    """Whether q and k are normed after their rotation instead of before (for qk_norm "head" and "unit")."""
    clip: float | None = None
    """If given, q, k and v are clamped to ±clip after the norm and before RoPE."""
    gate: Literal["none", "sigmoid", "sigmoid_head", "softplus_head"] = "none"
    """The heads' outputs are multiplied by this function of a projection of the input.

    "sigmoid" has a gate for each element, "sigmoid_head" and "softplus_head" have one for each head."""
    sinks: bool = False
    """Whether each head has an attention sink: a learned logit in its softmax whose value is zero."""
    shared_kv: bool = False
    """Whether values are the projection of the keys, before norm and rotation; there is no matrix `v` then."""
    v_norm: bool = False
    """Whether values are normed per head, without a weight."""

    chunk: int = 0
    """A token sees only positions in its own chunk of so many; the first chunk begins at position 0. 0 for all."""
    growth: float = 0.0
    """Finally, queries at position p are multiplied by 1 + growth * log(1 + floor((p + 1) / grow_every))."""
    grow_every: int = 0
    """In positions; see `growth`."""

    def __post_init__(self) -> None:
        need_sizes(self, "num_heads", "num_kv_heads", "head_dim")
        need_sizes(self, "window", "chunk", "grow_every", least=0)
        if self.growth:
            need_numbers(self, "growth")
            need_sizes(self, "grow_every")
        need_numbers(self, "scale", "norm_eps")
        need(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        need(
            self.q_width < LIMIT,
            f"{self.num_heads} heads of {self.head_dim} are too many",
        )
        need(self.head_dim % 2 == 0, f"head_dim must be even, got {self.head_dim}")
        need(
            self.rope is None or self.rope.dim <= self.head_dim,
            f"heads of {self.head_dim} columns have none to rotate beyond these",
        )
        need(
            self.qk_norm in ("none", "head", "unit", "full"),
            f"unknown qk_norm {quoted(self.qk_norm)}",
        )
        need(
            self.qk_norm in ("head", "unit") or not self.norm_after_rope,
            "norm_after_rope needs qk_norm head or unit",
        )
        need(
            self.clip is None or (math.isfinite(self.clip) and self.clip > 0),
            f"clip must be positive, got {quoted(self.clip)}",
        )
        need(
            not (self.shared_kv and self.qkv_bias),
            "values that are the projection of the keys have no biases",
        )
        need(
            self.gate in ("none", "sigmoid", "sigmoid_head", "softplus_head"),
            f"unknown gate {quoted(self.gate)}",
        )

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """See `MixerSpec.ropes`."""
        return () if self.rope is None else (self.rope,)

    @property
    def heads(self) -> tuple[int, int]:
        """See `MixerSpec.heads`."""
        return self.num_heads, self.head_dim

    @property
    def cached_heads(self) -> tuple[int, int]:
        """See `MixerSpec.cached_heads`."""
        return self.num_kv_heads, self.head_dim

    @property
    def state_pieces(self) -> int:
        """See `MixerSpec.state_pieces`: the keys and the values of each head."""
        return 2 * self.num_kv_heads

    @property
    def rope_dim(self) -> int:
        """Leading columns of each head that are rotated, 0 for none."""
        return 0 if self.rope is None else self.rope.dim

    @property
    def q_width(self) -> int:
        """Columns of the queries, and of the heads' outputs."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the keys, and of the values."""
        return self.num_kv_heads * self.head_dim

    @property
    def gate_width(self) -> int:
        """Columns of the gate, 0 for none."""
        if self.gate == "none":
            return 0
        return self.q_width if self.gate == "sigmoid" else self.num_heads

    @property
    def has_constant_keys(self) -> bool:
        """See `MixerSpec.has_constant_keys`."""
        turns = self.rope is not None
        return self.qkv_bias and self.qk_norm == "none" and self.clip is None and turns

    @property
    def inputs(self) -> tuple[str, ...]:
        """See `MixerSpec.inputs`."""
        return ("q", "k", "v", "q_gate")

    def __str__(self) -> str:
        """Returns a description for people."""
        window = f", of the last {self.window} positions" if self.window else ""
        chunk = f", in chunks of {self.chunk} positions" if self.chunk else ""
        heads = (
            f"{self.num_heads} heads of {self.head_dim} ({self.num_kv_heads} for keys and values)"
        )
        return f"attention: {heads}{window}{chunk}"

    def tensors(self, hidden_size: int) -> dict[str, TensorSpec]:
        """See `MixerSpec.tensors`."""
        f32, nested = TensorSpec.f32, TensorSpec.nested
        d, q, kv = hidden_size, self.q_width, self.kv_width
        out = {"q": nested(q, d), "k": nested(kv, d), "v": nested(kv, d), "o": nested(d, q)}
        if self.shared_kv:
            del out["v"]
        if self.sinks:
            out["sinks"] = f32(self.num_heads)
        if self.gate == "sigmoid":
            out["q_gate"] = nested(q, d)
        elif self.gate != "none":
            out["q_gate"] = f32(self.num_heads, d)
        if self.qkv_bias:
            out |= {"q_bias": f32(q), "k_bias": f32(kv), "v_bias": f32(kv)}
        if self.o_bias:
            out["o_bias"] = f32(d)
        if self.qk_norm == "head":
            out |= {"q_norm": f32(self.head_dim), "k_norm": f32(self.head_dim)}
        elif self.qk_norm == "full":
            out |= {"q_norm": f32(q), "k_norm": f32(kv)}
        return out

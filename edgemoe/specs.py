"""What a layer is made of: values that say how a mixer or an FFN computes, and which tensors it has.

A model has few distinct ones, and each layer has one of them: `ModelConfig.mixer` and `.ffn`. Whoever needs a size or a
tensor asks them, so that a further kind of layer is a further class here and its code in `edgemoe.model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["AttentionSpec", "FfnSpec", "RopeSpec", "RouterSpec", "TensorSpec"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Says how a resident tensor is stored: float32 as it is, or nested codes of a [rows, cols] matrix."""

    kind: Literal["f32", "nested"]
    shape: tuple[int, ...]

    @classmethod
    def f32(cls, *shape: int) -> TensorSpec:
        """Returns that of a float32 tensor."""
        return cls("f32", shape)

    @classmethod
    def nested(cls, rows: int, cols: int) -> TensorSpec:
        """Returns that of a matrix."""
        return cls("nested", (rows, cols))


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """How positions turn queries and keys. Layers with equal ones share the work."""

    name: str
    """The tensor of its frequencies."""
    dim: int
    """Leading columns of each head that are rotated, in halves."""
    scale: float
    """Multiplies cos and sin."""
    short_length: int
    """Sequences of up to so many tokens have frequencies of their own ("longrope"); 0 for none."""

    def frequencies(self, length: int) -> str:
        """Returns the tensor of a sequence of `length` tokens: it holds for all of them."""
        is_short = self.short_length and length <= self.short_length
        return f"{self.name}_short" if is_short else self.name

    def tensors(self) -> dict[str, TensorSpec]:
        """Returns its tensors by their names in the file."""
        lengths = (self.short_length + 1, *([1] if self.short_length else []))
        return {self.frequencies(n): TensorSpec.f32(self.dim // 2) for n in lengths}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Attention to keys and values of the tokens before."""

    num_heads: int
    """Of queries."""
    num_kv_heads: int
    head_dim: int
    scale: float
    """Multiplies q · k."""
    window: int
    """How many last positions it sees, 0 for all."""
    qkv_bias: bool
    o_bias: bool
    qk_norm: Literal["none", "head", "full"]
    norm_eps: float
    clip: float | None
    rope: RopeSpec
    norm_after_rope: bool
    """The norm of q and k comes after their rotation, and not before."""

    @property
    def rope_dim(self) -> int:
        """Leading columns of each head that are rotated."""
        return self.rope.dim

    @property
    def q_width(self) -> int:
        """Columns of the queries, and of what comes out of the heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the keys, and of the values."""
        return self.num_kv_heads * self.head_dim

    @property
    def has_constant_keys(self) -> bool:
        """Whether a bias adds the same to every key, but for its turn by the position."""
        return self.qkv_bias and self.qk_norm == "none" and self.clip is None

    def tensors(self, hidden_size: int) -> dict[str, TensorSpec]:
        """Returns its tensors by their names within a layer, in file order."""
        f32, nested = TensorSpec.f32, TensorSpec.nested
        d, q, kv = hidden_size, self.q_width, self.kv_width
        out = {"q": nested(q, d), "k": nested(kv, d), "v": nested(kv, d), "o": nested(d, q)}
        if self.qkv_bias:
            out |= {"q_bias": f32(q), "k_bias": f32(kv), "v_bias": f32(kv)}
        if self.o_bias:
            out["o_bias"] = f32(d)
        if self.qk_norm == "head":
            out |= {"q_norm": f32(self.head_dim), "k_norm": f32(self.head_dim)}
        elif self.qk_norm == "full":
            out |= {"q_norm": f32(q), "k_norm": f32(kv)}
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """How experts are chosen; the same in every layer."""

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "softmax_topk", "sigmoid"]
    renormalise: bool
    gate_scale: float
    groups: int
    used_groups: int
    group_score: Literal["max", "top2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnSpec:
    """What follows the mixer: routed experts, an FFN that every token takes, or both."""

    num_experts: int
    """That a router chooses from, 0 for no routed experts."""
    shared_width: int
    """Of the FFN that every token takes, 0 for none."""
    shared_sigmoid: bool
    """Its output is scaled by sigmoid(w · x); only beside routed experts."""
    choice_bias: bool
    """The router adds one to each expert's score, for choosing alone."""

    def tensors(self, hidden_size: int) -> dict[str, TensorSpec]:
        """Returns its tensors outside the routed experts by their names within a layer, in file order."""
        f32, nested = TensorSpec.f32, TensorSpec.nested
        d, s = hidden_size, self.shared_width
        out = {"router": f32(self.num_experts, d)} if self.num_experts else {}
        if self.choice_bias:
            out["choice_bias"] = f32(self.num_experts)
        if s:
            out |= {"shared.gate": nested(s, d), "shared.up": nested(s, d)}
            out["shared.down"] = nested(d, s)
        if s and self.shared_sigmoid:
            out["shared.sigmoid"] = f32(d)
        return out

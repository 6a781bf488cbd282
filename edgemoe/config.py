"""What a model is: the switches that the one decoder reads, and the tensors that they imply.

Families are known in `convert` only. A converter fills a `ModelConfig`; everything after it,
the file's reader included, asks the config.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgemoe.errors import FormatError, quoted
from edgemoe.specs import AttentionSpec, FfnSpec, RopeSpec, RouterSpec, TensorSpec

__all__ = ["LIMIT", "MATRICES", "MOST_EXPERTS", "MOST_LAYERS", "ModelConfig", "dense_tensors"]

MATRICES = ("gate", "up", "down")
"""The three matrices of an expert, in the order in which every rung stores them."""

LIMIT = 1 << 24
"""No dimension of a real model comes near; keeps every product inside 64 bits."""


MOST_LAYERS, MOST_EXPERTS = 1 << 12, 1 << 18
"""Of a model; the largest published one has 24,576 experts in all."""


_LATER = frozenset(
    {
        "choice_bias", "gate_scale", "groups", "used_groups", "group_score", "norm_after_rope", "rope_dim",
        "rope_short_length",
    }
)  # fmt: skip
"""Fields that files of the first families do not have, which older versions can still read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Describes one decoder-only Mixture-of-Experts model.

    Shape letters: D hidden_size, H expert_hidden, S shared_hidden, E num_experts, K experts_per_token,
    V vocab_size, L num_layers.
    """

    family: str
    """Where the weights came from, for messages only ("qwen2_moe")."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    """Positions that the model was made for, its position scaling included."""
    norm_eps: float
    tied: bool
    """The head is the embedding."""
    num_experts: int
    experts_per_token: int
    expert_hidden: int
    moe_layers: tuple[int, ...]
    """Layers with routed experts, ascending."""
    scoring: Literal["softmax", "softmax_topk", "sigmoid"] = "softmax"
    """softmax: over all experts, then the top k. softmax_topk: over the logits of the top k. sigmoid: of each logit."""
    renormalise: bool = False
    """Divide the gates of the chosen experts by their sum (not for scoring "softmax_topk", whose sum is 1)."""
    choice_bias: bool = False
    """Experts are chosen by their score plus a bias, the tensor `choice_bias`; gates are the scores without it."""
    gate_scale: float = 1.0
    """Multiplies the gates at last."""
    groups: int = 1
    """Of as many experts each, one after the other; experts are chosen from the best `used_groups` of them."""
    used_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    """A group is as good as its best expert, or as the sum of its best two."""
    shared_hidden: tuple[int, ...] = ()
    """Per layer, the width of the FFN that every token takes; 0 for none; empty for all 0."""
    shared_sigmoid: bool = False
    """In MoE layers the shared FFN's output is scaled by sigmoid(w · x)."""
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMS norm of q and k: per head (weight [head_dim]) or over the whole projection."""
    norm_after_rope: bool = False
    """The norm of q and k comes after RoPE (for qk_norm "head")."""
    rope_dim: int | None = None
    """Leading columns of each head that RoPE rotates; None for all."""
    clip_qkv: float | None = None
    """q, k and v are clamped to ±this after the norm and before RoPE."""
    windows: tuple[int, ...] = ()
    """Per layer, how many last positions attention sees; 0 for all; empty for all 0."""
    attention_scale: float
    """Multiplies q · k."""
    rope_scale: float = 1.0
    """Multiplies cos and sin (YaRN's attention factor). Frequencies are the tensor `rope`."""
    rope_short_length: int = 0
    """Sequences of up to so many tokens have the frequencies of the tensor `rope_short`; 0 for none (LongRoPE)."""
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    eos_ids: tuple[int, ...] = ()
    """Tokens that end a reply."""

    def __post_init__(self) -> None:
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise FormatError(f"model config: {what}")

        for name in (
            "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
            "context_length", "num_experts", "experts_per_token", "expert_hidden",
        ):  # fmt: skip
            value = getattr(self, name)
            need(
                type(value) is int and 0 < value < LIMIT,
                f"{name} must be a whole number from 1 to {LIMIT - 1}, got {quoted(value)}",
            )
        for name in (
            "norm_eps", "attention_scale", "rope_scale",
            "embedding_multiplier", "residual_multiplier", "logits_divisor", "gate_scale",
        ):  # fmt: skip
            value = getattr(self, name)
            need(
                isinstance(value, (int, float)) and math.isfinite(value) and value > 0,
                f"{name} must be a positive number, got {quoted(value)}",
            )
        need(
            self.scoring in ("softmax", "softmax_topk", "sigmoid"),
            f"unknown scoring {quoted(self.scoring)}",
        )
        need(
            self.scoring != "softmax_topk" or (not self.choice_bias and self.groups == 1),
            "scoring softmax_topk has neither a choice bias nor groups",
        )
        need(self.group_score in ("max", "top2"), f"unknown group_score {quoted(self.group_score)}")
        need(self.qk_norm in ("none", "head", "full"), f"unknown qk_norm {quoted(self.qk_norm)}")
        need(
            self.clip_qkv is None or (math.isfinite(self.clip_qkv) and self.clip_qkv > 0),
            f"clip_qkv must be positive, got {quoted(self.clip_qkv)}",
        )
        need(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        need(
            self.num_layers < MOST_LAYERS and self.num_heads * self.head_dim < LIMIT,
            f"{self.num_layers} layers of {self.num_heads} heads of {self.head_dim} are too many",
        )
        need(self.head_dim % 2 == 0, f"head_dim must be even, got {self.head_dim}")
        need(
            type(self.rope_short_length) is int and 0 <= self.rope_short_length < LIMIT,
            f"rope_short_length must be a whole number, got {quoted(self.rope_short_length)}",
        )
        need(
            self.rope_dim is None
            or (
                type(self.rope_dim) is int
                and self.rope_dim % 2 == 0
                and 0 < self.rope_dim <= self.head_dim
            ),
            f"rope_dim must be an even number to {self.head_dim}, got {quoted(self.rope_dim)}",
        )
        need(
            self.qk_norm == "head" or not self.norm_after_rope, "norm_after_rope needs qk_norm head"
        )
        need(
            self.experts_per_token <= self.num_experts,
            f"experts_per_token {self.experts_per_token} exceeds num_experts {self.num_experts}",
        )
        need(
            all(type(n) is int for n in (self.groups, self.used_groups))
            and 0 < self.used_groups <= self.groups <= self.num_experts
            and self.num_experts % self.groups == 0
            and self.experts_per_token <= self.num_experts // self.groups * self.used_groups,
            f"{self.used_groups} of {self.groups} groups of {self.num_experts} experts do not hold "
            f"{self.experts_per_token}",
        )
        need(
            list(self.moe_layers) == sorted(set(self.moe_layers))
            and all(0 <= i < self.num_layers for i in self.moe_layers),
            "moe_layers must be ascending layer numbers",
        )
        need(len(self.moe_layers) > 0, "no layer has routed experts")
        need(
            len(self.moe_layers) * self.num_experts <= MOST_EXPERTS and self.num_experts < 0xFFFF,
            f"{len(self.moe_layers)} layers of {self.num_experts} experts are too many",
        )
        for name in ("shared_hidden", "windows"):
            value = getattr(self, name)
            need(
                len(value) in (0, self.num_layers)
                and all(type(v) is int and 0 <= v < LIMIT for v in value),
                f"{name} must have one whole number per layer",
            )
        need(
            all(type(i) is int and 0 <= i < self.vocab_size for i in self.eos_ids),
            f"eos_ids {self.eos_ids} are outside the vocabulary",
        )

    def shared_width(self, layer: int) -> int:
        """Returns the width of the always-on FFN of a layer, 0 for none."""
        return self.shared_hidden[layer] if self.shared_hidden else 0

    def window(self, layer: int) -> int:
        """Returns how many last positions attention of a layer sees, 0 for all."""
        return self.windows[layer] if self.windows else 0

    def moe_index(self, layer: int) -> int:
        """Returns the position of a layer among those with routed experts, -1 for none."""
        at = bisect_left(self.moe_layers, layer)
        return at if at < len(self.moe_layers) and self.moe_layers[at] == layer else -1

    def mixer(self, layer: int) -> AttentionSpec:
        """Returns what mixes the tokens of a layer; equal for layers that do it alike."""
        return AttentionSpec(
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim,
            scale=self.attention_scale, window=self.window(layer), qkv_bias=self.qkv_bias,
            o_bias=self.o_bias, qk_norm=self.qk_norm, norm_eps=self.norm_eps, clip=self.clip_qkv,
            rope=self.rope(layer), norm_after_rope=self.norm_after_rope,
        )  # fmt: skip

    def rope(self, layer: int) -> RopeSpec:
        """Returns how positions turn queries and keys of a layer; equal for layers that do it alike."""
        del layer  # one for all, until the file's version is raised
        return RopeSpec(
            name="rope", dim=self.rotated, scale=self.rope_scale,
            short_length=self.rope_short_length,
        )  # fmt: skip

    @property
    def ropes(self) -> list[RopeSpec]:
        """The distinct ones."""
        return list(dict.fromkeys(self.rope(i) for i in range(self.num_layers)))

    def turns_alike(self, length: int, other: int) -> bool:
        """Returns whether sequences of `length` and of `other` tokens have the same frequencies in every layer."""
        if length == other or not self.rope_short_length:
            return True
        return all(r.frequencies(length) == r.frequencies(other) for r in self.ropes)

    def ffn(self, layer: int) -> FfnSpec:
        """Returns what follows the mixer of a layer; equal for layers that do it alike."""
        is_routed = self.moe_index(layer) >= 0
        return FfnSpec(
            num_experts=self.num_experts if is_routed else 0,
            shared_width=self.shared_width(layer),
            shared_sigmoid=is_routed and self.shared_sigmoid,
            choice_bias=is_routed and self.choice_bias,
        )

    @property
    def router(self) -> RouterSpec:
        """How experts are chosen."""
        return RouterSpec(
            num_experts=self.num_experts, top_k=self.experts_per_token, scoring=self.scoring,
            renormalise=self.renormalise, gate_scale=self.gate_scale, groups=self.groups,
            used_groups=self.used_groups, group_score=self.group_score,
        )  # fmt: skip

    @property
    def rotated(self) -> int:
        """Leading columns of each head that RoPE rotates."""
        return self.head_dim if self.rope_dim is None else self.rope_dim

    @property
    def mixers(self) -> list[AttentionSpec]:
        """The mixer of every layer, of which few are distinct."""
        return [self.mixer(i) for i in range(self.num_layers)]

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values; those that a model does without, and once were not there, are left out."""
        values = dataclasses.asdict(self)
        for field in dataclasses.fields(self):
            if field.name in _LATER and values[field.name] == field.default:
                del values[field.name]
        return values

    @classmethod
    def from_json(cls, values: object) -> ModelConfig:
        """Builds a config from JSON values.

        Raises:
            FormatError: a field is missing, unknown or out of range.
        """
        if not isinstance(values, Mapping):
            raise FormatError(f"model config: expected an object, got {type(values).__name__}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise FormatError(f"model config: unknown fields {', '.join(map(str, unknown))}")
        missing = sorted(
            n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values
        )
        if missing:
            raise FormatError(f"model config: missing fields {', '.join(missing)}")
        clean: dict[str, Any] = {}
        for name, value in values.items():
            kind = str(fields[name].type)
            if kind.startswith("tuple"):
                if not isinstance(value, (list, tuple)):
                    raise FormatError(f"model config: {name} must be a list, got {quoted(value)}")
                value = tuple(value)
                if not all(type(v) is int for v in value):
                    raise FormatError(f"model config: {name} must hold whole numbers")
            elif kind.startswith("int") and value is not None and type(value) is not int:
                raise FormatError(
                    f"model config: {name} must be a whole number, got {quoted(value)}"
                )
            elif kind == "bool" and type(value) is not bool:
                raise FormatError(
                    f"model config: {name} must be true or false, got {quoted(value)}"
                )
            elif kind.startswith("float") and value is not None:
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise FormatError(f"model config: {name} must be a number, got {quoted(value)}")
                try:
                    value = float(value)
                except OverflowError:
                    raise FormatError(f"model config: {name} is beyond any number") from None
            elif (kind == "str" or kind.startswith("Literal")) and not isinstance(value, str):
                raise FormatError(f"model config: {name} must be a string, got {quoted(value)}")
            clean[name] = value
        return cls(**clean)


def dense_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Returns every tensor outside the routed experts, by name, in file order.

    All matrices are [out, in], as in `y = W x`; RoPE is in the half-split layout of transformers.

        embed [V, D]  head [V, D] (absent when tied)  norm [D]  rope [rotated / 2]  rope_short (with LongRoPE)
        layers.I.attn_norm [D]   layers.I.q [heads * head_dim, D]  .k .v [kv_heads * head_dim, D]
        layers.I.o [D, heads * head_dim]   .q_bias .k_bias .v_bias .o_bias   .q_norm .k_norm
        layers.I.ffn_norm [D]    layers.I.router [E, D]   .choice_bias [E]
        layers.I.shared.gate .up [S, D]  layers.I.shared.down [D, S]  layers.I.shared.sigmoid [D]

    A layer that is not in `moe_layers` is a dense layer: its FFN is `shared`, without sigmoid.
    """
    d = config.hidden_size
    f32, nested = TensorSpec.f32, TensorSpec.nested
    out = {"embed": nested(config.vocab_size, d), "norm": f32(d)}
    for rope in config.ropes:
        out |= rope.tensors()
    if not config.tied:
        out["head"] = nested(config.vocab_size, d)
    for i in range(config.num_layers):
        mixer, ffn = config.mixer(i), config.ffn(i)
        if not ffn.num_experts and not ffn.shared_width:
            raise FormatError(f"model config: layer {i} has neither routed experts nor an FFN")
        layer = {
            "attn_norm": f32(d), **mixer.tensors(d), "ffn_norm": f32(d), **ffn.tensors(d),
        }  # fmt: skip
        out |= {f"layers.{i}.{name}": spec for name, spec in layer.items()}
    return out

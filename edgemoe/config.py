"""The configuration of a model: the switches that the one decoder reads, and the tensors that they imply.

Only `convert` knows model families. A converter fills a `ModelConfig`; everything after it, the
reader of files included, uses only that config.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgemoe.errors import quoted
from edgemoe.specs import (
    ACTIVATIONS,
    MIXERS,
    SCORINGS,
    Activation,
    FfnSpec,
    MixerSpec,
    RopeSpec,
    RouterSpec,
    Scoring,
    TensorSpec,
)
from edgemoe.specs.flat import with_mixers
from edgemoe.specs.mixer import LIMIT, need, need_numbers, need_sizes
from edgemoe.specs.values import from_values, to_values

__all__ = ["LIMIT", "MATRICES", "MOST_EXPERTS", "MOST_LAYERS", "ModelConfig", "dense_tensors"]

MATRICES = ("gate", "up", "down")
"""The three matrices of an expert, in the order in which every rung stores them."""

MOST_LAYERS, MOST_EXPERTS = 1 << 12, 1 << 18
"""The most layers, and the most routed experts over all layers, of a model; the largest published one has 24,576."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The configuration of one decoder-only Mixture-of-Experts model.

    Shape letters: D hidden_size, H expert_hidden, S shared_hidden, E num_experts, K experts_per_token,
    V vocab_size, L num_layers.
    """

    family: str
    """Where the weights came from, for messages only ("qwen2_moe")."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    context_length: int
    """The most positions, in tokens, that the model was made for, with its position scaling."""
    norm_eps: float
    tied: bool
    """Whether the head is the embedding."""
    mixers: tuple[MixerSpec, ...]
    """The distinct token mixers, such as kinds of attention, in the order in which layers first use them."""
    layer_mixers: tuple[int, ...]
    """Per layer, the index of its mixer in `mixers`."""
    num_experts: int
    experts_per_token: int
    expert_hidden: int
    moe_layers: tuple[int, ...]
    """Layers with routed experts, ascending."""
    scoring: Scoring = "softmax"
    """See `edgemoe.specs.Scoring`."""
    renormalise: bool = False
    """Divide the gates of the chosen experts by their sum (not for scoring "softmax_topk" and "sparsemixer")."""
    choice_bias: bool = False
    """Experts are chosen by their score plus a bias, the tensor `choice_bias`; gates are the scores without it."""
    gate_scale: float = 1.0
    """A factor of the final gates."""
    gate_input: bool = False
    """The gate multiplies an expert's input instead of its output (only for one expert per token)."""
    groups: int = 1
    """The number of groups of consecutive experts, all of one size; a token's experts are chosen from its best
    `used_groups` groups."""
    used_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    """The score of a group: that of its best expert, or the sum of its best two."""
    router_bias: bool = False
    """Routers add a bias to their logits, the tensor `router_bias`."""
    activation: Activation = "swiglu"
    """The function of gate and up in all FFNs. FFNs of "relu2" have no gate: its matrix has no rows."""
    expert_bias: bool = False
    """The three matrix products of an expert have biases, the tensors `expert_bias.gate .up .down`."""
    shared_hidden: tuple[int, ...] = ()
    """Per layer, the width of the shared FFN, which every token takes; 0 for none; empty for all 0."""
    shared_sigmoid: bool = False
    """In MoE layers the shared FFN's output is scaled by sigmoid(w · x)."""
    branch_norms: bool = False
    """Routed experts and the shared FFN each have a norm before and one after; routers have one before. The norm before
    the shared FFN is `ffn_norm`; the others are the tensors `router_norm`, `experts_norm`, `experts_out_norm` and
    `shared.out_norm`."""
    out_norms: bool = False
    """The output of a mixer or an FFN is normed before it is added to the residual, by `attn_out_norm` and
    `ffn_out_norm`."""
    layer_scale: bool = False
    """At its end a layer multiplies the residual by the number `layer_scale`. The FFN's output is added afterwards: the
    weight of `ffn_out_norm` includes the factor."""
    head_bias: bool = False
    """The head adds a bias to the logits, the tensor `head_bias`."""
    soft_cap: float | None = None
    """The final logits are soft_cap * tanh(logits / soft_cap); None leaves them as they are."""
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    eos_ids: tuple[int, ...] = ()
    """Tokens that end a reply."""

    def __post_init__(self) -> None:
        need_sizes(
            self, "vocab_size", "hidden_size", "num_layers", "context_length", "num_experts",
            "experts_per_token", "expert_hidden",
        )  # fmt: skip
        need_numbers(
            self, "norm_eps", "embedding_multiplier", "residual_multiplier", "logits_divisor",
            "gate_scale",
        )  # fmt: skip
        need(self.num_layers < MOST_LAYERS, f"{self.num_layers} layers are too many")
        need(self.out_norms or not self.layer_scale, "layer_scale is of layers with out_norms")
        if self.soft_cap is not None:
            need_numbers(self, "soft_cap")
        need(
            not self.branch_norms or all(self.shared_width(i) for i in self.moe_layers),
            "branch_norms are of layers that have an FFN beside their experts",
        )
        self._check_mixers()
        self._check_router()
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
        need(
            len(self.shared_hidden) in (0, self.num_layers)
            and all(type(v) is int and 0 <= v < LIMIT for v in self.shared_hidden),
            "shared_hidden must have one whole number per layer",
        )
        need(
            all(type(i) is int and 0 <= i < self.vocab_size for i in self.eos_ids),
            f"eos_ids {self.eos_ids} are outside the vocabulary",
        )

    def _check_mixers(self) -> None:
        need(
            len(self.layer_mixers) == self.num_layers
            and list(dict.fromkeys(self.layer_mixers)) == list(range(len(self.mixers)))
            and len(set(self.mixers)) == len(self.mixers),
            "layer_mixers must say of every layer which of the mixers it has, in their order, each at least once",
        )
        tables: dict[str, RopeSpec] = {}
        for rope in self.ropes:
            need(
                tables.setdefault(rope.name, rope) == rope,
                f"two kinds of RoPE have the name {rope.name}",
            )

    def _check_router(self) -> None:
        need(
            self.scoring in SCORINGS,
            f"unknown scoring {quoted(self.scoring)}",
        )
        need(
            self.scoring not in ("softmax_topk", "sparsemixer")
            or (not self.choice_bias and self.groups == 1),
            f"scoring {self.scoring} has neither a choice bias nor groups",
        )
        need(
            not self.gate_input or self.experts_per_token == 1,
            f"gates of inputs are not supported for {self.experts_per_token} experts per token",
        )
        need(self.activation in ACTIVATIONS, f"unknown activation {quoted(self.activation)}")
        need(
            self.activation != "relu2" or not self.expert_bias,
            "activation relu2 is not for experts with biases",
        )
        need(self.group_score in ("max", "top2"), f"unknown group_score {quoted(self.group_score)}")
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

    def shared_width(self, layer: int) -> int:
        """Returns the width of a layer's shared FFN, 0 for none."""
        return self.shared_hidden[layer] if self.shared_hidden else 0

    def moe_index(self, layer: int) -> int:
        """Returns the position of a layer among those with routed experts, -1 for none."""
        at = bisect_left(self.moe_layers, layer)
        return at if at < len(self.moe_layers) and self.moe_layers[at] == layer else -1

    def mixer(self, layer: int) -> MixerSpec:
        """Returns the token mixer of a layer."""
        return self.mixers[self.layer_mixers[layer]]

    @property
    def mixer_by_layer(self) -> list[MixerSpec]:
        """The mixer of every layer."""
        return [self.mixers[i] for i in self.layer_mixers]

    @property
    def ropes(self) -> list[RopeSpec]:
        """The distinct kinds of RoPE, which rotate queries and keys by their position."""
        return list(dict.fromkeys(rope for mixer in self.mixers for rope in mixer.ropes))

    def turns_alike(self, length: int, other: int) -> bool:
        """Returns whether sequences of `length` and of `other` tokens have the same RoPE frequencies in every layer."""
        return length == other or all(
            r.frequencies(length) == r.frequencies(other) for r in self.ropes
        )

    def ffn(self, layer: int) -> FfnSpec:
        """Returns the FFN part of a layer; equal for layers whose FFNs are of one kind."""
        is_routed = self.moe_index(layer) >= 0
        return FfnSpec(
            num_experts=self.num_experts if is_routed else 0,
            shared_width=self.shared_width(layer),
            shared_sigmoid=is_routed and self.shared_sigmoid,
            choice_bias=is_routed and self.choice_bias,
            router_bias=is_routed and self.router_bias,
            bias_width=self.expert_hidden if is_routed and self.expert_bias else 0,
            activation=self.activation,
            has_branch_norms=is_routed and self.branch_norms,
        )

    @property
    def expert_shapes(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Rows and columns of an expert's gate, up and down; a gate with 0 rows means no gate."""
        d, h = self.hidden_size, self.expert_hidden
        return (h if self.activation != "relu2" else 0, d), (h, d), (d, h)

    @property
    def router(self) -> RouterSpec:
        """How experts are chosen."""
        return RouterSpec(
            num_experts=self.num_experts, top_k=self.experts_per_token, scoring=self.scoring,
            renormalise=self.renormalise, gate_scale=self.gate_scale, groups=self.groups,
            used_groups=self.used_groups, group_score=self.group_score,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Returns the fields that differ from their defaults, as JSON values."""
        values: dict[str, Any] = to_values(self)
        return values

    @classmethod
    def from_json(cls, values: object) -> ModelConfig:
        """Builds a config from JSON values.

        Raises:
            FormatError: a field is missing, unknown or out of range.
        """
        if isinstance(values, Mapping) and "mixers" not in values:
            values = with_mixers(values)
        return from_values(cls, values, "model config", MIXERS)


def dense_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Returns every tensor outside the routed experts, by name, in file order.

    All matrices are [out, in], as in `y = W x`; RoPE is in the half-split layout of transformers.

        embed [V, D]  head [V, D] (absent when tied)  norm [D]  head_bias [V]
        for each kind of RoPE: NAME [dim / 2]  NAME_short (with LongRoPE)
        layers.I.attn_norm [D]   and what the mixer's spec names; for attention:
        layers.I.q [heads * head_dim, D]  .k .v [kv_heads * head_dim, D]
        layers.I.o [D, heads * head_dim]   .q_bias .k_bias .v_bias .o_bias   .q_norm .k_norm
        layers.I.ffn_norm [D]    layers.I.router [E, D]   .router_bias .choice_bias [E]
        layers.I.expert_bias.gate .up [E, H]  .down [E, D]
        layers.I.router_norm .experts_norm .experts_out_norm .shared.out_norm [D]
        layers.I.attn_out_norm .ffn_out_norm [D]   .layer_scale [1]
        layers.I.shared.gate .up [S, D]  layers.I.shared.down [D, S]  layers.I.shared.sigmoid [D]

    A layer that is not in `moe_layers` is a dense layer: its FFN is `shared`, without sigmoid. If its `shared_hidden`
    is 0, too, the layer is only a mixer, without `ffn_norm`.
    """
    d = config.hidden_size
    f32, nested = TensorSpec.f32, TensorSpec.nested
    out = {"embed": nested(config.vocab_size, d), "norm": f32(d)}
    for rope in config.ropes:
        out |= rope.tensors()
    if not config.tied:
        out["head"] = nested(config.vocab_size, d)
    if config.head_bias:
        out["head_bias"] = f32(config.vocab_size)
    for i in range(config.num_layers):
        mixer, ffn = config.mixer(i), config.ffn(i)
        layer = {"attn_norm": f32(d), **mixer.tensors(d)}
        if ffn.exists:
            layer |= {"ffn_norm": f32(d), **ffn.tensors(d)}
        if config.out_norms:
            layer |= {"attn_out_norm": f32(d), "ffn_out_norm": f32(d)}
        if config.layer_scale:
            layer["layer_scale"] = f32(1)
        out |= {f"layers.{i}.{name}": spec for name, spec in layer.items()}
    return out

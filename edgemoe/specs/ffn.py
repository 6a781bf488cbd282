"""Specs of routers and FFNs: how experts are chosen, and what follows the mixer in a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from edgemoe.specs.tensor import TensorSpec

__all__ = ["ACTIVATIONS", "SCORINGS", "Activation", "FfnSpec", "RouterSpec", "Scoring"]

Activation = Literal["swiglu", "geglu", "clamped_swiglu", "relu2"]
"""The activation of an FFN, from its gate and up projections.

swiglu is silu(gate) * up. geglu is gelu(gate) * up, with gelu by its tanh formula. clamped_swiglu is
gate * sigmoid(1.702 gate) * (up + 1), with gate at most 7 and up clamped to ±7. relu2 is max(up, 0)^2, without a
gate."""
ACTIVATIONS: tuple[str, ...] = get_args(Activation)

Scoring = Literal["softmax", "softmax_topk", "sigmoid", "sparsemixer"]
"""How a router's logits become gates.

softmax: the softmax over all experts, of which the top k are taken. softmax_topk: the softmax over the top k alone.
sigmoid: the sigmoid of each logit. sparsemixer (arXiv 2409.12136): for each of the top k, its softmax over the experts
that are at most 2% below it, without those chosen before it."""
SCORINGS: tuple[str, ...] = get_args(Scoring)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """How a model's routers choose experts; the same in every layer."""

    num_experts: int
    """E, per layer."""
    top_k: int
    """K, the experts chosen for each token."""
    scoring: Scoring
    renormalise: bool
    """Whether the gates of the chosen experts are divided by their sum."""
    gate_scale: float
    """Finally multiplies the gates."""
    groups: int
    """Consecutive experts form so many groups of equal size; 1 for no groups."""
    used_groups: int
    """Experts are chosen from the best so many groups."""
    group_score: Literal["max", "top2"]
    """The score of a group: that of its best expert, or the sum of its best two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnSpec:
    """What follows the mixer in a layer: routed experts, an FFN that every token takes (shared), or both."""

    num_experts: int
    """Routed experts, 0 for none."""
    shared_width: int
    """The width of the shared FFN, 0 for none."""
    shared_sigmoid: bool
    """Whether the shared FFN's output is scaled by sigmoid(w · x); only beside routed experts."""
    choice_bias: bool
    """Whether the router adds a bias to each expert's score, for choosing experts but not for gates."""
    router_bias: bool
    """Whether the router's logits have a bias."""
    bias_width: int
    """The width H of experts whose three products have biases; 0 if they have none."""
    activation: Activation
    has_branch_norms: bool
    """Whether router, experts and shared FFN have norms of their own; see `ModelConfig.branch_norms`."""

    @property
    def exists(self) -> bool:
        """Whether anything follows the mixer."""
        return bool(self.num_experts or self.shared_width)

    def tensors(self, hidden_size: int) -> dict[str, TensorSpec]:
        """Returns its tensors outside the routed experts, by their names within a layer and in file order."""
        f32, nested = TensorSpec.f32, TensorSpec.nested
        d, s = hidden_size, self.shared_width
        out = {"router": f32(self.num_experts, d)} if self.num_experts else {}
        if self.router_bias:
            out["router_bias"] = f32(self.num_experts)
        if self.choice_bias:
            out["choice_bias"] = f32(self.num_experts)
        if self.bias_width:
            biases = f32(self.num_experts, self.bias_width)
            out |= {"expert_bias.gate": biases, "expert_bias.up": biases}
            out["expert_bias.down"] = f32(self.num_experts, d)
        if s:
            if self.activation != "relu2":
                out["shared.gate"] = nested(s, d)
            out |= {"shared.up": nested(s, d), "shared.down": nested(d, s)}
        if s and self.shared_sigmoid:
            out["shared.sigmoid"] = f32(d)
        if self.has_branch_norms:
            out |= {"router_norm": f32(d), "experts_norm": f32(d), "experts_out_norm": f32(d)}
            out["shared.out_norm"] = f32(d)
        return out

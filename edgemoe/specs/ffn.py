"""How experts are chosen, and what follows the mixer in a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from edgemoe.specs.tensor import TensorSpec

__all__ = ["ACTIVATIONS", "SCORINGS", "Activation", "FfnSpec", "RouterSpec", "Scoring"]

Activation = Literal["swiglu", "geglu", "clamped_swiglu", "relu2"]
"""What an FFN makes of its gate and up: silu(gate) * up; gelu(gate) * up, with tanh; gate * sigmoid(1.702 gate) *
(up + 1), with gate at most 7 and up clamped to ±7; max(up, 0)^2, of FFNs without a gate."""
ACTIVATIONS: tuple[str, ...] = get_args(Activation)

Scoring = Literal["softmax", "softmax_topk", "sigmoid", "sparsemixer"]
"""What makes gates of a router's logits. softmax: over all experts, of which the top k are taken. softmax_topk: over
those of the top k. sigmoid: of each logit. sparsemixer (arXiv 2409.12136): of each of the top k, over those that are at
most 2% below it, without those chosen before it."""
SCORINGS: tuple[str, ...] = get_args(Scoring)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """How experts are chosen; the same in every layer."""

    num_experts: int
    top_k: int
    scoring: Scoring
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
    router_bias: bool
    """The router's logits have one."""
    bias_width: int
    """H of experts whose products have biases, 0 for none."""
    activation: Activation
    has_branch_norms: bool
    """Router, experts and the FFN beside them have norms of their own."""

    @property
    def exists(self) -> bool:
        """Whether anything follows the mixer."""
        return bool(self.num_experts or self.shared_width)

    def tensors(self, hidden_size: int) -> dict[str, TensorSpec]:
        """Returns its tensors outside the routed experts by their names within a layer, in file order."""
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

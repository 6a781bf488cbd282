"""How experts are chosen, and what follows the mixer in a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgemoe.specs.tensor import TensorSpec

__all__ = ["FfnSpec", "RouterSpec"]


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

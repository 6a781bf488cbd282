"""Verbs of recurrent mixers; each call is for the tokens of one sequence."""

from __future__ import annotations

from typing import Protocol

from edgemoe.ops.values import Array, DeltaRule, MambaRule

__all__ = ["RecurrentVerbs"]


class RecurrentVerbs(Protocol):
    """The recurrent verbs of a device; see `Ops`.

    `before` is the state before the tokens, None for all zeros. `after` becomes the state after them. The two must be
    different arrays.
    """

    def short_conv(
        self,
        x: Array,
        weight: Array,
        bias: Array | None,
        before: Array | None,
        after: Array,
        out: Array,
        *,
        silu: bool,
    ) -> None:
        """out [T, C] = a causal convolution of x [T, C] over time, channel by channel, then SiLU if `silu` is set.

        weight [taps, C], the last tap for the newest token; bias [C]; before and after [taps - 1, C]. out may be x.
        """

    def delta_rule(
        self,
        qkv: Array,
        decay: Array,
        beta: Array,
        rule: DeltaRule,
        before: Array | None,
        after: Array,
        out: Array,
    ) -> None:
        """out [T, value_heads * value_dim] = the gated delta rule; qkv, decay and beta are overwritten.

        qkv [T, C]: the queries of all heads, then all keys, then all values. decay [T, value_heads] or
        [T, value_heads * key_dim], before its activation (see `DeltaRule.rate`). beta [T, value_heads], before sigmoid.
        before and after [value_heads, key_dim, value_dim].
        """

    def mamba2(
        self,
        xbc: Array,
        step: Array,
        decay: Array,
        rule: MambaRule,
        before: Array | None,
        after: Array,
        out: Array,
    ) -> None:
        """out [T, heads * head_dim] = the state space layer of Mamba-2.

        xbc [T, heads * head_dim + 2 * groups * state_dim]: the heads' inputs x, then B and C of each group. step
        [T, heads], before softplus, is overwritten. decay [T, heads] is scratch. before and after
        [heads, state_dim, head_dim].
        """

    def gated_norm(
        self, x: Array, gate: Array, weight: Array, eps: float, groups: int, kind: str
    ) -> None:
        """Norms x [T, C] in place, by the RMS of each of `groups` equal parts of a row, and applies a gate [T, C].

        Args:
            weight: [C], or [C / groups] for all parts.
            kind: "silu" for norm(x) * silu(gate), "sigmoid" for norm(x) * sigmoid(gate), "silu_first" for
                norm(x * silu(gate)).
        """

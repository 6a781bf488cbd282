"""Verbs of recurrent mixers, of one sequence."""

from __future__ import annotations

from typing import Protocol

from edgemoe.ops.values import Array, DeltaRule, MambaRule

__all__ = ["RecurrentVerbs"]


class RecurrentVerbs(Protocol):
    """Are a device's; see `Ops`.

    `before` is the state before the tokens, None for all zeros, and `after` becomes that after them; they are not the
    same.
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
        """out [T, C]: a causal convolution over time of each channel, and silu if asked for; out may be x.

        weight [taps, C], the last tap for the newest token; bias [C]; before and after [taps - 1, C].
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
        """out [T, value_heads * value_dim] of the gated delta rule; qkv, decay and beta are changed.

        qkv [T, C]: all q, all k, all v. decay [T, value_heads] or [T, value_heads * key_dim] and beta [T,
        value_heads]: before softplus and sigmoid. before and after [value_heads, key_dim, value_dim].
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
        """out [T, heads * head_dim] of Mamba-2; step is changed, decay is scratch, both [T, heads].

        xbc [T, heads * head_dim + 2 * groups * state_dim]; step: before softplus. before and after [heads, state_dim,
        head_dim].
        """

    def gated_norm(
        self, x: Array, gate: Array, weight: Array, eps: float, groups: int, kind: str
    ) -> None:
        """x [T, C], in place: RMS norm of each of `groups` parts of a row, beside a gate [T, C].

        kind: norm(x) * silu(gate) ("silu"), norm(x) * sigmoid(gate) ("sigmoid"), norm(x * silu(gate)) ("silu_first").
        weight [C], or [C / groups] for all parts.
        """

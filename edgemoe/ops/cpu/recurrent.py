"""Verbs of recurrent mixers on a CPU; see `edgemoe.ops.recurrent`."""

from __future__ import annotations

from edgemoe import _core
from edgemoe.ops.cpu.memory import CpuMemory
from edgemoe.ops.values import Array, DeltaRule, MambaRule

__all__ = ["CpuRecurrent"]


class CpuRecurrent(CpuMemory):
    """The recurrent verbs of a CPU; see `CpuOps`."""

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
        """See `Ops.short_conv`."""
        _core.short_conv(self._ws, x, weight, bias, before, after, silu, out)

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
        """See `Ops.delta_rule`."""
        _core.delta_rule(
            self._ws, qkv, decay, beta, rule.rate, rule.bias, rule.key_heads, rule.bounded, before,
            after, out,
        )  # fmt: skip

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
        """See `Ops.mamba2`."""
        _core.mamba2(
            self._ws, xbc, step, decay, rule.rate, rule.step_bias, rule.skip, rule.groups, before,
            after, out,
        )  # fmt: skip

    def gated_norm(
        self, x: Array, gate: Array, weight: Array, eps: float, groups: int, kind: str
    ) -> None:
        """See `Ops.gated_norm`."""
        _core.gated_norm(self._ws, x, gate, weight, eps, groups, kind)

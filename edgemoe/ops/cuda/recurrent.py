"""Verbs of recurrent mixers on a device; see `edgemoe.ops.recurrent`."""

from __future__ import annotations

from typing import Any

from edgemoe import _core
from edgemoe.ops.cuda.memory import Array, CudaMemory
from edgemoe.ops.values import DeltaRule, MambaRule

__all__ = ["CudaRecurrent"]


class CudaRecurrent(CudaMemory):
    """The recurrent verbs of a device; see `CudaOps`."""

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
        _core.device_short_conv(self._ws, x, weight, bias, before, after, silu, out)

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
        kept: Any = rule
        _core.device_delta_rule(
            self._ws, qkv, decay, beta, kept.rate, kept.bias, rule.key_heads, rule.bounded, before,
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
        kept: Any = rule
        _core.device_mamba2(
            self._ws, xbc, step, decay, kept.rate, kept.step_bias, kept.skip, rule.groups, before,
            after, out,
        )  # fmt: skip

    def gated_norm(
        self, x: Array, gate: Array, weight: Array, eps: float, groups: int, kind: str
    ) -> None:
        """See `Ops.gated_norm`."""
        _core.device_gated_norm(self._ws, x, gate, weight, eps, groups, kind)

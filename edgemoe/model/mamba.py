"""Mamba-2: what all layers of one spec share, and the weights of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from edgemoe.model.batch import Batch
from edgemoe.model.recurrent import Recurrent
from edgemoe.ops import Array, MambaRule, Matrix
from edgemoe.store import Weight

__all__ = ["Mamba", "MambaLayer"]


class Mamba(Recurrent):
    """What all Mamba-2 layers of one spec share. Implements `Mixer`."""

    def layer(self, index: int, weights: Mapping[str, Weight]) -> MambaLayer:
        """See `Mixer.layer`."""
        self.join(index)
        return MambaLayer(self, index, weights)


class MambaLayer:
    """The Mamba-2 mixer of one layer. Implements `MixerLayer`."""

    def __init__(self, shared: Mamba, index: int, weights: Mapping[str, Weight]) -> None:
        matrices, arrays = cast(Mapping[str, Matrix], weights), cast(Mapping[str, Array], weights)
        self._shared, self._ops, self._index = shared, shared.ops, index
        self._in, self._out = (matrices["xbc"], matrices["x_gate"]), (matrices["o"],)
        self._step, self._norm = (arrays["step"],), arrays["head_norm"]
        self._conv, self._conv_bias = arrays["conv"], arrays.get("conv_bias")
        self._rule = MambaRule(
            groups=shared.spec.groups, rate=arrays["decay_rate"], step_bias=arrays["step_bias"],
            skip=arrays["skip"],
        )  # fmt: skip

    def forward(self, normed: Array, batch: Batch, out: Array) -> None:
        """See `MixerLayer.forward`."""
        ops, index, spec = self._ops, self._index, self._shared.spec
        (xbc, step, _, gate, heads), parts = batch.shared[self._shared]
        ops.linear(normed, self._in, (xbc, gate))
        ops.linear_f32(normed, self._step, (step,))
        for states, (x, s, decay, _, mixed) in parts:
            (tail, state), (next_tail, next_state) = states[index]
            ops.short_conv(x, self._conv, self._conv_bias, tail, next_tail, x, silu=True)
            ops.mamba2(x, s, decay, self._rule, state, next_state, mixed)
        ops.gated_norm(heads, gate, self._norm, spec.norm_eps, spec.groups, "silu_first")
        ops.linear(heads, self._out, (out,))

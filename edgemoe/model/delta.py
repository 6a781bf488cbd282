"""The gated delta rule: what the layers of one spec share, and one layer's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from edgemoe.model.batch import Batch
from edgemoe.model.recurrent import Recurrent
from edgemoe.ops import Array, DeltaRule, Matrix
from edgemoe.store import Weight

__all__ = ["Delta", "DeltaLayer"]


class Delta(Recurrent):
    """Is what the layers of one spec share. See `Mixer`."""

    def layer(self, index: int, weights: Mapping[str, Weight]) -> DeltaLayer:
        """See `Mixer.layer`."""
        return DeltaLayer(self, index, weights)


class DeltaLayer:
    """Is the gated delta rule of one layer. See `MixerLayer`."""

    def __init__(self, shared: Delta, index: int, weights: Mapping[str, Weight]) -> None:
        matrices, arrays = cast(Mapping[str, Matrix], weights), cast(Mapping[str, Array], weights)
        self._shared, self._ops, self._index = shared, shared.ops, index
        self._in, self._out = (matrices["qkv"], matrices["z"]), (matrices["o"],)
        self._small = arrays["decay"], arrays["beta"]
        self._conv, self._norm = arrays["conv"], arrays["head_norm"]
        self._rule = DeltaRule(
            key_heads=shared.spec.key_heads, rate=arrays["decay_rate"], bias=arrays["decay_bias"],
            bounded=False,
        )  # fmt: skip

    def forward(self, normed: Array, batch: Batch, out: Array) -> None:
        """See `MixerLayer.forward`."""
        ops, index, spec = self._ops, self._index, self._shared.spec
        (qkv, decay, beta, gate, heads), parts = batch.shared[self._shared]
        ops.linear(normed, self._in, (qkv, gate))
        ops.linear_f32(normed, self._small, (decay, beta))
        for states, pos, count, (x, a, b, _, mixed) in parts:
            (tail, state), (next_tail, next_state) = states[index].step(pos, count)
            ops.short_conv(x, self._conv, None, tail, next_tail, x, silu=True)
            ops.delta_rule(x, a, b, self._rule, state, next_state, mixed)
        ops.gated_norm(heads, gate, self._norm, spec.norm_eps, spec.value_heads, spec.gate)
        ops.linear(heads, self._out, (out,))

"""The gated short convolution: what all layers of one spec share, and the weights of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from edgemoe.model.batch import Batch
from edgemoe.model.recurrent import Recurrent
from edgemoe.ops import Array, Matrix
from edgemoe.store import Weight

__all__ = ["Conv", "ConvLayer"]


class Conv(Recurrent):
    """What all convolution layers of one spec share. Implements `Mixer`."""

    def layer(self, index: int, weights: Mapping[str, Weight]) -> ConvLayer:
        """See `Mixer.layer`."""
        self.join(index)
        return ConvLayer(self, index, weights)


class ConvLayer:
    """The gated short convolution of one layer. Implements `MixerLayer`."""

    def __init__(self, shared: Conv, index: int, weights: Mapping[str, Weight]) -> None:
        matrices = cast(Mapping[str, Matrix], weights)
        self._shared, self._ops, self._index = shared, shared.ops, index
        self._in = matrices["u"], matrices["b"], matrices["c"]
        self._out, self._conv = (matrices["o"],), cast(Array, weights["conv"])

    def forward(self, normed: Array, batch: Batch, out: Array) -> None:
        """See `MixerLayer.forward`."""
        ops, index = self._ops, self._index
        rows, parts = batch.shared[self._shared]
        u, b, c = rows
        ops.linear(normed, self._in, rows)
        ops.multiply(b, u)
        for states, (x, _, _) in parts:
            (tail,), (next_tail,) = states[index]
            ops.short_conv(x, self._conv, None, tail, next_tail, x, silu=False)
        ops.multiply(c, u)
        ops.linear(u, self._out, (out,))

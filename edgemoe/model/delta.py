"""The gated delta rule: what all layers of one spec share, and the weights of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from edgemoe.model.batch import Batch
from edgemoe.model.recurrent import Recurrent
from edgemoe.ops import Array, DeltaRule, Matrix
from edgemoe.store import Weight

__all__ = ["Delta", "DeltaLayer"]


class Delta(Recurrent):
    """What all delta-rule layers of one spec share. Implements `Mixer`."""

    def layer(self, index: int, weights: Mapping[str, Weight]) -> DeltaLayer:
        """See `Mixer.layer`."""
        self.join(index)
        return DeltaLayer(self, index, weights)


_QKV, _DECAY, _BETA, _GATE, _HEADS, _DECAY_IN, _GATE_IN = range(7)
"""Indices of the scratch arrays, in the order of `DeltaSpec.scratch_widths`."""


class DeltaLayer:
    """The gated delta rule of one layer. Implements `MixerLayer`."""

    def __init__(self, shared: Delta, index: int, weights: Mapping[str, Weight]) -> None:
        matrices, arrays = cast(Mapping[str, Matrix], weights), cast(Mapping[str, Array], weights)
        self._shared, self._ops, self._index = shared, shared.ops, index
        spec = shared.spec
        # Tensors that are applied to the layer's input, by the scratch array that gets the result: quantised matrices
        # are `large`, float32 ones `small`.
        large = {_QKV: "qkv", _GATE: "z"}
        small = {_DECAY: "decay", _BETA: "beta"}
        if spec.gate_rank:
            large = {_QKV: "qkv", _GATE_IN: "z_in"}
        if spec.decay_rank:
            small = {_DECAY_IN: "decay_in", _BETA: "beta"}
        elif spec.channel_decay:
            large[_DECAY] = small.pop(_DECAY)
        self._large, self._large_to = [matrices[n] for n in large.values()], list(large)
        self._small, self._small_to = [arrays[n] for n in small.values()], list(small)
        self._gate_out = matrices["z_out"] if spec.gate_rank else None
        self._decay_out = arrays["decay"] if spec.decay_rank else None
        self._out = (matrices["o"],)
        self._conv, self._norm = arrays["conv"], arrays["head_norm"]
        self._rule = DeltaRule(
            key_heads=spec.key_heads, rate=arrays["decay_rate"], bias=arrays["decay_bias"],
            bounded=spec.bounded,
        )  # fmt: skip

    def forward(self, normed: Array, batch: Batch, out: Array) -> None:
        """See `MixerLayer.forward`."""
        ops, index, spec = self._ops, self._index, self._shared.spec
        rows, parts = batch.shared[self._shared]
        ops.linear(normed, self._large, [rows[i] for i in self._large_to])
        ops.linear_f32(normed, self._small, [rows[i] for i in self._small_to])
        if self._gate_out is not None:
            ops.linear(rows[_GATE_IN], (self._gate_out,), (rows[_GATE],))
        if self._decay_out is not None:
            ops.linear_f32(rows[_DECAY_IN], (self._decay_out,), (rows[_DECAY],))
        for states, (x, decay, beta, _, mixed, *_) in parts:
            (tail, state), (next_tail, next_state) = states[index]
            ops.short_conv(x, self._conv, None, tail, next_tail, x, silu=True)
            ops.delta_rule(x, decay, beta, self._rule, state, next_state, mixed)
        heads = rows[_HEADS]
        ops.gated_norm(heads, rows[_GATE], self._norm, spec.norm_eps, spec.value_heads, spec.gate)
        ops.linear(heads, self._out, (out,))

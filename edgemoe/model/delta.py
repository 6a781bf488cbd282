"""The gated delta rule: what the layers of one spec share, and one layer's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from edgemoe.model.batch import Batch
from edgemoe.model.kv import KvTypes
from edgemoe.model.recurrent import RecurrentState
from edgemoe.model.setup import Setup
from edgemoe.ops import Array, DeltaRule, Matrix
from edgemoe.specs import DeltaSpec
from edgemoe.store import Weight

__all__ = ["Delta", "DeltaLayer"]


class Delta:
    """Is what the layers of one spec share. See `Mixer`."""

    def __init__(self, spec: DeltaSpec, setup: Setup) -> None:
        self.spec, self.ops, self.hidden_size = spec, setup.ops, setup.config.hidden_size
        self._rows = setup.scratch.rows(*self.scratch_widths(spec))

    @staticmethod
    def scratch_widths(spec: DeltaSpec) -> tuple[int, ...]:
        """See `Mixer.scratch_widths`: q, k and v; decays; betas; the gate; what comes out of the heads."""
        return spec.channels, spec.decays, spec.value_heads, spec.value_width, spec.value_width

    @staticmethod
    def state_bytes(spec: DeltaSpec, context: int, types: KvTypes) -> int:
        """See `Mixer.state_bytes`: the same for every context."""
        return RecurrentState.bytes(*spec.state_shapes)

    @staticmethod
    def read_bytes(spec: DeltaSpec, length: int, types: KvTypes) -> int:
        """See `Mixer.read_bytes`."""
        return RecurrentState.read_bytes(*spec.state_shapes)

    def make_state(self) -> RecurrentState:
        """See `Mixer.make_state`."""
        return RecurrentState(self.ops, *self.spec.state_shapes)

    def start(self, batch: Batch) -> None:
        """See `Mixer.start`: cuts the rows of each sequence, once for all layers."""
        parts: list[tuple[Any, ...]] = []
        for part in batch.slices:
            qkv, decay, beta, _, heads = self._rows.between(part.start, part.stop)
            parts.append((part.state.layers, part.state.held, part.count, qkv, decay, beta, heads))
        batch.shared[self] = (*self._rows.first(len(batch.ids)), parts)

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
        qkv, decay, beta, gate, heads, parts = batch.shared[self._shared]
        ops.linear(normed, self._in, (qkv, gate))
        ops.linear_f32(normed, self._small, (decay, beta))
        for states, pos, count, x, a, b, mixed in parts:
            (tail, state), (next_tail, next_state) = states[index].step(pos, count)
            ops.short_conv(x, self._conv, None, tail, next_tail, x, silu=True)
            ops.delta_rule(x, a, b, self._rule, state, next_state, mixed)
        ops.gated_norm(heads, gate, self._norm, spec.norm_eps, spec.value_heads, spec.gate)
        ops.linear(heads, self._out, (out,))

"""Attention to keys and values: what the layers of one spec share, and one layer's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from edgemoe.config import ModelConfig
from edgemoe.model.batch import Batch
from edgemoe.model.kv import KvState, KvTypes
from edgemoe.model.rows import Rows
from edgemoe.ops import Array, Matrix, Ops
from edgemoe.specs import AttentionSpec
from edgemoe.store import Weight

__all__ = ["Attention", "AttentionLayer"]


class Attention:
    """Is what the layers of one spec share: scratch, and the rotations of a batch's positions. See `Mixer`."""

    def __init__(
        self, spec: AttentionSpec, config: ModelConfig, ops: Ops, inv_freq: Array, max_tokens: int
    ) -> None:
        self.spec, self.ops, self.hidden_size = spec, ops, config.hidden_size
        self._inv_freq, self._rope_scale = inv_freq, config.rope_scale
        widths = (
            spec.q_width,
            spec.kv_width,
            spec.kv_width,
            spec.q_width,
            *[spec.rope_dim // 2] * 2,
        )
        self.rows = Rows(*(ops.empty(max_tokens, width) for width in widths))
        """Queries, keys, values, what comes out of the heads; cos and sin."""

    @staticmethod
    def scratch_width(spec: AttentionSpec) -> int:
        """See `Mixer.scratch_width`."""
        return 2 * (spec.q_width + spec.kv_width + spec.rope_dim // 2)

    @staticmethod
    def state_bytes(spec: AttentionSpec, context: int, types: KvTypes) -> int:
        """See `Mixer.state_bytes`."""
        return KvState.bytes(spec, context, types)

    @staticmethod
    def read_bytes(spec: AttentionSpec, length: int, types: KvTypes) -> int:
        """See `Mixer.read_bytes`: a window sees the last positions only."""
        return KvState.bytes(spec, 32, types) * min(length, spec.window or length) // 32

    def make_state(self, context: int, types: KvTypes) -> KvState:
        """See `Mixer.make_state`."""
        return KvState(self.ops, self.spec, context, types)

    def start(self, batch: Batch) -> None:
        """See `Mixer.start`: rotations of every row, by the position in its own sequence."""
        parts, T = [], len(batch.ids)
        whole = self.rows.first(T)
        for part in batch.slices:
            rows = whole if part.count == T else self.rows.between(part.start, part.stop)
            q, k, v, heads, cos, sin = rows
            states: list[Any] = part.state.layers
            pos = part.state.length
            self.ops.rope(self._inv_freq, pos, self._rope_scale, cos, sin)
            parts.append((states, pos, q, k, v, cos, sin, heads))
        batch.shared[self] = (whole[:3], whole[3], parts)

    def layer(self, index: int, weights: Mapping[str, Weight]) -> AttentionLayer:
        """See `Mixer.layer`."""
        return AttentionLayer(self, index, weights)


class AttentionLayer:
    """Is attention of one layer. See `MixerLayer`."""

    def __init__(self, shared: Attention, index: int, weights: Mapping[str, Weight]) -> None:
        matrices = cast(Mapping[str, Matrix], weights)
        vectors = cast(Mapping[str, Array], weights)
        specs = shared.spec.tensors(shared.hidden_size)
        small = {name: vectors[name] for name, spec in specs.items() if spec.kind == "f32"}
        self._shared, self._ops, self._index = shared, shared.ops, index
        self._weights = shared.ops.attention_weights(index, shared.spec, small)
        self._qkv, self._o = (matrices["q"], matrices["k"], matrices["v"]), (matrices["o"],)
        self._o_bias = small.get("o_bias")

    def forward(self, normed: Array, batch: Batch, out: Array) -> None:
        """See `MixerLayer.forward`."""
        ops, index = self._ops, self._index
        qkv, attended, parts = batch.shared[self._shared]
        ops.linear(normed, self._qkv, qkv)
        for states, pos, q, k, v, cos, sin, heads in parts:
            ops.attention(self._weights, q, k, v, pos, cos, sin, states[index].layer, heads)
        ops.linear(attended, self._o, (out,))
        if self._o_bias is not None:
            ops.add_bias(self._o_bias, out)

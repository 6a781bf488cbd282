"""Attention over a key-value cache: what all layers of one spec share, and the weights of one layer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, cast

from edgemoe.model.batch import Batch
from edgemoe.model.kv import KvState, KvTypes
from edgemoe.model.setup import Setup
from edgemoe.ops import Array, AttentionMatrices, Matrix
from edgemoe.specs import AttentionSpec
from edgemoe.store import Weight

__all__ = ["Attention", "AttentionLayer"]


_NOTHING: tuple[Any, Any, Any] = (None, None, None)


class Attention:
    """What all attention layers of one spec share. Implements `Mixer`."""

    def __init__(self, spec: AttentionSpec, setup: Setup) -> None:
        self.spec, self.ops, self.hidden_size = spec, setup.ops, setup.config.hidden_size
        self.rope = None if spec.rope is None else setup.ropes[spec.rope]
        self.context, self.types, self._chunk = setup.context, setup.types, setup.chunk
        self._layers: dict[int, None] = {}  # numbers of the layers with this spec, in order
        self._rows = setup.scratch.rows(*self.scratch_widths(spec))

    @staticmethod
    def scratch_widths(spec: AttentionSpec) -> tuple[int, ...]:
        """See `Mixer.scratch_widths`: queries, keys, values, the heads' outputs, and their gate if there is one."""
        gate = (spec.gate_width,) if spec.gate_width else ()
        return spec.q_width, spec.kv_width, spec.kv_width, spec.q_width, *gate

    @staticmethod
    def state_bytes(spec: AttentionSpec, context: int, types: KvTypes, chunk: int) -> int:
        """See `Mixer.state_bytes`."""
        return KvState.bytes(spec, context, types, chunk)

    @staticmethod
    def read_bytes(spec: AttentionSpec, length: int, types: KvTypes) -> int:
        """See `Mixer.read_bytes`. With a window or chunks, only so many positions are read: a chunk counts as full."""
        seen = min(length, spec.window or length, spec.chunk or length)
        return KvState.bytes(spec, 32, types, 32) * seen // 32

    def make_state(self) -> KvState:
        """See `Mixer.make_state`."""
        return KvState(self.ops, self.spec, self.context, self.types, self._chunk)

    def start(self, batch: Batch) -> Hashable | None:
        """See `Mixer.start`: slices scratch and rotations into the rows of each sequence, once for all layers."""
        q, k, v, heads, *gate = self._rows.first(len(batch.ids))
        parts: list[tuple[Any, ...]] = []
        for part in batch.slices:
            rows = self._rows.between(part.start, part.stop)
            state, turn = part.state, _NOTHING
            if self.rope is not None:
                cos, sin = self.rope.rows.between(part.start, part.stop)
                turn = cos, sin, self.rope.table(state)
            pos, states = state.held, cast("list[KvState]", state.layers)
            kvs = {i: states[i].step(pos, part.count) for i in self._layers}
            parts.append((kvs, pos, rows[:3], *turn, rows[3]))
        batch.shared[self] = ((q, k, v), heads, gate, parts)
        if len(batch.ids) > 1 or (place := self.ops.place(self.spec, pos)) is None:
            return None
        return place, turn[2]  # the RoPE table may change with a sequence's length

    def layer(self, index: int, weights: Mapping[str, Weight]) -> AttentionLayer:
        """See `Mixer.layer`."""
        self._layers[index] = None
        return AttentionLayer(self, index, weights)


class AttentionLayer:
    """The attention of one layer. Implements `MixerLayer`."""

    def __init__(self, shared: Attention, index: int, weights: Mapping[str, Weight]) -> None:
        matrices = cast(Mapping[str, Matrix], weights)
        self._shared, self._ops, self._index = shared, shared.ops, index
        self._weights = shared.ops.attention_weights(index, shared.spec, weights, shared.types.keys)
        if shared.rope is not None and self._weights.num_constants:
            shared.rope.keep(shared.context)
        values = matrices["k" if shared.spec.shared_kv else "v"]
        self._matrices = AttentionMatrices((matrices["q"], matrices["k"], values), matrices["o"])
        self._o_bias = cast("Array | None", weights.get("o_bias"))
        self._gate, self._gate_kind = weights.get("q_gate"), shared.spec.gate

    def forward(self, normed: Array, batch: Batch, out: Array) -> None:
        """See `MixerLayer.forward`."""
        ops, index = self._ops, self._index
        qkv, attended, gate, parts = batch.shared[self._shared]
        if len(parts) == 1 and not gate:
            kvs, pos, rows, cos, sin, table, heads = parts[0]
            ops.attend(
                self._weights, normed, self._matrices, rows, pos, cos, sin, table, kvs[index], heads, out,
            )  # fmt: skip
        else:
            self._attend_apart(normed, qkv, attended, gate, parts, out)
        if self._o_bias is not None:
            ops.add_bias(self._o_bias, out)

    def _attend_apart(
        self,
        normed: Array,
        qkv: tuple[Array, ...],
        attended: Array,
        gate: list[Array],
        parts: list[tuple[Any, ...]],
        out: Array,
    ) -> None:
        """Does what `Ops.attend` does in separate steps: for several sequences, each with its own state, or a gate."""
        ops, (matrices, o) = self._ops, self._matrices
        if self._gate_kind == "sigmoid":  # a matrix like the others
            ops.linear(normed, (*matrices, cast(Matrix, self._gate)), (*qkv, *gate))
        else:
            if gate:
                ops.linear_f32(normed, (cast(Array, self._gate),), gate)
            ops.linear(normed, matrices, qkv)
        for kvs, pos, (q, k, v), cos, sin, table, heads in parts:
            ops.attention(self._weights, q, k, v, pos, cos, sin, table, kvs[self._index], heads)
        if gate:
            ops.gate_heads(attended, gate[0], self._gate_kind)
        ops.linear(attended, (o,), (out,))

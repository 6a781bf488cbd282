"""Multi-head latent attention with absorbed projections: what all layers of one spec share, and one layer's weights.

Absorbed: a head's keys and values are never computed from the latents. See `MlaSpec`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, cast

from edgemoe.model.batch import Batch
from edgemoe.model.kv import KvTypes
from edgemoe.model.setup import Setup
from edgemoe.ops import (
    Array,
    KvLayer,
    LatentMatrices,
    Matrix,
    Ops,
    absorb_queries,
    kv_bytes,
    kv_parts,
)
from edgemoe.specs import MlaSpec
from edgemoe.store import Weight

__all__ = ["Latents", "Mla", "MlaLayer"]

_UNTURNED: tuple[Any, Any] = (None, None)


class Latents:
    """The state of a layer: for each position the latent and the rotated columns, stored as keys are.

    All positions are kept, so the sequence can be cut back to any length. Implements `State`.
    """

    can_rewind_anywhere = can_look_back = True

    def __init__(self, ops: Ops, spec: MlaSpec, capacity: int, kind: str) -> None:
        self.layer: KvLayer = ops.latents(spec, kind, capacity)
        self._spec, self._kind, self._capacity = spec, kind, capacity

    @staticmethod
    def bytes(spec: MlaSpec, capacity: int, types: KvTypes) -> int:
        """Returns the bytes of `capacity` positions. Memory is touched in steps of 32 positions."""
        return kv_bytes(types.keys, 1, capacity, spec.key_dim)

    def reaches(self, length: int) -> int:
        """See `State.reaches`."""
        return length

    def rewind(self, length: int) -> None:
        """See `State.rewind`: positions from `length` on will be overwritten."""

    def snapshot(self, length: int) -> None:
        """See `State.snapshot`."""

    def parts(self, length: int) -> tuple[Any, ...] | None:
        """See `State.parts`."""
        return kv_parts(self.layer, (self._kind,), 1, self._spec.key_dim, self._capacity, length)

    def make_parts(self, length: int) -> tuple[Any, ...]:
        """See `State.make_parts`."""
        parts = self.parts(length)
        assert parts is not None
        return parts


class Mla:
    """What all latent-attention layers of one spec share. Implements `Mixer`."""

    def __init__(self, spec: MlaSpec, setup: Setup) -> None:
        self.spec, self.ops = spec, setup.ops
        self.rope = None if spec.rope is None else setup.ropes[spec.rope]
        self.context, self.types = setup.context, setup.types
        self._rows = setup.scratch.rows(*self.scratch_widths(spec))

    @staticmethod
    def scratch_widths(spec: MlaSpec) -> tuple[int, ...]:
        """See `Mixer.scratch_widths`.

        The arrays are the low-rank queries, the queries, the absorbed queries, the new keys, the heads' outputs before
        the value projection, their outputs after it, and their gate.
        """
        h = spec.num_heads
        return (
            spec.q_rank, spec.q_width, h * spec.key_dim, spec.key_dim, h * spec.latent_dim,
            h * spec.value_dim, h if spec.gate != "none" else 0,
        )  # fmt: skip

    @staticmethod
    def state_bytes(spec: MlaSpec, context: int, types: KvTypes, chunk: int) -> int:
        """See `Mixer.state_bytes`."""
        return Latents.bytes(spec, context, types)

    @staticmethod
    def read_bytes(spec: MlaSpec, length: int, types: KvTypes) -> int:
        """See `Mixer.read_bytes`: all heads read the same latents."""
        return Latents.bytes(spec, 32, types) * length // 32

    def make_state(self) -> Latents:
        """See `Mixer.make_state`."""
        return Latents(self.ops, self.spec, self.context, self.types.keys)

    def start(self, batch: Batch) -> Hashable | None:
        """See `Mixer.start`: slices scratch and rotations into the rows of each sequence, once for all layers."""
        parts: list[tuple[list[Any], int, Any, Any, Any, Any, Any, Any]] = []
        for part in batch.slices:
            _, q, absorbed, keys, out, *_ = self._rows.between(part.start, part.stop)
            turn = _UNTURNED
            if self.rope is not None:
                turn = self.rope.rows.between(part.start, part.stop)
            state = part.state
            parts.append((state.layers, state.held, q, absorbed, keys, *turn, out))
        batch.shared[self] = (self._rows.first(len(batch.ids)), parts)
        return self.ops.place(self.spec, state.held) if len(batch.ids) == 1 else None

    def layer(self, index: int, weights: Mapping[str, Weight]) -> MlaLayer:
        """See `Mixer.layer`."""
        return MlaLayer(self, index, weights)


class MlaLayer:
    """The latent attention of one layer. Implements `MixerLayer`."""

    def __init__(self, shared: Mla, index: int, weights: Mapping[str, Weight]) -> None:
        matrices = cast(Mapping[str, Matrix], weights)
        self._shared, self._ops, self._index = shared, shared.ops, index
        self._weights = shared.ops.latent_weights(index, shared.spec, weights)
        q_b = matrices.get("q_b")
        self._matrices = LatentMatrices(
            heads=shared.spec.num_heads, kv_a=matrices["kv_a"],
            q_a=matrices["q_direct" if q_b is None else "q_a"],
            q_norm=cast("Array | None", weights.get("q_a_norm")), q_b=q_b,
            k_b=matrices["k_b"], v_b=matrices["v_b"], out=matrices["o"],
        )  # fmt: skip
        self._gate = cast("Array | None", weights.get("q_gate"))

    def forward(self, normed: Array, batch: Batch, out: Array) -> None:
        """See `MixerLayer.forward`."""
        ops, index, spec, matrices = self._ops, self._index, self._shared.spec, self._matrices
        rows, parts = batch.shared[self._shared]
        if len(parts) == 1 and self._gate is None:
            states, pos, *_, cos, sin, _ = parts[0]
            ops.attend_latents(
                self._weights, normed, matrices, spec.norm_eps, rows[:6], pos, cos, sin,
                states[index].layer, out,
            )  # fmt: skip
            return
        latents, values, gate = rows[4:]
        absorb_queries(ops, normed, matrices, spec.norm_eps, rows[:4])
        for states, pos, queries, brought, new, cos, sin, to in parts:
            ops.latent_attention(
                self._weights, queries, brought, new, pos, cos, sin, states[index].layer, to
            )
        ops.linear_heads(latents, matrices.v_b, matrices.heads, values)
        if self._gate is not None:
            ops.linear_f32(normed, (self._gate,), (gate,))
            ops.gate_heads(values, gate, spec.gate)
        ops.linear(values, (matrices.out,), (out,))

"""Verbs of attention, over keys and values or over latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from edgemoe.ops.values import (
    Array,
    AttentionMatrices,
    AttentionWeights,
    KvLayer,
    LatentMatrices,
    LatentWeights,
    Matrix,
    RopeTable,
)
from edgemoe.specs import AttentionSpec, MlaSpec

__all__ = ["AttentionVerbs"]


class AttentionVerbs(Protocol):
    """The attention verbs of a device; see `Ops`."""

    def kv_layer(
        self, spec: AttentionSpec, keys: str, values: str, capacity: int, *, resident: bool = False
    ) -> KvLayer:
        """Returns memory for the keys and values of `capacity` positions, stored as the types `keys` and `values`.

        Position p is stored at p modulo the capacity; see `kv_ring`.

        Args:
            resident: whether all of its memory is resident from the start, also if it is small. Otherwise that of a
                small layer becomes resident as it is written to.
        """

    def copy_kv(self, source: KvLayer, target: KvLayer, begin: int, end: int) -> None:
        """Copies the keys and values of positions [begin, end) from one layer to another."""

    def attention_weights(
        self, layer: int, spec: AttentionSpec, tensors: Mapping[str, Array | Matrix], keys: str
    ) -> AttentionWeights:
        """Returns what `attention` needs of a layer besides its matrices.

        Args:
            layer: its number, for error messages.
            spec: how it computes.
            tensors: all of the layer's tensors, by their names within the layer.
            keys: the type in which caches store keys. Quantised keys are stored without large biases, which are added
                to the attention scores instead.
        """

    def rope_table(self, frequencies: Array, scale: float) -> RopeTable:
        """Returns a table of rotations; `scale` multiplies cosines and sines."""

    def rope(self, table: RopeTable, pos: int, cos: Array, sin: Array) -> None:
        """cos and sin [T, rope_dim / 2] = the rotations of the T positions from `pos`."""

    def attention(
        self,
        weights: AttentionWeights,
        q: Array,
        k: Array,
        v: Array,
        pos: int,
        cos: Array | None,
        sin: Array | None,
        table: RopeTable | None,
        kv: KvLayer,
        out: Array,
    ) -> None:
        """Biases, norms and rotates q, k and v in place, stores k and v from position `pos` in kv, attends causally.

        q and out [T, heads * head_dim], k and v [T, kv_heads * head_dim]. cos and sin are from `rope`; they and `table`
        are None for attention without positions. Positions before `pos` are left as they are.

        Raises:
            RangeError: a key or value does not fit the type of kv; names the layer, the number and the type. A device
                may raise it only at the next verb that waits.
        """

    def attend(
        self,
        weights: AttentionWeights,
        x: Array,
        matrices: AttentionMatrices,
        rows: tuple[Array, Array, Array],
        pos: int,
        cos: Array | None,
        sin: Array | None,
        table: RopeTable | None,
        kv: KvLayer,
        heads: Array,
        out: Array,
    ) -> None:
        """`linear` of x [T, D] to q, k and v, then `attention` to heads, then `linear` of heads to out [T, D].

        It is a single call because with one token the CPU's threads would idle between several.

        Args:
            matrices: those of q, k and v, and that of the output.
            rows: scratch for q, k and v.
            heads: scratch [T, heads * head_dim].
        """

    def gate_heads(self, x: Array, gate: Array, kind: str) -> None:
        """x [T, heads * head_dim] *= an activation of the gate.

        Args:
            kind: "sigmoid" for a gate [T, heads * head_dim], or "sigmoid_head" or "softplus_head" for one [T, heads].
        """

    def latents(self, spec: MlaSpec, kind: str, capacity: int) -> KvLayer:
        """Returns memory for the latents of `capacity` positions, stored as the type `kind`."""

    def latent_weights(
        self, layer: int, spec: MlaSpec, tensors: Mapping[str, Array | Matrix]
    ) -> LatentWeights:
        """Returns what `latent_attention` needs of a layer besides its matrices; see `attention_weights`."""

    def latent_attention(
        self,
        weights: LatentWeights,
        q: Array,
        absorbed: Array,
        keys: Array,
        pos: int,
        cos: Array | None,
        sin: Array | None,
        kv: KvLayer,
        out: Array,
    ) -> None:
        """Attends causally to latents: one key per position for all heads, whose leading columns are also the value.

        Norms and rotates keys [T, latent + rope] in place, and stores them in kv from position `pos`. absorbed
        [T, heads * (latent + rope)] holds the result of `linear_heads` on q [T, heads * (nope + rope)]; its last
        columns of each head are set to those of q, rotated. cos and sin are from `rope`, or None for attention without
        positions. out [T, heads * latent].

        Raises:
            RangeError: see `attention`.
        """

    def attend_latents(
        self,
        weights: LatentWeights,
        x: Array,
        matrices: LatentMatrices,
        eps: float,
        rows: Sequence[Array],
        pos: int,
        cos: Array | None,
        sin: Array | None,
        kv: KvLayer,
        out: Array,
    ) -> None:
        """Runs latent attention of one sequence, without a gate, on x [T, D] to out [T, D], in one call as `attend`.

        Args:
            eps: of the norm after q_a.
            rows: scratch for the results of q_a, q_b, k_b and kv_a, for the heads' outputs before v_b, and after it.
        """

"""Verbs of attention: to keys and values, or to latents."""

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
    """Are a device's; see `Ops`."""

    def kv_layer(
        self, spec: AttentionSpec, keys: str, values: str, capacity: int, *, resident: bool = False
    ) -> KvLayer:
        """Returns room for `capacity` positions, stored as the kinds `keys` and `values`.

        A position lies where its remainder by the capacity says; see `kv_ring`. Where it is not `resident`, a small
        one's memory is taken as it is written to.
        """

    def copy_kv(self, source: KvLayer, target: KvLayer, begin: int, end: int) -> None:
        """Copies positions [begin, end) from one layer to another."""

    def attention_weights(
        self, layer: int, spec: AttentionSpec, tensors: Mapping[str, Array | Matrix], keys: str
    ) -> AttentionWeights:
        """Returns what `attention` needs of a layer beside its matrices, from its tensors by name.

        Args:
            layer: its number, for errors.
            spec: how it computes.
            tensors: all that the file has of it.
            keys: the kind that caches store keys as. Those in codes leave large biases out, and scores have them.
        """

    def rope_table(self, frequencies: Array, scale: float) -> RopeTable:
        """Returns what turns positions; `scale` multiplies cosines and sines."""

    def rope(self, table: RopeTable, pos: int, cos: Array, sin: Array) -> None:
        """cos and sin [T, rope_dim / 2] for the positions from `pos`."""

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
        """Biases, norms and rotates q, k, v in place, stores k and v at `pos` in kv and attends causally.

        q and out [T, heads * head_dim], k and v [T, kv_heads * head_dim]; cos and sin are what `rope` gave, None
        with `table` where positions turn nothing. Positions before `pos` stay as they are.

        Raises:
            RangeError: a key or value does not fit the type of kv; names the layer, the number and what holds it.
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
        """`linear` of x [T, D] to q, k and v, `attention` to heads, and `linear` of these to out [T, D].

        All of it at once: between calls of a single token's layer processors would wait.

        Args:
            matrices: of q, k, v, and of the output.
            rows: scratch for q, k and v.
        """

    def gate_heads(self, x: Array, gate: Array, kind: str) -> None:
        """x [T, heads * head_dim] *= what a gate says.

        kind: "sigmoid" of gate [T, heads * head_dim], or "sigmoid_head" or "softplus_head" of gate [T, heads].
        """

    def latents(self, spec: MlaSpec, kind: str, capacity: int) -> KvLayer:
        """Returns room for the latents of `capacity` positions, stored as `kind`."""

    def latent_weights(
        self, layer: int, spec: MlaSpec, tensors: Mapping[str, Array | Matrix]
    ) -> LatentWeights:
        """Returns what `latent_attention` needs of a layer beside its matrices; see `attention_weights`."""

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
        """Attends causally to latents, which are one key for all heads, and whose leading columns are the values.

        Norms and rotates keys [T, latent + rope] in place and stores them at `pos` in kv. absorbed [T, heads *
        (latent + rope)] has what `linear_heads` made of q [T, heads * (nope + rope)], and gets q's rotated columns;
        cos and sin are what `rope` gave, or None where positions turn nothing. out [T, heads * latent].

        Raises:
            RangeError: as `attention`.
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
        """Is all of a layer of latent attention on x [T, D], with one state and without a gate, at once; as `attend`.

        Args:
            eps: of the norm after q_a.
            rows: scratch for what q_a, q_b, k_b and kv_a give, what heads see, and what v_b makes of that.
        """

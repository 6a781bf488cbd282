"""Verbs of attention on a CPU; see `edgemoe.ops.attention`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from edgemoe import _core
from edgemoe.ops.cpu.memory import CpuMemory
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

__all__ = ["CpuAttention"]


class CpuAttention(CpuMemory):
    """The attention verbs of a CPU; see `CpuOps`."""

    def kv_layer(
        self, spec: AttentionSpec, keys: str, values: str, capacity: int, *, resident: bool = False
    ) -> KvLayer:
        """See `Ops.kv_layer`."""
        return _core.KvLayer(
            key_type=keys, value_type=values, num_heads=spec.num_kv_heads, capacity=capacity,
            head_dim=spec.head_dim, resident=resident,
        )  # fmt: skip

    def copy_kv(self, source: KvLayer, target: KvLayer, begin: int, end: int) -> None:
        """See `Ops.copy_kv`."""
        target.take(source, begin, end)

    def attention_weights(
        self, layer: int, spec: AttentionSpec, tensors: Mapping[str, Array | Matrix], keys: str
    ) -> AttentionWeights:
        """See `Ops.attention_weights`."""

        def array(name: str) -> Array | None:
            return cast("Array | None", tensors.get(name))

        parts = spec.has_constant_keys and not keys.startswith("f")
        ones = np.ones(spec.head_dim, np.float32) if spec.qk_norm == "unit" else None
        return _core.AttentionLayer(
            index=layer, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
            window=spec.window, scale=spec.scale, norm_per_head=spec.qk_norm in ("head", "unit"),
            norm_eps=spec.norm_eps, clip=spec.clip or 0.0,
            q_bias=array("q_bias"), k_bias=array("k_bias"), v_bias=array("v_bias"),
            q_norm=array("q_norm") if ones is None else ones, k_norm=array("k_norm") if ones is None else ones,
            k=cast(Matrix, tensors["k"]) if parts else None,
            input_norm=array("attn_norm") if parts else None,
            rope_dim=spec.rope_dim, norm_after_rope=spec.norm_after_rope,
            sinks=array("sinks"), v_norm=spec.v_norm, chunk=spec.chunk, growth=spec.growth,
            grow_every=spec.grow_every,
        )  # fmt: skip

    def rope_table(self, frequencies: Array, scale: float) -> RopeTable:
        """See `Ops.rope_table`."""
        return _core.Rope(frequencies, scale)

    def rope(self, table: RopeTable, pos: int, cos: Array, sin: Array) -> None:
        """See `Ops.rope`."""
        table.angles(pos, cos, sin)

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
        """See `Ops.attention`."""
        if cos is None or sin is None:
            cos = sin = np.empty((len(q), 0), np.float32)
        _core.attention(self._ws, weights, q, k, v, pos, cos, sin, table, kv, out)

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
        """See `Ops.attend`."""
        if cos is None or sin is None:
            cos = sin = np.empty((len(x), 0), np.float32)
        qkv, o = matrices
        _core.attend(self._ws, weights, x, qkv, o, *rows, pos, cos, sin, table, kv, heads, out)

    def gate_heads(self, x: Array, gate: Array, kind: str) -> None:
        """See `Ops.gate_heads`."""
        _core.gate_attention(self._ws, x, gate, kind)

    def latents(self, spec: MlaSpec, kind: str, capacity: int) -> KvLayer:
        """See `Ops.latents`."""
        return _core.KvLayer.latents(
            type=kind, capacity=capacity, head_dim=spec.key_dim, value_dim=spec.latent_dim
        )

    def latent_weights(
        self, layer: int, spec: MlaSpec, tensors: Mapping[str, Array | Matrix]
    ) -> LatentWeights:
        """See `Ops.latent_weights`."""
        return _core.LatentLayer(
            index=layer, num_heads=spec.num_heads, nope_dim=spec.nope_dim, rope_dim=spec.rope_dim,
            latent_dim=spec.latent_dim, scale=spec.scale, rotates=spec.rope is not None,
            grow_every=spec.grow_every, growth=spec.growth,
            norm=cast(Array, tensors["kv_a_norm"]), norm_eps=spec.norm_eps,
        )  # fmt: skip

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
        """See `Ops.latent_attention`."""
        _core.latent_attention(self._ws, weights, q, absorbed, keys, pos, cos, sin, kv, out)

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
        """See `Ops.attend_latents`."""
        _, kv_a, q_a, q_norm, q_b, k_b, v_b, o = matrices
        _core.attend_latents(
            self._ws, weights, x, (kv_a, q_a, q_b, k_b, v_b, o), q_norm, eps, rows, pos, cos, sin,
            kv, out,
        )  # fmt: skip

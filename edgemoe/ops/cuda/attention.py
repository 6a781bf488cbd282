"""Verbs of attention on a device; see `edgemoe.ops.attention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgemoe import _core
from edgemoe.ops.cuda.memory import Array, CudaMemory, HostArray
from edgemoe.ops.steps import attend_in_steps, attend_latents_in_steps
from edgemoe.specs import AttentionSpec, MlaSpec

__all__ = ["CudaAttention"]


class CudaAttention(CudaMemory):
    """The attention verbs of a device; see `CudaOps`."""

    def kv_layer(
        self, spec: AttentionSpec, keys: str, values: str, capacity: int, *, resident: bool = True
    ) -> _core.DeviceKvLayer:
        """See `Ops.kv_layer`; memory of a device is allocated in full from the start."""
        return _core.DeviceKvLayer(
            device=self._device, key_type=keys, value_type=values, num_heads=spec.num_kv_heads,
            capacity=capacity, head_dim=spec.head_dim,
        )  # fmt: skip

    def copy_kv(
        self, source: _core.DeviceKvLayer, target: _core.DeviceKvLayer, begin: int, end: int
    ) -> None:
        """See `Ops.copy_kv`."""
        target.take(source, begin, end)

    def attention_weights(
        self, layer: int, spec: AttentionSpec, tensors: Mapping[str, Any], keys: str
    ) -> _core.DeviceAttention:
        """See `Ops.attention_weights`."""
        q_norm, k_norm, ones = tensors.get("q_norm"), tensors.get("k_norm"), None
        if spec.qk_norm == "unit" or spec.v_norm:
            ones = self.empty(spec.head_dim)
            ones.upload(np.ones(spec.head_dim, np.float32))
        if spec.qk_norm == "unit":
            q_norm = k_norm = ones
        return _core.DeviceAttention(
            index=layer, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
            window=spec.window, scale=spec.scale, q_bias=tensors.get("q_bias"), k_bias=tensors.get("k_bias"),
            v_bias=tensors.get("v_bias"), q_norm=q_norm, k_norm=k_norm, v_norm=ones if spec.v_norm else None,
            sinks=tensors.get("sinks"), norm_per_head=spec.qk_norm in ("head", "unit"), norm_eps=spec.norm_eps,
            clip=spec.clip or 0.0, rope_dim=spec.rope_dim, norm_after_rope=spec.norm_after_rope,
            chunk=spec.chunk, growth=spec.growth, grow_every=spec.grow_every,
        )  # fmt: skip

    def rope_table(self, frequencies: HostArray, scale: float) -> _core.Rope:
        """See `Ops.rope_table`."""
        return _core.Rope(frequencies, scale)

    def rope(self, table: _core.Rope, pos: int, cos: Array, sin: Array) -> None:
        """See `Ops.rope`."""
        host = np.empty((2, *cos.shape), np.float32)
        table.angles(pos, host[0], host[1])
        cos.upload(host[0])
        sin.upload(host[1])

    def attention(
        self,
        weights: _core.DeviceAttention,
        q: Array,
        k: Array,
        v: Array,
        pos: int,
        cos: Array | None,
        sin: Array | None,
        table: _core.Rope | None,
        kv: _core.DeviceKvLayer,
        out: Array,
    ) -> None:
        """See `Ops.attention`; its errors are raised by the next verb that waits."""
        if cos is None or sin is None:
            cos = sin = self._unturned[: len(q)]
        _core.device_attention(self._ws, weights, q, k, v, pos, cos, sin, kv, out)

    attend = attend_in_steps  # calls only queue kernels, so that several cost no waiting

    def gate_heads(self, x: Array, gate: Array, kind: str) -> None:
        """See `Ops.gate_heads`."""
        _core.device_gate_attention(self._ws, x, gate, kind)

    def latents(self, spec: MlaSpec, kind: str, capacity: int) -> _core.DeviceKvLayer:
        """See `Ops.latents`; memory of a device is allocated in full from the start."""
        return _core.DeviceKvLayer.latents(
            device=self._device, type=kind, capacity=capacity, head_dim=spec.key_dim,
            value_dim=spec.latent_dim,
        )  # fmt: skip

    def latent_weights(
        self, layer: int, spec: MlaSpec, tensors: Mapping[str, Any]
    ) -> _core.DeviceLatents:
        """See `Ops.latent_weights`."""
        return _core.DeviceLatents(
            index=layer, num_heads=spec.num_heads, nope_dim=spec.nope_dim, rope_dim=spec.rope_dim,
            latent_dim=spec.latent_dim, scale=spec.scale, rotates=spec.rope is not None,
            grow_every=spec.grow_every, growth=spec.growth, norm=tensors["kv_a_norm"],
            norm_eps=spec.norm_eps,
        )  # fmt: skip

    def latent_attention(
        self,
        weights: _core.DeviceLatents,
        q: Array,
        absorbed: Array,
        keys: Array,
        pos: int,
        cos: Array | None,
        sin: Array | None,
        kv: _core.DeviceKvLayer,
        out: Array,
    ) -> None:
        """See `Ops.latent_attention`; its errors are raised by the next verb that waits."""
        _core.device_latent_attention(self._ws, weights, q, absorbed, keys, pos, cos, sin, kv, out)

    attend_latents = attend_latents_in_steps  # as `attend`

"""Verbs of mixers that are not attention, on a device; see `edgemoe.ops_cuda`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgemoe import _core
from edgemoe.ops import DeltaRule, MambaRule, attend_latents_in_steps
from edgemoe.specs import MlaSpec

__all__ = ["Array", "CudaMixers"]

Array = _core.DeviceArray


class CudaMixers:
    """Is the part of `CudaOps` for them."""

    def __init__(self, device: _core.Device, ws: _core.DeviceWorkspace) -> None:
        self._device, self._ws = device, ws
        self._x_of: Array | None = None
        """What the host has a copy of."""

    def empty(self, *shape: int) -> Array:
        """See `Ops.empty`."""
        return _core.DeviceArray(self._device, shape)

    def linear_f32(self, x: Array, weights: Sequence[Array], outs: Sequence[Array]) -> None:
        """See `Ops.linear_f32`."""
        for weight, out in zip(weights, outs, strict=True):
            _core.device_matmul(self._ws, x, weight, out)

    def linear_heads(self, x: Array, weight: _core.DeviceMatrix, heads: int, out: Array) -> None:
        """See `Ops.linear_heads`."""
        _core.device_linear_heads(self._ws, x, weight, heads, out)

    def multiply(self, factors: Array, out: Array) -> None:
        """See `Ops.multiply`."""
        self._x_of = None
        _core.device_multiply(self._ws, factors, out)

    def gate_heads(self, x: Array, gate: Array, kind: str) -> None:
        """See `Ops.gate_heads`."""
        _core.device_gate_attention(self._ws, x, gate, kind)

    def short_conv(
        self,
        x: Array,
        weight: Array,
        bias: Array | None,
        before: Array | None,
        after: Array,
        out: Array,
        *,
        silu: bool,
    ) -> None:
        """See `Ops.short_conv`."""
        _core.device_short_conv(self._ws, x, weight, bias, before, after, silu, out)

    def delta_rule(
        self,
        qkv: Array,
        decay: Array,
        beta: Array,
        rule: DeltaRule,
        before: Array | None,
        after: Array,
        out: Array,
    ) -> None:
        """See `Ops.delta_rule`."""
        kept: Any = rule
        _core.device_delta_rule(
            self._ws, qkv, decay, beta, kept.rate, kept.bias, rule.key_heads, rule.bounded, before,
            after, out,
        )  # fmt: skip

    def mamba2(
        self,
        xbc: Array,
        step: Array,
        decay: Array,
        rule: MambaRule,
        before: Array | None,
        after: Array,
        out: Array,
    ) -> None:
        """See `Ops.mamba2`."""
        kept: Any = rule
        _core.device_mamba2(
            self._ws, xbc, step, decay, kept.rate, kept.step_bias, kept.skip, rule.groups, before,
            after, out,
        )  # fmt: skip

    def gated_norm(
        self, x: Array, gate: Array, weight: Array, eps: float, groups: int, kind: str
    ) -> None:
        """See `Ops.gated_norm`."""
        _core.device_gated_norm(self._ws, x, gate, weight, eps, groups, kind)

    def latents(self, spec: MlaSpec, kind: str, capacity: int) -> _core.DeviceKvLayer:
        """See `Ops.latents`; memory of a device is taken at once."""
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

    attend_latents = attend_latents_in_steps  # a queue waits for nobody

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
        """See `Ops.latent_attention`; what it raises is raised by the next verb that waits."""
        _core.device_latent_attention(self._ws, weights, q, absorbed, keys, pos, cos, sin, kv, out)

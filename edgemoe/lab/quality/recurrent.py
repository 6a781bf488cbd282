"""Mixers with a state of fixed size, in float32 numpy, on one sequence from its start."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.numpy_ops import rms_norm, silu
from edgemoe.specs import ConvSpec, DeltaSpec, MambaSpec

__all__ = ["conv", "delta", "mamba", "sigmoid", "softplus"]

Array = NDArray[np.float32]
_LENGTH_EPS = np.float32(1e-6)


def delta(spec: DeltaSpec, layer: Mapping[str, Array], x: Array) -> Array:
    """Returns the output [T, D] of the gated delta rule on x [T, D]."""
    T, keys, values = len(x), spec.key_heads, spec.value_heads
    qkv = silu(_short_conv(x @ layer["qkv"].T, layer["conv"]))
    q, k, v = np.split(qkv, [spec.key_width, 2 * spec.key_width], axis=1)
    q, k = (_unit(a.reshape(T, keys, -1)).repeat(values // keys, axis=1) for a in (q, k))
    q *= np.float32(spec.key_dim**-0.5)
    v = v.reshape(T, values, -1)
    rate = layer["decay_rate"][:, None]
    through = x @ layer["decay_in"].T if spec.decay_rank else x
    steps = (through @ layer["decay"].T + layer["decay_bias"]).reshape(T, values, -1)
    decay = np.exp(-5 * sigmoid(rate * steps) if spec.bounded else -rate * softplus(steps))
    beta = sigmoid(x @ layer["beta"].T)
    state = np.zeros((values, spec.key_dim, spec.value_dim), np.float32)
    out = np.empty_like(v)
    for t in range(T):
        state *= decay[t][:, :, None]
        change = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", state, k[t]))
        state += k[t][:, :, None] * change[:, None, :]
        out[t] = np.einsum("hkv,hk->hv", state, q[t])
    gate = x @ layer["z_in"].T @ layer["z_out"].T if spec.gate_rank else x @ layer["z"].T
    gate = gate.reshape(out.shape)
    mixed = rms_norm(out, layer["head_norm"], spec.norm_eps)
    mixed *= silu(gate) if spec.gate == "silu" else sigmoid(gate)
    added: Array = mixed.reshape(T, -1) @ layer["o"].T
    return added


def mamba(spec: MambaSpec, layer: Mapping[str, Array], x: Array) -> Array:
    """Returns the output [T, D] of Mamba-2 on x [T, D]."""
    T, heads, groups = len(x), spec.num_heads, spec.groups
    bias = layer.get("conv_bias", np.float32(0))
    xbc = silu(_short_conv(x @ layer["xbc"].T, layer["conv"]) + bias)
    at = spec.groups * spec.state_dim
    u, b, c = np.split(xbc, [spec.width, spec.width + at], axis=1)
    u = u.reshape(T, heads, -1)
    b, c = (a.reshape(T, groups, -1).repeat(heads // groups, axis=1) for a in (b, c))
    steps = softplus(x @ layer["step"].T + layer["step_bias"])
    decay = np.exp(-layer["decay_rate"] * steps)
    state = np.zeros((heads, spec.state_dim, spec.head_dim), np.float32)
    out = np.empty_like(u)
    for t in range(T):
        state *= decay[t][:, None, None]
        state += b[t][:, :, None] * (steps[t][:, None] * u[t])[:, None, :]
        out[t] = np.einsum("hnp,hn->hp", state, c[t]) + layer["skip"][:, None] * u[t]
    mixed = out.reshape(T, -1) * silu(x @ layer["x_gate"].T)
    parts = mixed.reshape(T, groups, -1)
    parts = rms_norm(parts, layer["head_norm"].reshape(groups, -1), spec.norm_eps)
    added: Array = parts.reshape(T, -1) @ layer["o"].T
    return added


def conv(spec: ConvSpec, layer: Mapping[str, Array], x: Array) -> Array:
    """Returns the output [T, D] of the gated short convolution on x [T, D]."""
    u, b, c = (x @ layer[name].T for name in "ubc")
    added: Array = (c * _short_conv(b * u, layer["conv"])) @ layer["o"].T
    return added


def sigmoid(x: Array) -> Array:
    """Returns 1 / (1 + exp(-x))."""
    with np.errstate(over="ignore"):  # 1 / (1 + inf) is the right answer
        out: Array = np.float32(1) / (np.float32(1) + np.exp(-x))
    return out


def softplus(x: Array) -> Array:
    """Returns log(1 + exp(x))."""
    return np.asarray(np.logaddexp(np.float32(0), x))


def _short_conv(x: Array, weight: Array) -> Array:
    """Returns a causal convolution of each channel of x [T, C]; weight [taps, C] ends with the newest token's tap."""
    past = np.concatenate([np.zeros((len(weight) - 1, x.shape[1]), np.float32), x])
    out = np.zeros_like(x)
    for j, w in enumerate(weight):
        out += past[j : j + len(x)] * w
    return out


def _unit(x: Array) -> Array:
    return np.asarray(x / np.sqrt(np.sum(np.square(x), axis=-1, keepdims=True) + _LENGTH_EPS))

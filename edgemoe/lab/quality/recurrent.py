"""Mixers with a state that does not grow, in float32 numpy, on one sequence from its start."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.numpy_ops import rms_norm, silu
from edgemoe.specs import DeltaSpec

__all__ = ["delta", "sigmoid", "softplus"]

Array = NDArray[np.float32]
_LENGTH_EPS = np.float32(1e-6)


def delta(spec: DeltaSpec, layer: Mapping[str, Array], x: Array) -> Array:
    """Returns what the gated delta rule makes of x [T, D]."""
    T, keys, values = len(x), spec.key_heads, spec.value_heads
    qkv = silu(_short_conv(x @ layer["qkv"].T, layer["conv"]))
    q, k, v = np.split(qkv, [spec.key_width, 2 * spec.key_width], axis=1)
    q, k = (_unit(a.reshape(T, keys, -1)).repeat(values // keys, axis=1) for a in (q, k))
    q *= np.float32(spec.key_dim**-0.5)
    v = v.reshape(T, values, -1)
    rate = layer["decay_rate"][:, None]
    steps = softplus(x @ layer["decay"].T + layer["decay_bias"]).reshape(T, values, -1)
    decay, beta = np.exp(-rate * steps), sigmoid(x @ layer["beta"].T)
    state = np.zeros((values, spec.key_dim, spec.value_dim), np.float32)
    out = np.empty_like(v)
    for t in range(T):
        state *= decay[t][:, :, None]
        change = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", state, k[t]))
        state += k[t][:, :, None] * change[:, None, :]
        out[t] = np.einsum("hkv,hk->hv", state, q[t])
    gate = (x @ layer["z"].T).reshape(out.shape)
    mixed = rms_norm(out, layer["head_norm"], spec.norm_eps)
    mixed *= silu(gate) if spec.gate == "silu" else sigmoid(gate)
    added: Array = mixed.reshape(T, -1) @ layer["o"].T
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
    """Convolves each channel of x [T, C] with the last tokens' values; weight [taps, C], the newest one's last."""
    past = np.concatenate([np.zeros((len(weight) - 1, x.shape[1]), np.float32), x])
    out = np.zeros_like(x)
    for j, w in enumerate(weight):
        out += past[j : j + len(x)] * w
    return out


def _unit(x: Array) -> Array:
    return np.asarray(x / np.sqrt(np.sum(np.square(x), axis=-1, keepdims=True) + _LENGTH_EPS))

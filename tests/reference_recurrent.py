"""Recurrent mixers in plain numpy, float64: the slow, obvious version that the kernels must agree with."""

from __future__ import annotations

import numpy as np


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, x)


def short_conv(x, weight, bias, tail, *, with_silu):
    """Convolves x [T, C] by weight [taps, C] after tail [taps - 1, C]; returns the output and the next tail."""
    past = np.concatenate([tail, x])
    y = sum(past[j : j + len(x)] * w for j, w in enumerate(weight)) + bias
    return silu(y) if with_silu else y, past[len(past) - len(tail) :]


def delta_rule(qkv, decay, beta, rate, bias, key_heads, state, *, bounded):
    """Gated DeltaNet (arXiv 2412.06464) or, with a decay per channel, Kimi Delta Attention (2510.26692)."""
    Hv, dk, dv = state.shape
    n = key_heads * dk
    q = qkv[:, :n].reshape(-1, key_heads, dk)
    k = qkv[:, n : 2 * n].reshape(-1, key_heads, dk)
    v = qkv[:, 2 * n :].reshape(-1, Hv, dv)
    q = q / np.sqrt((q**2).sum(-1, keepdims=True) + 1e-6) / np.sqrt(dk)
    k = k / np.sqrt((k**2).sum(-1, keepdims=True) + 1e-6)
    q, k = (np.repeat(a, Hv // key_heads, axis=1) for a in (q, k))
    at = (decay + bias).reshape(len(qkv), Hv, -1)
    rate = rate[None, :, None]
    a = np.exp(-5 * sigmoid(rate * at) if bounded else -rate * softplus(at))
    b = sigmoid(beta)
    S, out = state.copy(), np.empty_like(v)
    for t in range(len(qkv)):
        S = S * a[t][:, :, None]  # decay first
        d = b[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", S, k[t]))
        S = S + k[t][:, :, None] * d[:, None, :]
        out[t] = np.einsum("hkv,hk->hv", S, q[t])  # read after the update
    return out.reshape(len(qkv), -1), S


def mamba2(xbc, step, rate, step_bias, skip, groups, state):
    """Mamba-2's state space layer (arXiv 2405.21060)."""
    H, N, P = state.shape
    x = xbc[:, : H * P].reshape(-1, H, P)
    b, c = (
        np.repeat(part.reshape(-1, groups, N), H // groups, axis=1)
        for part in np.split(xbc[:, H * P :], 2, axis=1)
    )
    d = softplus(step + step_bias)
    S, out = state.copy(), np.empty_like(x)
    for t in range(len(xbc)):
        S = np.exp(-d[t] * rate)[:, None, None] * S
        S = S + b[t][:, :, None] * (d[t][:, None] * x[t])[:, None, :]
        out[t] = np.einsum("hnp,hn->hp", S, c[t]) + skip[:, None] * x[t]
    return out.reshape(len(xbc), -1), S


def gated_norm(x, gate, weight, eps, groups, kind):
    def norm(y):
        y = y.reshape(len(y), groups, -1)
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + eps)
        return (y * weight.reshape(-1, y.shape[2])).reshape(len(y), -1)

    if kind == "silu_first":
        return norm(x * silu(gate))
    return norm(x) * (silu(gate) if kind == "silu" else sigmoid(gate))

"""The operations of a transformer in float32 numpy, on whole sequences: for models before any quantisation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["activated", "attention", "rms_norm", "rotated", "silu"]

Array = NDArray[np.float32]


def silu(x: Array) -> Array:
    """Returns x * sigmoid(x)."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        return np.asarray(x / (1 + np.exp(-x)))


def activated(kind: str, gate: Array, up: Array) -> Array:
    """Returns the input of w_down from the outputs of w_gate and w_up; see `edgemoe.specs.Activation`."""
    if kind == "relu2":
        return np.asarray(np.square(np.maximum(up, 0)))
    if kind == "geglu":  # (1 + tanh(z / 2)) / 2 is the sigmoid of z
        z = np.float32(2 * math.sqrt(2 / math.pi)) * (gate + np.float32(0.044715) * gate**3)
    elif kind == "clamped_swiglu":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7) + 1
        z = np.float32(1.702) * gate
    else:
        z = gate
    with np.errstate(over="ignore"):  # exp(-z) = inf gives the right limit, 0
        return np.asarray(gate / (1 + np.exp(-z)) * up)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Scales the last axis to unit root mean square, times `weight`."""
    scale = 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(eps))
    return np.asarray(x * scale * weight)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    sinks: Array | None = None,
) -> Array:
    """Causal attention of q [N, H, S, d] over k [N, H_kv, S, d] and v [N, H_kv, S, dv]; returns [N * S, H * dv].

    Args:
        scale: multiplies q · k.
        window: each position sees this many last positions, itself included; 0 for all.
        chunk: positions are divided into chunks of this many, and each sees only its own chunk; 0 for all.
        sinks: [H], an additional logit for each head, whose value vector is zero.
    """
    (count, heads, length, _), dim = q.shape, v.shape[3]
    group = heads // k.shape[1]
    unseen = np.triu(np.full((length, length), -np.inf, np.float32), 1)
    if window:
        unseen += np.tril(np.full((length, length), -np.inf, np.float32), -window)
    if chunk:
        begins = np.arange(length) // chunk * chunk
        unseen[np.arange(length) < begins[:, None]] = -np.inf
    out = np.empty((count, length, heads, dim), np.float32)
    for n in range(count):
        for h in range(heads):  # one [S, S] block at a time keeps it in cache
            scores = q[n, h] @ k[n, h // group].T
            scores *= np.float32(scale)
            scores += unseen
            top = scores.max(axis=-1, keepdims=True)
            if sinks is not None:
                top = np.maximum(top, sinks[h])
            scores -= top
            np.exp(scores, out=scores)
            rest = 0 if sinks is None else np.exp(sinks[h] - top)
            scores /= scores.sum(axis=-1, keepdims=True) + rest
            out[n, :, h] = scores @ v[n, h // group]
    return out.reshape(count * length, heads * dim)


def rotated(x: Array, cos: Array, sin: Array) -> Array:
    """Applies RoPE to the first columns of the last axis; cos and sin [S, half], pair i is (x[i], x[i + half])."""
    half = cos.shape[-1]
    first, second, rest = np.split(x, [half, 2 * half], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)

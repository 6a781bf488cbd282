"""Multi-head latent attention in float64, in the form of the paper (arXiv 2405.04434) and in the absorbed form."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def attend(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Causal attention.

    Args:
        q: [T, H, d].
        k: [T, d] for all heads, or [T, H, d] for each.
        v: [T, dv] for all heads, or [T, H, dv] for each.
        scale: of scores.

    Returns:
        [T, H, dv].
    """
    k, v = (a if a.ndim == 3 else np.repeat(a[:, None], q.shape[1], 1) for a in (k, v))
    out = np.empty((*q.shape[:2], v.shape[2]))
    for t, h in np.ndindex(q.shape[:2]):
        scores = k[: t + 1, h] @ q[t, h] * scale
        weights = np.exp(scores - scores.max())
        out[t, h] = weights @ v[: t + 1, h] / weights.sum()
    return out


def naive(q: Array, latents: Array, turned: Array, k_b: Array, v_b: Array, scale: float) -> Array:
    """The form of the paper: every head has keys and values of its own.

    Args:
        q: [T, H, nope + rope], rotated.
        latents: [T, latent], normed.
        turned: [T, rope], the rotated columns that end the keys of all heads.
        k_b: [H, latent, nope]; its transpose makes a head's key from a latent.
        v_b: [H, value, latent].
        scale: of scores.

    Returns:
        [T, H, value].
    """
    keys = np.einsum("hcn,tc->thn", k_b, latents)
    both = [keys, np.repeat(turned[:, None], q.shape[1], 1)]
    return attend(q, np.concatenate(both, 2), np.einsum("hvc,tc->thv", v_b, latents), scale)


def absorbed(
    q: Array, latents: Array, turned: Array, k_b: Array, v_b: Array, scale: float
) -> Array:
    """The absorbed form: queries are projected to the latents' columns, and outputs from them."""
    nope = k_b.shape[2]
    queries = [np.einsum("thn,hcn->thc", q[..., :nope], k_b), q[..., nope:]]
    keys = np.concatenate([latents, turned], 1)
    out = attend(np.concatenate(queries, 2), keys, latents, scale)
    return np.einsum("thc,hvc->thv", out, v_b)

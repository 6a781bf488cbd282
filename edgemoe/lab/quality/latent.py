"""Multi-head latent attention in float32, in the paper's form, where every head has keys and values of its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.numpy_ops import attention, rms_norm, rotated
from edgemoe.lab.quality.recurrent import sigmoid
from edgemoe.specs import MlaSpec, RopeSpec

__all__ = ["latent_attention"]

Array = NDArray[np.float32]


def latent_attention(
    spec: MlaSpec,
    layer: Mapping[str, Array],
    x: Array,
    turns: Mapping[RopeSpec, tuple[Array, Array]],
) -> Array:
    """Returns the output [T, D] of a layer's attention on one sequence x [T, D].

    Args:
        layer: the layer's tensors, by their names within it.
        turns: for each kind of RoPE, cos and sin of the positions, [T, rope_dim / 2].
    """
    heads, T = spec.num_heads, len(x)
    if spec.q_rank:
        q = rms_norm(x @ layer["q_a"].T, layer["q_a_norm"], spec.norm_eps) @ layer["q_b"].T
    else:
        q = x @ layer["q_direct"].T
    both = x @ layer["kv_a"].T
    latents = rms_norm(both[:, : spec.latent_dim], layer["kv_a_norm"], spec.norm_eps)
    k_b = layer["k_b"].reshape(heads, spec.latent_dim, spec.nope_dim)
    v_b = layer["v_b"].reshape(heads, spec.value_dim, spec.latent_dim)
    queries = q.reshape(T, heads, -1).transpose(1, 0, 2)  # [heads, T, nope + rope]
    turned = np.broadcast_to(both[:, spec.latent_dim :], (heads, T, spec.rope_dim))
    q_turned = queries[:, :, spec.nope_dim :]
    if spec.rope is not None:
        q_turned, turned = (rotated(a, *turns[spec.rope]) for a in (q_turned, turned))
    queries = np.concatenate([queries[:, :, : spec.nope_dim], q_turned], axis=2)
    if spec.growth:
        grown = 1 + spec.growth * np.log1p(np.arange(T) // spec.grow_every)
        queries *= grown.astype(np.float32)[:, None]
    keys = np.concatenate([latents @ k_b, turned], axis=2)
    values = latents @ v_b.transpose(0, 2, 1)
    out = attention(queries[None], keys[None], values[None], scale=spec.scale)
    if spec.gate != "none":
        out *= sigmoid(x @ layer["q_gate"].T).repeat(spec.value_dim, axis=1)
    added: Array = out @ layer["o"].T
    return added

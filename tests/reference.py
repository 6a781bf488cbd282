"""A slow, obvious decoder in numpy, with which every fast path is compared.

It takes a `ModelConfig` and the tensors of `edgemoe.config.dense_tensors`. It computes whole sequences at a time,
without a cache, and knows nothing of families, quantisation or budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import reference_latent
import reference_recurrent
from numpy.typing import NDArray

from edgemoe.config import ModelConfig
from edgemoe.specs import AttentionSpec, ConvSpec, DeltaSpec, MambaSpec, MixerSpec, MlaSpec

Array = NDArray[Any]
Experts = Callable[[int, int], tuple[Array, Array, Array]]
"""(layer, index) -> gate [H, D], up [H, D], down [D, H]."""


def logits(
    config: ModelConfig,
    tensors: Mapping[str, Array],
    experts: Experts,
    ids: list[int],
    *,
    dtype: type[np.floating[Any]] = np.float64,
    gates: dict[int, Array] | None = None,
) -> tuple[Array, dict[int, NDArray[np.int64]]]:
    """Runs the model on one sequence.

    Args:
        gates: a dict that gets the gates of each layer, [T, K], in ascending order of their experts.

    Returns:
        The logits [T, V], and for each layer with experts those chosen, [T, K], best first.
    """

    def tensor(name: str) -> Array:
        return tensors[name].astype(dtype)

    chosen = {}
    x = tensor("embed")[ids] * dtype(config.embedding_multiplier)
    for i in range(config.num_layers):
        layer = {
            name.removeprefix(f"layers.{i}."): tensor(name)
            for name in tensors
            if name.startswith(f"layers.{i}.")
        }
        h = rms_norm(x, layer["attn_norm"], config.norm_eps)
        h = mix(
            config.mixer(i),
            layer,
            {name: tensor(name) for name in tensors if name.startswith("rope")},
            h,
        )
        if config.out_norms:
            h = rms_norm(h, layer["attn_out_norm"], config.norm_eps)
        x = x + h * dtype(config.residual_multiplier)
        if "ffn_norm" not in layer:
            continue
        h = rms_norm(x, layer["ffn_norm"], config.norm_eps)
        out, routed, to_router = np.zeros_like(x), np.zeros_like(x), h
        if config.shared_width(i):
            matrices = (layer.get(f"shared.{name}") for name in ("gate", "up", "down"))
            out = ffn(h, *matrices, config.activation)
            if "shared.sigmoid" in layer:
                out = out / (1 + np.exp(-(h @ layer["shared.sigmoid"])))[:, None]
        if i in config.moe_layers:
            if config.branch_norms:
                out = rms_norm(out, layer["shared.out_norm"], config.norm_eps)
                to_router = rms_norm(x, layer["router_norm"], config.norm_eps)
                h = rms_norm(x, layer["experts_norm"], config.norm_eps)
            z = to_router @ layer["router"].T + layer.get("router_bias", 0)
            chosen[i], shares = route(config, z, layer.get("choice_bias", 0))
            if gates is not None:
                gates[i] = np.take_along_axis(shares, chosen[i].argsort(1), 1)
            for index in np.unique(chosen[i]):
                token, place = np.nonzero(chosen[i] == index)
                matrices = (w.astype(dtype) for w in experts(i, int(index)))
                biases = [layer.get(f"expert_bias.{n}", {index: 0}) for n in ("gate", "up", "down")]
                gate, before = shares[token, place, None], 1
                if config.gate_input:
                    gate, before = 1, gate
                brought = h[token] * before
                y = ffn(brought, *matrices, config.activation, *(b[index] for b in biases))
                routed[token] += gate * y
            if config.branch_norms:
                routed = rms_norm(routed, layer["experts_out_norm"], config.norm_eps)
        out = out + routed
        if config.out_norms:
            out = rms_norm(out, layer["ffn_out_norm"], config.norm_eps)
        x = x * layer.get("layer_scale", 1) + out * dtype(config.residual_multiplier)
    x = rms_norm(x, tensor("norm"), config.norm_eps)
    head = tensor("embed" if config.tied else "head")
    z = x @ head.T + (tensor("head_bias") if config.head_bias else 0)
    z = z / dtype(config.logits_divisor)
    return z if config.soft_cap is None else config.soft_cap * np.tanh(z / config.soft_cap), chosen


def route(
    config: ModelConfig, logits: Array, bias: Array | float = 0
) -> tuple[NDArray[np.int64], Array]:
    """Chooses experts for router logits [T, E]: indices and gates, [T, K], best first."""
    K, chosen, gates = config.experts_per_token, [], []
    for z in logits:
        if config.scoring == "softmax_topk":
            order = np.argsort(-z, kind="stable")[:K]
            weights = softmax(z[order])
        elif config.scoring == "sparsemixer":
            order = np.argsort(-z, kind="stable")[:K]
            weights, rest = np.empty(K), z.copy()
            for i, e in enumerate(order):
                near = (rest[e] - z) / np.maximum(abs(z), rest[e]) <= 0.02
                weights[i] = 1 / np.exp(rest[near] - rest[e]).sum()
                rest[e] = -np.inf
        else:
            scores = 1 / (1 + np.exp(-z)) if config.scoring == "sigmoid" else softmax(z)
            choice = scores + bias
            if config.groups > 1:
                size = len(z) // config.groups
                count = 2 if config.group_score == "top2" else 1
                best = [np.sort(c)[-count:].sum() for c in choice.reshape(-1, size)]
                for g in np.argsort(-np.array(best), kind="stable")[config.used_groups :]:
                    choice[g * size : (g + 1) * size] = -np.inf
            order = np.argsort(-choice, kind="stable")[:K]
            weights = scores[order]
            if config.renormalise:
                weights = weights / weights.sum()
        chosen.append(order)
        gates.append(weights * config.gate_scale)
    return np.array(chosen), np.array(gates)


def mix(spec: MixerSpec, layer: Mapping[str, Array], turns: Mapping[str, Array], x: Array) -> Array:
    """Mixes the tokens of the sequence x [T, D]; `turns` has the model's RoPE frequencies, by the tensors' names."""
    if isinstance(spec, AttentionSpec):
        return attention(spec, layer, turns, x)
    if isinstance(spec, DeltaSpec):
        return delta(spec, layer, x)
    if isinstance(spec, MlaSpec):
        return latent_attention(spec, layer, turns, x)
    if isinstance(spec, MambaSpec):
        return mamba(spec, layer, x)
    if isinstance(spec, ConvSpec):
        u, b, c = (x @ layer[name].T for name in "ubc")
        past = np.zeros((spec.taps - 1, spec.width))
        y, _ = reference_recurrent.short_conv(b * u, layer["conv"], 0, past, with_silu=False)
        return (c * y) @ layer["o"].T
    raise AssertionError(spec)


def attention(
    spec: AttentionSpec, layer: Mapping[str, Array], turns: Mapping[str, Array], x: Array
) -> Array:
    """Causal grouped-query attention."""
    heads, kv_heads, width = spec.num_heads, spec.num_kv_heads, spec.head_dim
    q, k, v = (
        x @ layer[name].T + layer.get(f"{name}_bias", 0)
        for name in ("q", "k", "k" if spec.shared_kv else "v")
    )
    if spec.qk_norm == "full":
        q = rms_norm(q, layer["q_norm"], spec.norm_eps)
        k = rms_norm(k, layer["k_norm"], spec.norm_eps)
    if spec.clip is not None:
        q, k, v = (np.clip(a, -spec.clip, spec.clip) for a in (q, k, v))
    q = q.reshape(-1, heads, width)
    k, v = k.reshape(-1, kv_heads, width), v.reshape(-1, kv_heads, width)
    if spec.v_norm:
        v = rms_norm(v, 1, spec.norm_eps)
    if spec.qk_norm in ("head", "unit") and not spec.norm_after_rope:
        q = rms_norm(q, layer.get("q_norm", 1), spec.norm_eps)
        k = rms_norm(k, layer.get("k_norm", 1), spec.norm_eps)
    if spec.rope is not None:
        frequencies = turns[spec.rope.frequencies(len(x))]
        q, k = (rotate(a, frequencies, spec.rope.scale) for a in (q, k))
    if spec.norm_after_rope:
        q = rms_norm(q, layer.get("q_norm", 1), spec.norm_eps)
        k = rms_norm(k, layer.get("k_norm", 1), spec.norm_eps)
    if spec.growth:
        times = 1 + np.arange(len(x))
        q = q * (1 + spec.growth * np.log(1 + times // spec.grow_every))[:, None, None]
    out = np.empty_like(q)
    for head in range(heads):
        group = head * kv_heads // heads
        for t in range(len(x)):
            first = max(0, t + 1 - spec.window) if spec.window else 0
            first = max(first, t - t % spec.chunk) if spec.chunk else first
            scores = q[t, head] @ k[first : t + 1, group].T * spec.scale
            weights = (
                softmax(np.append(scores, layer["sinks"][head]))[:-1]
                if spec.sinks
                else softmax(scores)
            )
            out[t, head] = weights @ v[first : t + 1, group]
    out = out.reshape(len(x), -1)
    if spec.gate != "none":
        gate = x @ layer["q_gate"].T
        gate = np.logaddexp(0, gate) if spec.gate == "softplus_head" else 1 / (1 + np.exp(-gate))
        out = out * np.repeat(gate, out.shape[1] // gate.shape[1], axis=1)
    return out @ layer["o"].T + layer.get("o_bias", 0)


def mamba(spec: MambaSpec, layer: Mapping[str, Array], x: Array) -> Array:
    """Mamba-2."""
    zero = [np.zeros(shape) for shape in spec.state_shapes]
    xbc, _ = reference_recurrent.short_conv(
        x @ layer["xbc"].T, layer["conv"], layer.get("conv_bias", 0), zero[0], with_silu=True
    )
    heads, _ = reference_recurrent.mamba2(
        xbc, x @ layer["step"].T, layer["decay_rate"], layer["step_bias"], layer["skip"], spec.groups,
        zero[1],
    )  # fmt: skip
    mixed = reference_recurrent.gated_norm(
        heads, x @ layer["x_gate"].T, layer["head_norm"], spec.norm_eps, spec.groups, "silu_first"
    )
    return mixed @ layer["o"].T


def delta(spec: DeltaSpec, layer: Mapping[str, Array], x: Array) -> Array:
    """The gated delta rule."""
    zero = [np.zeros(shape) for shape in spec.state_shapes]
    qkv, _ = reference_recurrent.short_conv(
        x @ layer["qkv"].T, layer["conv"], 0, zero[0], with_silu=True
    )
    heads, _ = reference_recurrent.delta_rule(
        qkv, x @ layer.get("decay_in", np.eye(x.shape[1])).T @ layer["decay"].T, x @ layer["beta"].T,
        layer["decay_rate"], layer["decay_bias"], spec.key_heads, zero[1], bounded=spec.bounded,
    )  # fmt: skip
    gate = x @ layer["z_in"].T @ layer["z_out"].T if spec.gate_rank else x @ layer["z"].T
    mixed = reference_recurrent.gated_norm(
        heads, gate, layer["head_norm"], spec.norm_eps, spec.value_heads, spec.gate
    )
    return mixed @ layer["o"].T


def latent_attention(
    spec: MlaSpec, layer: Mapping[str, Array], turns: Mapping[str, Array], x: Array
) -> Array:
    """Multi-head latent attention in the paper's form: every head has keys and values of its own."""
    heads = spec.num_heads
    if spec.q_rank:
        q = rms_norm(x @ layer["q_a"].T, layer["q_a_norm"], spec.norm_eps) @ layer["q_b"].T
    else:
        q = x @ layer["q_direct"].T
    q = q.reshape(len(x), heads, -1)
    latents, turned = np.split(x @ layer["kv_a"].T, [spec.latent_dim], axis=1)
    latents = rms_norm(latents, layer["kv_a_norm"], spec.norm_eps)
    if spec.rope is not None:
        frequencies = turns[spec.rope.frequencies(len(x))]
        rest, last = np.split(q, [spec.nope_dim], axis=-1)
        q = np.concatenate([rest, rotate(last, frequencies, spec.rope.scale)], axis=-1)
        turned = rotate(turned[:, None], frequencies, spec.rope.scale)[:, 0]
    if spec.growth:
        times = np.arange(len(x)) // spec.grow_every
        q = q * (1 + spec.growth * np.log(1 + times))[:, None, None]
    k_b, v_b = (layer[name].reshape(heads, -1, layer[name].shape[1]) for name in ("k_b", "v_b"))
    out = reference_latent.naive(q, latents, turned, k_b, v_b, spec.scale)
    if spec.gate != "none":
        out = out / (1 + np.exp(-(x @ layer["q_gate"].T)))[:, :, None]
    return out.reshape(len(x), -1) @ layer["o"].T


def rotate(x: Array, frequencies: Array, scale: float) -> Array:
    """Applies RoPE to the first columns of x [T, heads, head_dim]; pair i is (x[i], x[i + half])."""
    angles = np.arange(len(x))[:, None, None] * frequencies
    cos, sin = np.cos(angles) * scale, np.sin(angles) * scale
    half = len(frequencies)
    a, b, rest = np.split(x, [half, 2 * half], axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def ffn(
    x: Array,
    gate: Array | None,
    up: Array,
    down: Array,
    kind: str,
    b_gate: Any = 0,
    b_up: Any = 0,
    b_down: Any = 0,
) -> Array:
    """down (activation(gate x, up x)), with biases."""
    u = x @ up.T + b_up
    if kind == "relu2":
        return np.maximum(u, 0) ** 2 @ down.T + b_down
    assert gate is not None
    g = x @ gate.T + b_gate
    if kind == "geglu":
        inner = np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)
        h = 0.5 * g * (1 + np.tanh(inner)) * u
    elif kind == "clamped_swiglu":
        g, u = np.minimum(g, 7), np.clip(u, -7, 7)
        h = 0.5 * g * (1 + np.tanh(0.851 * g)) * (u + 1)
    else:
        h = g / (1 + np.exp(-g)) * u
    return h @ down.T + b_down


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Scales the last axis to unit root mean square, times `weight`."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def as_stored(x: Array, kind: str) -> Array:
    """Rounds keys or values [T, heads, head_dim] as a type of the KV cache does."""
    if kind.startswith("f"):
        return x.astype(np.float16 if kind == "f16" else np.float32).astype(np.float64)
    out = np.empty(x.shape)
    if kind != "q8_0":
        for i in range(0, x.shape[2], 32):
            out[:, :, i : i + 32] = _as_packed(x[:, :, i : i + 32].astype(np.float32), int(kind[1]))
        return out
    for i in range(0, x.shape[2], 32):
        part = x[:, :, i : i + 32]
        scale = (np.abs(part).max(2, keepdims=True) / np.float32(127)).astype(np.float16)
        scale = scale.astype(np.float32)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        out[:, :, i : i + 32] = np.clip(np.round(part * inverse), -127, 127) * scale.astype(float)
    return out


def _as_packed(part: Array, bits: int) -> Array:
    """Rounds groups [..., 32] to codes of a few bits; each takes the one of 8 scales with the least squared error."""
    step, lowest, shares = {
        2: (2, 3, [1, 0.9, 0.8, 0.7, 0.85, 0.75, 0.65, 0.95]),
        3: (1, 4, [1, 0.9, 0.84, 1.08, 0.94, 1.22, 0.78, 1.04]),
        4: (1, 8, [1, 0.94, 1.1, 0.98, 1.02, 0.92, 1.14, 0.96]),
    }[bits]
    high, low = part.max(-1, keepdims=True), -part.min(-1, keepdims=True)
    unit = np.where(high >= low, -high, low) / np.float32(lowest)
    scales = (unit * np.array(shares, np.float32)).astype(np.float16).astype(np.float32)[..., None]
    inverse = np.divide(1, step * scales, out=np.zeros_like(scales), where=scales != 0)
    x = part[..., None, :].astype(float)
    codes = np.round((x * inverse + lowest / step).astype(np.float32)).clip(0, 2**bits - 1)
    rounded = (step * codes - lowest) * scales.astype(float)
    best = np.square(x - rounded).sum(-1).argmin(-1)
    return np.take_along_axis(rounded, best[..., None, None], -2)[..., 0, :]

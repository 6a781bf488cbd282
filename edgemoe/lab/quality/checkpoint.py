"""The predictions of a checkpoint before any quantisation: the reference for what a conversion lost.

They are computed in float32 with numpy, a layer at a time over all chunks of a text. So every weight is read once, and
memory holds only the chunks' hidden states, one layer's dense matrices and one expert.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import MATRICES, ModelConfig, dense_tensors
from edgemoe.convert.numpy_ops import activated, attention, rms_norm, rotated
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError
from edgemoe.lab.quality.latent import latent_attention
from edgemoe.lab.quality.logprobs import LogProbs, LogProbsWriter
from edgemoe.lab.quality.quality import Sample
from edgemoe.lab.quality.recurrent import conv, delta, mamba, sigmoid, softplus
from edgemoe.specs import (
    Activation,
    AttentionSpec,
    ConvSpec,
    DeltaSpec,
    MambaSpec,
    MixerSpec,
    MlaSpec,
    RopeSpec,
    RouterSpec,
)
from edgemoe.text.logprobs import log_softmax

__all__ = ["final_states", "head_logits", "record_predictions", "recorded_checkpoint"]

Array = NDArray[np.float32]
Layer = dict[str, Array]
Turns = dict[RopeSpec, tuple[Array, Array]]

_STATES = 1 << 28  # bytes of hidden states; a longer text takes more passes over the checkpoint
_VALUES = 1 << 22  # logits, or hidden values of an FFN, that are computed at once


@contextlib.contextmanager
def recorded_checkpoint(
    model: SourceModel, sample: Sample, *, progress: Callable[[int, int], None] | None = None
) -> Iterator[LogProbs]:
    """Runs a checkpoint and yields its predictions, which are in a temporary file for as long as the context lasts.

    Args:
        progress: called with the layers done and all layers, the head counted as one.

    Raises:
        FormatError: a tensor is broken or not finite, or the model has a mixer that is not supported here.
        OSError: the disk is full.
    """
    with tempfile.NamedTemporaryFile(prefix="edgemoe-", suffix=".logprobs") as file:
        record = LogProbsWriter(file.file, sample.windows, model.config.vocab_size)
        record_predictions(model, sample, record, progress=progress)
        with LogProbs(file.name) as reference:
            reference.losses = record.losses
            yield reference


def record_predictions(
    model: SourceModel,
    sample: Sample,
    record: LogProbsWriter,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the log-probabilities that a checkpoint gives to each chunk's second half.

    Args:
        progress: called with the layers done and all layers, the head counted as one.

    Raises:
        FormatError: a tensor is broken or not finite, or the model has a mixer that is not supported here.
        OSError: the disk is full.
    """
    config, windows = model.config, sample.windows.copy()
    if sample.first_token is not None:
        windows[:, 0] = sample.first_token
    count, chunk = windows.shape
    group = max(1, _STATES // (4 * chunk * config.hidden_size))
    total, done = -(-count // group) * (config.num_layers + 1), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    rows = max(1, _VALUES // config.vocab_size)
    for first in range(0, count, group):
        states = final_states(model, windows[first : first + group], layer_done=step)
        head = model.tensor("embed" if config.tied else "head").T
        bias = model.tensor("head_bias") if config.head_bias else None
        for window in states:
            scored = window[chunk // 2 : chunk - 1]
            for at in range(0, len(scored), rows):
                record.add(log_softmax(head_logits(config, scored[at : at + rows], head, bias)))
        step()


def head_logits(
    config: ModelConfig, states: Array, head: Array, bias: Array | None = None
) -> Array:
    """Returns the logits [T, V] for states [T, D], given a head [D, V] and its bias [V]."""
    logits: Array = states @ head
    if bias is not None:
        logits += bias
    logits *= np.float32(1.0 / config.logits_divisor)
    if config.soft_cap is not None:
        cap = np.float32(config.soft_cap)
        logits = np.tanh(logits / cap) * cap
    return logits


def final_states(
    model: SourceModel,
    windows: NDArray[np.int32],
    *,
    layer_done: Callable[[], None] = lambda: None,
) -> Array:
    """Runs sequences of tokens [N, C] through all layers and returns the input of the head, [N, C, D]."""
    config = model.config
    x: Array = model.tensor("embed")[windows]
    x *= np.float32(config.embedding_multiplier)
    turns = {spec: _turns(model, spec, windows.shape[1]) for spec in config.ropes}
    residual = np.float32(config.residual_multiplier)
    for i in range(config.num_layers):
        p = f"layers.{i}."
        layer = {
            name.removeprefix(p): model.tensor(name)
            for name in dense_tensors(config) if name.startswith(p)
        }  # fmt: skip
        for window in x:
            normed = rms_norm(window, layer["attn_norm"], config.norm_eps)
            mixed = _mix(config.mixer(i), layer, normed, turns)
            if config.out_norms:
                mixed = rms_norm(mixed, layer["attn_out_norm"], config.norm_eps)
            window += residual * mixed
        tokens = x.reshape(-1, config.hidden_size)
        if not config.ffn(i).exists:
            layer_done()
            continue
        added = _ffns(tokens, model, i, layer)
        if config.out_norms:
            added = rms_norm(added, layer["ffn_out_norm"], config.norm_eps)
        if config.layer_scale:
            tokens *= layer["layer_scale"]
        tokens += residual * added
        layer_done()
    weight = model.tensor("norm")
    for window in x:
        window[...] = rms_norm(window, weight, config.norm_eps)
    return x


def _ffns(x: Array, model: SourceModel, i: int, layer: Layer) -> Array:
    """Returns the sum of the outputs of a layer's FFNs, [T, D], for the residual x [T, D]."""
    config = model.config
    normed = rms_norm(x, layer["ffn_norm"], config.norm_eps)
    out = np.zeros_like(x)
    if config.shared_width(i):
        _shared(normed, layer, config.activation, out)
    if i not in config.moe_layers:
        return out
    if not config.branch_norms:
        _routed(normed, normed, model, i, layer, out)
        return out

    def norm(values: Array, name: str) -> Array:
        return rms_norm(values, layer[name], config.norm_eps)

    routed = np.zeros_like(x)
    _routed(norm(x, "router_norm"), norm(x, "experts_norm"), model, i, layer, routed)
    out = norm(out, "shared.out_norm")
    out += norm(routed, "experts_out_norm")
    return out


def _shared(x: Array, layer: Layer, activation: Activation, out: Array) -> None:
    """Writes to `out` [T, D] the output of the FFN that every token takes, for x [T, D]."""
    gate, up, down = (layer.get(f"shared.{name}") for name in MATRICES)
    assert up is not None
    assert down is not None
    for rows in _blocks(len(x), up):
        out[rows] = _ffn(x[rows], activation, gate, up, down)
        if "shared.sigmoid" in layer:
            out[rows] *= sigmoid(x[rows] @ layer["shared.sigmoid"])[:, None]


def _routed(
    to_router: Array, x: Array, model: SourceModel, i: int, layer: Layer, out: Array
) -> None:
    """Adds to `out` [T, D] the gated outputs of the experts that a layer's router chooses.

    Args:
        to_router: [T, D], the input of the router.
        x: [T, D], the input of the experts.
    """
    nothing = np.float32(0)
    chosen, gates = _route(
        model.config.router, to_router @ layer["router"].T + layer.get("router_bias", nothing),
        layer.get("choice_bias", nothing),
    )  # fmt: skip
    for index in np.unique(chosen):
        users, places = np.nonzero(chosen == index)
        matrices = model.expert(i, int(index))
        biases = [layer[f"expert_bias.{n}"][index] for n in MATRICES if "expert_bias.up" in layer]
        for rows in _blocks(len(users), matrices[1]):
            user = users[rows]
            gate, brought = gates[user, places[rows], None], x[user]
            if model.config.gate_input:
                gate, brought = np.ones_like(gate), gate * brought
            out[user] += gate * _ffn(brought, model.config.activation, *matrices, *biases)


def _route(
    spec: RouterSpec, logits: Array, bias: Array | np.float32
) -> tuple[NDArray[np.intp], Array]:
    """Returns each token's experts and gates, [T, K], best first, for router logits [T, E].

    Args:
        bias: [E], added to scores for the choice only; or 0.
    """
    scores = sigmoid(logits) if spec.scoring == "sigmoid" else _softmax(logits)
    choice = scores + bias
    if spec.groups > 1:
        groups = choice.reshape(len(choice), spec.groups, -1)
        best = np.sort(groups, axis=2)[:, :, -2 if spec.group_score == "top2" else -1 :].sum(2)
        rest = np.argsort(-best, axis=1, kind="stable")[:, spec.used_groups :]
        np.put_along_axis(groups, rest[:, :, None], -np.inf, 1)
    chosen = np.argsort(-choice, axis=1, kind="stable")[:, : spec.top_k]
    if spec.scoring == "softmax_topk":
        gates = _softmax(np.take_along_axis(logits, chosen, 1))
    elif spec.scoring == "sparsemixer":
        gates = _mixed_sparsely(logits, chosen)
    else:
        gates = np.take_along_axis(scores, chosen, 1)
        if spec.renormalise:
            gates = gates / gates.sum(axis=1, keepdims=True)
    return chosen, gates * np.float32(spec.gate_scale)


def _mixed_sparsely(logits: Array, chosen: NDArray[np.intp]) -> Array:
    """Returns the gates [T, K] of the scoring "sparsemixer"."""
    gates, rest = np.empty(chosen.shape, np.float32), logits.copy()
    for i, best in enumerate(chosen.T):
        at = best[:, None]
        top = np.take_along_axis(logits, at, 1)
        with np.errstate(invalid="ignore"):  # 0 / 0 gives nan, which does not count as far
            is_far = (top - logits) / np.maximum(np.abs(logits), top) > np.float32(0.02)
        shares = np.exp(np.where(is_far, -np.inf, rest - top))
        gates[:, i] = 1 / shares.sum(axis=1)
        np.put_along_axis(rest, at, -np.inf, 1)
    return gates


def _mix(spec: MixerSpec, layer: Layer, x: Array, turns: Turns) -> Array:
    """Returns the output [T, D] of a layer's mixer on one sequence x [T, D].

    Raises:
        FormatError: there is no mixer of this kind here.
    """
    if isinstance(spec, AttentionSpec):
        return _attention(spec, layer, x, turns)
    if isinstance(spec, DeltaSpec):
        return delta(spec, layer, x)
    if isinstance(spec, MlaSpec):
        return latent_attention(spec, layer, x, turns)
    if isinstance(spec, MambaSpec):
        return mamba(spec, layer, x)
    if isinstance(spec, ConvSpec):
        return conv(spec, layer, x)
    raise FormatError(f"a forward pass in floats knows no mixers of kind {spec.kind} yet")


def _attention(spec: AttentionSpec, layer: Layer, x: Array, turns: Turns) -> Array:
    """Returns the output [T, D] of causal grouped-query attention on one sequence x [T, D]."""
    heads, kv_heads, width, T = spec.num_heads, spec.num_kv_heads, spec.head_dim, len(x)
    q, k, v = (
        x @ layer[name].T + layer.get(f"{name}_bias", np.float32(0))
        for name in ("q", "k", "k" if spec.shared_kv else "v")
    )
    if spec.qk_norm == "full":
        q, k = (rms_norm(a, layer[f"{n}_norm"], spec.norm_eps) for a, n in ((q, "q"), (k, "k")))
    if spec.clip is not None:
        q, k, v = (a.clip(-spec.clip, spec.clip) for a in (q, k, v))
    q, k, v = (
        q.reshape(T, heads, width),
        k.reshape(T, kv_heads, width),
        v.reshape(T, kv_heads, width),
    )

    if spec.v_norm:
        v = rms_norm(v, np.ones(width, np.float32), spec.norm_eps)

    def normed(*both: Array) -> list[Array]:
        ones = np.ones(width, np.float32)
        weights = (layer.get("q_norm", ones), layer.get("k_norm", ones))
        return [rms_norm(a, w, spec.norm_eps) for a, w in zip(both, weights, strict=True)]

    if spec.qk_norm in ("head", "unit") and not spec.norm_after_rope:
        q, k = normed(q, k)
    q, k, v = (a.transpose(1, 0, 2)[None] for a in (q, k, v))
    if spec.rope is not None:
        q, k = (rotated(a, *turns[spec.rope]) for a in (q, k))
    if spec.norm_after_rope:
        q, k = normed(q, k)
    if spec.growth:
        times = np.log1p(np.arange(1, T + 1) // spec.grow_every)
        q = q * (1 + spec.growth * times).astype(np.float32)[:, None]
    out = attention(
        q, k, v, scale=spec.scale, window=spec.window, chunk=spec.chunk, sinks=layer.get("sinks")
    )
    if spec.gate != "none":
        gate = x @ layer["q_gate"].T
        gate = softplus(gate) if spec.gate == "softplus_head" else sigmoid(gate)
        out *= gate.repeat(out.shape[1] // gate.shape[1], axis=1)
    added: Array = out @ layer["o"].T + layer.get("o_bias", np.float32(0))
    return added


def _turns(model: SourceModel, spec: RopeSpec, count: int) -> tuple[Array, Array]:
    """Returns cos and sin for RoPE at positions [0, count) of a sequence of `count` tokens, [count, rotated / 2]."""
    frequencies = model.tensor(spec.frequencies(count))
    angles = (np.arange(count, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    cos, sin = np.cos(angles) * spec.scale, np.sin(angles) * spec.scale
    return cos.astype(np.float32), sin.astype(np.float32)


def _ffn(
    x: Array,
    activation: Activation,
    gate: Array | None,
    up: Array,
    down: Array,
    gate_bias: Array | float = 0,
    up_bias: Array | float = 0,
    down_bias: Array | float = 0,
) -> Array:
    ups = x @ up.T + up_bias
    gates = ups if activation == "relu2" or gate is None else x @ gate.T + gate_bias
    return np.asarray(activated(activation, gates, ups) @ down.T + down_bias, np.float32)


def _softmax(x: Array) -> Array:
    out: Array = np.exp(x - x.max(axis=-1, keepdims=True))
    out /= out.sum(axis=-1, keepdims=True)
    return out


def _blocks(count: int, matrix: Array) -> Iterator[slice]:
    """Returns slices of `count` rows of activations, each small enough to multiply with a matrix [H, D] at once."""
    rows = max(1, _VALUES // len(matrix))
    return (slice(first, first + rows) for first in range(0, count, rows))

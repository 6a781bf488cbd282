"""The forward pass: one decoder with switches, for prompts in chunks and for single tokens alike.

A token's arithmetic never depends on its chunk, so one chunk, many chunks and token by token give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import ModelConfig
from edgemoe.experts import Experts
from edgemoe.model.kv import KvCache
from edgemoe.ops import CpuOps
from edgemoe.plan import Routing
from edgemoe.store import Weight

__all__ = ["Decoder", "scratch_bytes"]

_MOST_AHEAD = 4  # layers; what lies further ahead is guesswork

Array = NDArray[np.float32]
Nested = _core.Nested


@dataclass(frozen=True, slots=True)
class _Layer:
    """One block's weights, by role."""

    attn_norm: Array
    qkv: tuple[Nested, Nested, Nested]
    o: tuple[Nested]
    o_bias: Array | None
    attention: _core.AttentionLayer
    ffn_norm: Array
    moe_index: int
    """Position among the layers with routed experts, -1 for none."""
    router: Array | None
    shared: tuple[Nested, Nested, Nested] | None
    shared_sigmoid: Array | None


def _floats_per_token(config: ModelConfig) -> int:
    d, hd, k = config.hidden_size, config.head_dim, config.experts_per_token
    heads, kv = config.num_heads * hd, config.num_kv_heads * hd
    # x, normed, added, moe, shared; q and attended; k and v; cos and sin; parts; scores; experts and gates.
    return 5 * d + 2 * heads + 2 * kv + hd + k * d + config.num_experts + 2 * k


def scratch_bytes(config: ModelConfig, max_tokens: int) -> int:
    """Returns the memory of a decoder's and its experts' activations for chunks of `max_tokens`."""
    ahead = _MOST_AHEAD * (config.hidden_size + config.num_experts + 2 * config.experts_per_token)
    return 4 * (_floats_per_token(config) * max_tokens + ahead + config.vocab_size)


class Decoder:
    """Turns tokens into hidden states and logits. Owns the activations, not the weights."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Weight],
        ops: CpuOps,
        experts: Experts,
        *,
        max_tokens: int,
    ) -> None:
        self.config = config
        self.max_tokens = max_tokens
        self._ops = ops
        self._experts = experts
        self._embed = cast(Nested, weights["embed"])
        self._head = self._embed if config.tied else cast(Nested, weights["head"])
        self._norm = cast(Array, weights["norm"])
        self._inv_freq = cast(Array, weights["rope"])
        self._layers = [_layer(config, weights, i) for i in range(config.num_layers)]
        T, d, hd = max_tokens, config.hidden_size, config.head_dim
        heads, kv, k = config.num_heads * hd, config.num_kv_heads * hd, config.experts_per_token

        def scratch(cols: int) -> Array:
            return np.empty((T, cols), np.float32)

        self._x, self._normed, self._added = scratch(d), scratch(d), scratch(d)
        self._moe, self._shared = scratch(d), scratch(d)
        self._q, self._attended, self._k, self._v = (
            scratch(heads), scratch(heads), scratch(kv), scratch(kv),
        )  # fmt: skip
        self._cos, self._sin = scratch(hd // 2), scratch(hd // 2)
        self._chosen, self._gates = np.empty((T, k), np.int32), scratch(k)
        self._scores = scratch(config.num_experts)
        moe = [layer for layer in self._layers if layer.router is not None]
        self._norms = [layer.ffn_norm for layer in moe]
        self._routers = [cast(Array, layer.router) for layer in moe]
        p = _MOST_AHEAD
        self._ahead_normed = np.empty((p, d), np.float32)
        self._ahead_scores = np.empty((p, config.num_experts), np.float32)
        self._ahead_chosen, self._ahead_gates = (
            np.empty((p, k), np.int32),
            np.empty((p, k), np.float32),
        )

    def forward(self, ids: NDArray[np.int32], kv: KvCache) -> Array:
        """Runs tokens at the end of a sequence and returns their hidden states.

        Args:
            ids: [T], T at most `max_tokens`.
            kv: gets T more positions; unchanged in length when an error is raised.

        Returns:
            [T, D], normed; scratch, valid until the next call.
        """
        config, ops, T, pos = self.config, self._ops, len(ids), kv.length
        x, normed, added = self._x[:T], self._normed[:T], self._added[:T]
        q, k, v, attended = self._q[:T], self._k[:T], self._v[:T], self._attended[:T]
        cos, sin = self._cos[:T], self._sin[:T]
        ops.embed(self._embed, ids, config.embedding_multiplier, x)
        ops.rope(self._inv_freq, pos, config.rope_scale, cos, sin)
        eps, residual = config.norm_eps, config.residual_multiplier
        for layer, cache in zip(self._layers, kv.layers, strict=True):
            ops.norm(x, layer.attn_norm, eps, normed)
            ops.linear(normed, layer.qkv, (q, k, v))
            ops.attention(layer.attention, q, k, v, pos, cos, sin, cache, attended)
            ops.linear(attended, layer.o, (added,))
            if layer.o_bias is not None:
                added += layer.o_bias
            ops.add(added, residual, x)
            ops.norm(x, layer.ffn_norm, eps, normed)
            self._ffn(layer, normed, x)
        kv.length = pos + T
        ops.norm(x, self._norm, eps, normed)
        return normed

    def _ffn(self, layer: _Layer, normed: Array, x: Array) -> None:
        """x [T, D] += the routed experts' and the shared FFN's outputs on `normed`."""
        config, ops, T = self.config, self._ops, len(x)
        residual = config.residual_multiplier
        if layer.router is not None:
            chosen, gates, moe = self._chosen[:T], self._gates[:T], self._moe[:T]
            ops.route(
                normed, layer.router, over_top_k=config.scoring == "softmax_topk",
                renormalise=config.renormalise, scores=self._scores[:T], experts=chosen, gates=gates,
            )  # fmt: skip
            ahead = self._look_ahead(layer.moe_index, x) if T == 1 else (None, None)
            self._experts(Routing(layer.moe_index, chosen, gates, *ahead), normed, moe)
        if layer.shared is not None:
            shared = self._shared[:T]
            ops.ffn(normed, *layer.shared, shared)
            if layer.router is None:
                ops.add(shared, residual, x)
                return
            ops.add(
                shared, 1.0, moe, gate_weight=layer.shared_sigmoid,
                gate_input=None if layer.shared_sigmoid is None else normed,
            )  # fmt: skip
        ops.add(moe, residual, x)

    def _look_ahead(
        self, index: int, x: Array
    ) -> tuple[NDArray[np.int32] | None, NDArray[np.float32] | None]:
        """Returns what the scheduler wants to know of the layers after `index` for x [1, D]; see `Routing`."""
        p = min(self._experts.scheduler.look_ahead, _MOST_AHEAD, len(self._routers) - 1 - index)
        if p <= 0:
            return None, None
        config, next_ = self.config, slice(index + 1, index + 1 + p)
        chosen, gates = self._ahead_chosen[:p], self._ahead_gates[:p]
        self._ops.look_ahead(
            x, self._norms[next_], self._routers[next_], config.norm_eps,
            over_top_k=config.scoring == "softmax_topk", renormalise=config.renormalise,
            normed=self._ahead_normed[:p], scores=self._ahead_scores[:p], experts=chosen, gates=gates,
        )  # fmt: skip
        return chosen, gates

    def logits(self, hidden: Array, out: Array) -> None:
        """out [T, V] = the head on hidden [T, D]."""
        self._ops.linear(hidden, (self._head,), (out,))
        if self.config.logits_divisor != 1.0:
            out *= np.float32(1.0 / self.config.logits_divisor)


def _layer(config: ModelConfig, weights: Mapping[str, Weight], i: int) -> _Layer:
    p = f"layers.{i}."

    def array(name: str) -> Array | None:
        return cast("Array | None", weights.get(p + name))

    def need(name: str) -> Array:
        return cast(Array, weights[p + name])

    def nested(name: str) -> Nested:
        return cast(Nested, weights[p + name])

    attention = _core.AttentionLayer(
        num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        window=config.window(i), scale=config.attention_scale,
        q_bias=array("q_bias"), k_bias=array("k_bias"), v_bias=array("v_bias"),
        q_norm=array("q_norm"), k_norm=array("k_norm"), norm_per_head=config.qk_norm == "head",
        norm_eps=config.norm_eps, clip=config.clip_qkv or 0.0,
    )  # fmt: skip
    has_shared = config.shared_width(i) > 0
    return _Layer(
        attn_norm=need("attn_norm"),
        qkv=(nested("q"), nested("k"), nested("v")),
        o=(nested("o"),),
        o_bias=array("o_bias"),
        attention=attention,
        ffn_norm=need("ffn_norm"),
        moe_index=config.moe_layers.index(i) if i in config.moe_layers else -1,
        router=array("router"),
        shared=(nested("shared.gate"), nested("shared.up"), nested("shared.down"))
        if has_shared
        else None,
        shared_sigmoid=array("shared.sigmoid"),
    )

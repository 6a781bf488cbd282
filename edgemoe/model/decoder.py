"""The forward pass: one decoder with switches, for prompts in chunks and for single tokens alike.

A token's arithmetic never depends on its chunk, so one chunk, many chunks and token by token give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import ModelConfig
from edgemoe.errors import FormatError
from edgemoe.experts import Experts
from edgemoe.model.kv import KvCache
from edgemoe.ops import CpuOps
from edgemoe.plan import Routing
from edgemoe.store import Weight

__all__ = ["MOST_AHEAD", "Decoder", "scratch_bytes"]

MOST_AHEAD = 4  # layers; what lies further ahead is guesswork

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


@dataclass(frozen=True, slots=True)
class _Scratch:
    """Activations of T tokens; the last three are the router's."""

    x: Array
    normed: Array
    added: Array
    moe: Array
    shared: Array
    q: Array
    attended: Array
    k: Array
    v: Array
    cos: Array
    sin: Array
    scores: Array
    gates: Array
    chosen: NDArray[np.int32]

    @staticmethod
    def widths(config: ModelConfig) -> dict[str, int]:
        """Returns the columns of each."""
        d, hd, k = config.hidden_size, config.head_dim, config.experts_per_token
        heads, kv = config.num_heads * hd, config.num_kv_heads * hd
        return {
            "x": d, "normed": d, "added": d, "moe": d, "shared": d,
            "q": heads, "attended": heads, "k": kv, "v": kv, "cos": hd // 2, "sin": hd // 2,
            "scores": config.num_experts, "gates": k, "chosen": k,
        }  # fmt: skip

    @classmethod
    def make(cls, config: ModelConfig, tokens: int) -> _Scratch:
        arrays: dict[str, Any] = {
            name: np.empty((tokens, width), np.int32 if name == "chosen" else np.float32)
            for name, width in cls.widths(config).items()
        }
        return cls(**arrays)

    def first(self, tokens: int) -> _Scratch:
        """Returns views of the first rows."""
        return _Scratch(*(getattr(self, name)[:tokens] for name in self.__slots__))


def scratch_bytes(config: ModelConfig, max_tokens: int) -> int:
    """Returns the memory of a decoder's and its experts' activations for chunks of `max_tokens`."""
    d, k = config.hidden_size, config.experts_per_token
    per_token = sum(_Scratch.widths(config).values()) + k * d  # and the experts' parts
    ahead = MOST_AHEAD * (d + config.num_experts + 2 * k)
    return 4 * (per_token * max_tokens + ahead + config.vocab_size)


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
        self._all = _Scratch.make(config, max_tokens)
        self._one = self._all.first(1)  # most passes are of one token
        moe = [layer for layer in self._layers if layer.router is not None]
        self._norms = [layer.ffn_norm for layer in moe]
        self._routers = [cast(Array, layer.router) for layer in moe]
        p, d, k = MOST_AHEAD, config.hidden_size, config.experts_per_token
        self._bit_routers: list[tuple[Array, Array, Array]] | None = None
        if (bits := experts.scheduler.bit_routers) is not None:
            if bits.weight.shape[3] != d:
                raise FormatError(
                    f"section bit-routers: is for {bits.weight.shape[3]} inputs; the model has {d}"
                )
            self._bit_routers = list(
                zip(bits.weight, bits.gate_weight, bits.bias, strict=True)
            )  # views by layer
            # Some KiB, or 100 per thousand tokens of a chunk: left to the budget's margin.
            self._bit_logits = np.empty((max_tokens, k, len(bits.levels)), np.float32)
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
        s = self._one if T == 1 else self._all.first(T)
        x, normed, added, q, k, v, attended = s.x, s.normed, s.added, s.q, s.k, s.v, s.attended
        cos, sin = s.cos, s.sin
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
            self._ffn(layer, s)
        kv.length = pos + T
        ops.norm(x, self._norm, eps, normed)
        return normed

    def _ffn(self, layer: _Layer, s: _Scratch) -> None:
        """s.x += the routed experts' and the shared FFN's outputs on s.normed."""
        config, ops, x, normed, moe = self.config, self._ops, s.x, s.normed, s.moe
        residual = config.residual_multiplier
        if layer.router is not None:
            ops.route(
                normed, layer.router, over_top_k=config.scoring == "softmax_topk",
                renormalise=config.renormalise, scores=s.scores, experts=s.chosen, gates=s.gates,
            )  # fmt: skip
            routing = Routing(layer.moe_index, s.chosen, s.gates, scores=s.scores)
            if self._bit_routers is not None:
                logits = routing.bit_logits = self._bit_logits[: len(x)]
                ops.slot_scores(
                    normed, self._bit_routers[layer.moe_index], s.chosen, s.gates, logits
                )
            if len(x) == 1 and self._experts.scheduler.look_ahead:
                self._look_ahead(routing, x)
            self._experts(routing, normed, moe)
        if layer.shared is not None:
            shared = s.shared
            ops.ffn(normed, *layer.shared, shared)
            if layer.router is None:
                ops.add(shared, residual, x)
                return
            ops.add(
                shared, 1.0, moe, gate_weight=layer.shared_sigmoid,
                gate_input=None if layer.shared_sigmoid is None else normed,
            )  # fmt: skip
        ops.add(moe, residual, x)

    def _look_ahead(self, routing: Routing, x: Array) -> None:
        """Adds what the scheduler wants to know of the layers after it for x [1, D]; see `Routing`."""
        first = routing.layer + 1
        p = min(self._experts.scheduler.look_ahead, MOST_AHEAD, len(self._routers) - first)
        if p <= 0:
            return
        config = self.config
        chosen, gates = self._ahead_chosen[:p], self._ahead_gates[:p]
        self._ops.look_ahead(
            x, self._norms[first : first + p], self._routers[first : first + p], config.norm_eps,
            over_top_k=config.scoring == "softmax_topk", renormalise=config.renormalise,
            normed=self._ahead_normed[:p], scores=self._ahead_scores[:p], experts=chosen, gates=gates,
        )  # fmt: skip
        routing.ahead_experts, routing.ahead_gates = chosen, gates

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

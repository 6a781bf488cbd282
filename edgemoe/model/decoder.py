"""The forward pass: one decoder with switches, for prompts in chunks and for single tokens alike.

A token's arithmetic never depends on its chunk, so one chunk, many chunks and token by token give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from edgemoe.config import ModelConfig
from edgemoe.errors import FormatError
from edgemoe.experts import Experts
from edgemoe.model.kv import KvCache
from edgemoe.ops import Array, AttentionWeights, Ids, Matrix, Ops
from edgemoe.plan import Routing
from edgemoe.store import Weight

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["MOST_AHEAD", "Decoder", "scratch_bytes"]

MOST_AHEAD = 4  # layers; what lies further ahead is guesswork


@dataclass(frozen=True, slots=True)
class _Layer:
    """One block's weights, by role."""

    attn_norm: Array
    qkv: tuple[Matrix, Matrix, Matrix]
    o: tuple[Matrix]
    o_bias: Array | None
    attention: AttentionWeights
    ffn_norm: Array
    moe_index: int
    """Position among the layers with routed experts, -1 for none."""
    router: Array | None
    shared: tuple[Matrix, Matrix, Matrix] | None
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
    chosen: Ids

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
    def make(cls, config: ModelConfig, ops: Ops, tokens: int) -> _Scratch:
        widths = cls.widths(config)
        arrays: dict[str, Any] = {name: ops.empty(tokens, n) for name, n in widths.items()}
        for name, dtype in (("scores", "float32"), ("gates", "float32"), ("chosen", "int32")):
            arrays[name] = ops.host(tokens, widths[name], dtype=dtype)
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
        ops: Ops,
        experts: Experts,
        *,
        max_tokens: int,
    ) -> None:
        self.config = config
        self.max_tokens = max_tokens
        self._ops = ops
        self._experts = experts
        self._embed = cast(Matrix, weights["embed"])
        self._head = self._embed if config.tied else cast(Matrix, weights["head"])
        self._norm = cast(Array, weights["norm"])
        self._inv_freq = cast(Array, weights["rope"])
        self._layers = [_layer(config, ops, weights, i) for i in range(config.num_layers)]
        self._all = _Scratch.make(config, ops, max_tokens)
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
            self._bit_logits = ops.host(max_tokens, k, len(bits.levels), dtype="float32")
        self._ahead_normed = ops.empty(p, d)
        self._ahead_scores = ops.empty(p, config.num_experts)
        self._ahead_chosen = ops.host(p, k, dtype="int32")
        self._ahead_gates = ops.host(p, k, dtype="float32")

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
                ops.add_bias(layer.o_bias, added)
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
            self._ops.scale(1.0 / self.config.logits_divisor, out)


def _layer(config: ModelConfig, ops: Ops, weights: Mapping[str, Weight], i: int) -> _Layer:
    p = f"layers.{i}."

    def array(name: str) -> Array | None:
        return cast("Array | None", weights.get(p + name))

    def need(name: str) -> Array:
        return cast(Array, weights[p + name])

    def nested(name: str) -> Matrix:
        return cast(Matrix, weights[p + name])

    spec = config.mixer(i)
    vectors = {n: need(n) for n, t in spec.tensors(config.hidden_size).items() if t.kind == "f32"}
    attention = ops.attention_weights(i, spec, vectors)
    has_shared = config.shared_width(i) > 0
    return _Layer(
        attn_norm=need("attn_norm"),
        qkv=(nested("q"), nested("k"), nested("v")),
        o=(nested("o"),),
        o_bias=array("o_bias"),
        attention=attention,
        ffn_norm=need("ffn_norm"),
        moe_index=config.moe_index(i),
        router=array("router"),
        shared=(nested("shared.gate"), nested("shared.up"), nested("shared.down"))
        if has_shared
        else None,
        shared_sigmoid=array("shared.sigmoid"),
    )

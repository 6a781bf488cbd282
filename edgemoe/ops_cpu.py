"""The verbs of the forward pass on a CPU: numpy arrays in, native kernels underneath."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import astuple
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.ops import (
    Array,
    AttentionMatrices,
    AttentionWeights,
    Beside,
    DeltaRule,
    ExpertLayer,
    Ids,
    KvLayer,
    LatentMatrices,
    LatentWeights,
    MambaRule,
    Matrix,
    OpsShape,
    RopeTable,
    RouteRule,
    RouterWeights,
    RowTable,
)
from edgemoe.ops_cpu_ahead import Ahead
from edgemoe.ops_notes import CpuNotes
from edgemoe.plan import Plan
from edgemoe.quant.correction import MOST_RANK
from edgemoe.specs import Activation, AttentionSpec, MixerSpec, MlaSpec, RouterSpec
from edgemoe.store import Request

__all__ = ["CpuOps"]

_FEW_TOKENS = 4


class CpuOps:
    """Runs operations on some threads with scratch of its own. One caller at a time. See `Ops` for the verbs."""

    repeats = True
    """Work is noted and repeated without Python; without that what comes is the same, later."""
    runs_ahead = True
    """Layers of which all experts are there are part of that; likewise."""
    counts_chosen = True

    def __init__(self, shape: OpsShape) -> None:
        self._ws = _core.Workspace(*astuple(shape))
        self._notes = CpuNotes(self._ws)
        self._ahead = Ahead()

    @staticmethod
    def scratch_bytes(shape: OpsShape) -> int:
        """Returns the memory of the operations' own scratch."""
        return _core.Workspace.bytes(*astuple(shape))

    def empty(self, *shape: int) -> Array:
        """See `Ops.empty`."""
        return np.empty(shape, np.float32)

    def beside(self, spec: MixerSpec, keys: str, values: str) -> None:
        """See `Ops.beside`."""

    def download(self, x: Array, out: Array) -> None:
        """See `Ops.download`."""
        out[...] = x

    def upload(self, x: Array, out: Array) -> None:
        """See `Ops.upload`."""
        out[...] = x

    def settle(self) -> None:
        """See `Ops.settle`: nothing is left for later."""

    def host(self, *shape: int, dtype: str) -> NDArray[Any]:
        """See `Ops.host`."""
        return np.empty(shape, dtype)

    def kv_layer(
        self, spec: AttentionSpec, keys: str, values: str, capacity: int, *, resident: bool = False
    ) -> KvLayer:
        """See `Ops.kv_layer`."""
        return _core.KvLayer(
            key_type=keys, value_type=values, num_heads=spec.num_kv_heads, capacity=capacity,
            head_dim=spec.head_dim, resident=resident,
        )  # fmt: skip

    def copy_kv(self, source: KvLayer, target: KvLayer, begin: int, end: int) -> None:
        """See `Ops.copy_kv`."""
        target.take(source, begin, end)

    def latents(self, spec: MlaSpec, kind: str, capacity: int) -> KvLayer:
        """See `Ops.latents`."""
        return _core.KvLayer.latents(
            type=kind, capacity=capacity, head_dim=spec.key_dim, value_dim=spec.latent_dim
        )

    def attention_weights(
        self, layer: int, spec: AttentionSpec, tensors: Mapping[str, Array | Matrix], keys: str
    ) -> AttentionWeights:
        """See `Ops.attention_weights`."""

        def array(name: str) -> Array | None:
            return cast("Array | None", tensors.get(name))

        parts = spec.has_constant_keys and not keys.startswith("f")
        ones = np.ones(spec.head_dim, np.float32) if spec.qk_norm == "unit" else None
        return _core.AttentionLayer(
            index=layer, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
            window=spec.window, scale=spec.scale, norm_per_head=spec.qk_norm in ("head", "unit"),
            norm_eps=spec.norm_eps, clip=spec.clip or 0.0,
            q_bias=array("q_bias"), k_bias=array("k_bias"), v_bias=array("v_bias"),
            q_norm=array("q_norm") if ones is None else ones, k_norm=array("k_norm") if ones is None else ones,
            k=cast(Matrix, tensors["k"]) if parts else None,
            input_norm=array("attn_norm") if parts else None,
            rope_dim=spec.rope_dim, norm_after_rope=spec.norm_after_rope,
            sinks=array("sinks"), v_norm=spec.v_norm, chunk=spec.chunk, growth=spec.growth,
            grow_every=spec.grow_every,
        )  # fmt: skip

    def latent_weights(
        self, layer: int, spec: MlaSpec, tensors: Mapping[str, Array | Matrix]
    ) -> LatentWeights:
        """See `Ops.latent_weights`."""
        return _core.LatentLayer(
            index=layer, num_heads=spec.num_heads, nope_dim=spec.nope_dim, rope_dim=spec.rope_dim,
            latent_dim=spec.latent_dim, scale=spec.scale, rotates=spec.rope is not None,
            grow_every=spec.grow_every, growth=spec.growth,
            norm=cast(Array, tensors["kv_a_norm"]), norm_eps=spec.norm_eps,
        )  # fmt: skip

    def rope_table(self, frequencies: Array, scale: float) -> RopeTable:
        """See `Ops.rope_table`."""
        return _core.Rope(frequencies, scale)

    def place(self, spec: AttentionSpec | MlaSpec, pos: int) -> Hashable | None:
        """See `Ops.place`: attention is the same work wherever it is."""
        if not self.repeats:
            return None
        self._ws.place(pos)
        return True

    def repeat(self, key: Hashable | None, run: Callable[[], None]) -> None:
        """See `Ops.repeat`."""
        if key is None or not self.repeats or (note := self._notes.of(key, run)) is None:
            run()
        else:
            self._ws.repeat(note)

    def forget_work(self) -> None:
        """See `Ops.forget_work`."""
        self._notes.forget()

    def embed(self, table: RowTable, ids: Ids, scale: float, out: Array) -> None:
        """See `Ops.embed`."""
        table.decode_rows(ids, out, scale)

    def norm(self, x: Array, weight: Array, eps: float, out: Array) -> None:
        """See `Ops.norm`."""
        _core.rms_norm(self._ws, x, weight, eps, out)

    def linear(self, x: Array, weights: Sequence[Matrix], outs: Sequence[Array]) -> None:
        """See `Ops.linear`."""
        _core.linear(self._ws, x, weights, outs)

    def linear_f32(self, x: Array, weights: Sequence[Array], outs: Sequence[Array]) -> None:
        """See `Ops.linear_f32`."""
        for weight, out in zip(weights, outs, strict=True):
            _core.linear_f32(self._ws, x, weight, out)

    def linear_heads(self, x: Array, weight: Matrix, heads: int, out: Array) -> None:
        """See `Ops.linear_heads`."""
        _core.linear_heads(self._ws, x, weight, heads, out)

    def ffn(
        self,
        x: Array,
        gate: Matrix | None,
        up: Matrix,
        down: Matrix,
        out: Array,
        *,
        activation: Activation,
        hidden: Array | None = None,
    ) -> None:
        """See `Ops.ffn`; hidden [T, H], if given, gets what down is applied to."""
        _core.ffn(self._ws, x, gate, up, down, out, hidden, activation)

    def add(
        self,
        x: Array,
        scale: float,
        out: Array,
        *,
        gate_weight: Array | None = None,
        gate_input: Array | None = None,
    ) -> None:
        """See `Ops.add`."""
        _core.add_rows(self._ws, x, scale, gate_weight, gate_input, out)

    def add_norm(
        self, added: Array, scale: float, x: Array, weight: Array, eps: float, out: Array
    ) -> None:
        """See `Ops.add_norm`."""
        _core.add_norm(self._ws, added, scale, x, weight, eps, out)

    def add_bias(self, bias: Array, out: Array) -> None:
        """See `Ops.add_bias`."""
        _core.add_bias(self._ws, bias, out)

    def scale(self, factor: float, out: Array) -> None:
        """See `Ops.scale`."""
        out *= np.float32(factor)

    def multiply(self, factors: Array, out: Array) -> None:
        """See `Ops.multiply`."""
        _core.multiply(self._ws, factors, out)

    def weigh(self, x: Array, gates: Array, out: Array) -> None:
        """See `Ops.weigh`."""
        np.multiply(x, gates, out=out)

    def soft_cap(self, cap: float, out: Array) -> None:
        """See `Ops.soft_cap`."""
        _core.soft_cap(self._ws, cap, out)

    def rope(self, table: RopeTable, pos: int, cos: Array, sin: Array) -> None:
        """See `Ops.rope`."""
        table.angles(pos, cos, sin)

    def attention(
        self,
        weights: AttentionWeights,
        q: Array,
        k: Array,
        v: Array,
        pos: int,
        cos: Array | None,
        sin: Array | None,
        table: RopeTable | None,
        kv: KvLayer,
        out: Array,
    ) -> None:
        """See `Ops.attention`."""
        if cos is None or sin is None:
            cos = sin = np.empty((len(q), 0), np.float32)
        _core.attention(self._ws, weights, q, k, v, pos, cos, sin, table, kv, out)

    def attend(
        self,
        weights: AttentionWeights,
        x: Array,
        matrices: AttentionMatrices,
        rows: tuple[Array, Array, Array],
        pos: int,
        cos: Array | None,
        sin: Array | None,
        table: RopeTable | None,
        kv: KvLayer,
        heads: Array,
        out: Array,
    ) -> None:
        """See `Ops.attend`."""
        if cos is None or sin is None:
            cos = sin = np.empty((len(x), 0), np.float32)
        qkv, o = matrices
        _core.attend(self._ws, weights, x, qkv, o, *rows, pos, cos, sin, table, kv, heads, out)

    def gate_heads(self, x: Array, gate: Array, kind: str) -> None:
        """See `Ops.gate_heads`."""
        _core.gate_attention(self._ws, x, gate, kind)

    def short_conv(
        self,
        x: Array,
        weight: Array,
        bias: Array | None,
        before: Array | None,
        after: Array,
        out: Array,
        *,
        silu: bool,
    ) -> None:
        """See `Ops.short_conv`."""
        _core.short_conv(self._ws, x, weight, bias, before, after, silu, out)

    def delta_rule(
        self,
        qkv: Array,
        decay: Array,
        beta: Array,
        rule: DeltaRule,
        before: Array | None,
        after: Array,
        out: Array,
    ) -> None:
        """See `Ops.delta_rule`."""
        _core.delta_rule(
            self._ws, qkv, decay, beta, rule.rate, rule.bias, rule.key_heads, rule.bounded, before,
            after, out,
        )  # fmt: skip

    def mamba2(
        self,
        xbc: Array,
        step: Array,
        decay: Array,
        rule: MambaRule,
        before: Array | None,
        after: Array,
        out: Array,
    ) -> None:
        """See `Ops.mamba2`."""
        _core.mamba2(
            self._ws, xbc, step, decay, rule.rate, rule.step_bias, rule.skip, rule.groups, before,
            after, out,
        )  # fmt: skip

    def gated_norm(
        self, x: Array, gate: Array, weight: Array, eps: float, groups: int, kind: str
    ) -> None:
        """See `Ops.gated_norm`."""
        _core.gated_norm(self._ws, x, gate, weight, eps, groups, kind)

    def latent_attention(
        self,
        weights: LatentWeights,
        q: Array,
        absorbed: Array,
        keys: Array,
        pos: int,
        cos: Array | None,
        sin: Array | None,
        kv: KvLayer,
        out: Array,
    ) -> None:
        """See `Ops.latent_attention`."""
        _core.latent_attention(self._ws, weights, q, absorbed, keys, pos, cos, sin, kv, out)

    def attend_latents(
        self,
        weights: LatentWeights,
        x: Array,
        matrices: LatentMatrices,
        eps: float,
        rows: Sequence[Array],
        pos: int,
        cos: Array | None,
        sin: Array | None,
        kv: KvLayer,
        out: Array,
    ) -> None:
        """See `Ops.attend_latents`."""
        _, kv_a, q_a, q_norm, q_b, k_b, v_b, o = matrices
        _core.attend_latents(
            self._ws, weights, x, (kv_a, q_a, q_b, k_b, v_b, o), q_norm, eps, rows, pos, cos, sin,
            kv, out,
        )  # fmt: skip

    def route_rule(self, spec: RouterSpec) -> RouteRule:
        """See `Ops.route_rule`."""
        return _core.RouteRule(
            num_experts=spec.num_experts, top_k=spec.top_k, scoring=spec.scoring,
            renormalise=spec.renormalise, gate_scale=spec.gate_scale, groups=spec.groups,
            used_groups=spec.used_groups, group_by_two=spec.group_score == "top2",
        )  # fmt: skip

    def begin_route(self, x: Array, router: RouterWeights) -> None:
        """See `Ops.begin_route`: there is nothing that the host could do meanwhile."""

    def route(
        self,
        x: Array,
        router: RouterWeights,
        rule: RouteRule,
        *,
        scores: Array,
        experts: Ids,
        gates: Array,
    ) -> None:
        """See `Ops.route`."""
        _core.route(
            self._ws,
            x,
            router.weight,
            router.bias,
            router.choice_bias,
            rule,
            scores,
            experts,
            gates,
        )

    def choose_by(
        self,
        bias: Array | None,
        choice_bias: Array | None,
        rule: RouteRule,
        scores: Array,
        experts: Ids,
        gates: Array,
    ) -> None:
        """Is the second half of `Ops.route`: scores [T, E] are the products with the router's weight."""
        _core.choose(self._ws, bias, choice_bias, rule, scores, experts, gates)

    def ahead(
        self, slots: Any, levels: NDArray[np.int8], rule: RouteRule, *, is_start: bool
    ) -> frozenset[int]:
        """See `Ops.ahead`: layers of which all experts are there."""
        if not (self.repeats and self.runs_ahead):
            return frozenset()
        if self._ahead.is_other(slots, levels, rule):
            self.forget_work()
            self._ahead.take(slots, levels, rule)
        if is_start:
            slots.close()  # what Ctrl-C may have left open
        return self._ahead.layers(is_start=is_start)

    def choose(self, layer: int, x: Array, router: RouterWeights, rule: RouteRule) -> None:
        """See `Ops.choose`."""
        ahead, at = self._ahead, slice(layer, layer + 1)
        self.route(
            x, router, rule, scores=ahead.scores, experts=ahead.experts[at], gates=ahead.gates[at]
        )

    def run_chosen(
        self,
        layer: int,
        x: Array,
        weights: ExpertLayer,
        parts: Array,
        out: Array,
        beside: Beside | None,
    ) -> bool:
        """See `Ops.run_chosen`."""
        ahead, at = self._ahead, slice(layer, layer + 1)
        matrices, to = (None, None) if beside is None else beside
        _core.run_chosen(
            self._ws, x, ahead.slots, layer, ahead.experts[at], ahead.gates[at], ahead.levels, parts, out,
            weights.activation, weights.biases, weights.basis, matrices, to,
        )  # fmt: skip
        return beside is not None

    def chosen(self) -> Ids:
        """See `Ops.chosen`."""
        return self._ahead.experts

    def slot_scores(
        self,
        x: Array,
        layers: tuple[Array, Array, Array],
        experts: Ids,
        gates: Array,
        scores: Array,
    ) -> None:
        """See `Ops.slot_scores`."""
        _core.slot_scores(self._ws, x, *layers, experts, gates, scores)

    def look_ahead(
        self,
        x: Array,
        routers: Sequence[RouterWeights],
        rule: RouteRule,
        eps: float,
        *,
        normed: Array,
        scores: Array,
        experts: Ids,
        gates: Array,
    ) -> None:
        """See `Ops.look_ahead`."""
        _core.look_ahead(
            self._ws, x, [r.norm for r in routers], [r.weight for r in routers],
            [r.bias for r in routers], [r.choice_bias for r in routers], eps, rule, normed, scores,
            experts, gates,
        )  # fmt: skip

    def expect(
        self, slots: _core.Cache, first: int, experts: NDArray[np.int32], beside: Beside | None
    ) -> None:
        """See `Ops.expect`: threads read the first of them while others decide."""
        width = 0 if beside is None else beside.matrices[1].rows
        _core.expect_experts(self._ws, slots, first, experts, width)

    def expert_ffn(
        self,
        x: Array,
        layer: ExpertLayer,
        request: Request,
        plan: Plan,
        group: Sequence[int],
        parts: Array,
        *,
        hidden: Array | None = None,
    ) -> None:
        """See `Ops.expert_ffn`; rows of hidden [m, H], if given, get what each w_down is applied to."""
        self._project(x, layer, request)
        _core.expert_ffn(
            self._ws, x, request.slots, request.experts, request.levels, plan.offsets, plan.tokens,
            group, parts, hidden, layer.activation, layer.biases, layer.basis, request.projected,
        )  # fmt: skip

    def _project(self, x: Array, layer: ExpertLayer, request: Request) -> None:
        """Does what the corrections of all groups need: of many tokens at once; of few, each group on its way."""
        if layer.basis is not None and request.projected is None and len(x) > _FEW_TOKENS:
            request.projected = np.empty((len(x), MOST_RANK), np.float32)
            _core.project(self._ws, x, layer.basis, request.projected)

    def run_hits(
        self,
        x: Array,
        layer: ExpertLayer,
        slots: Any,
        first: int,
        chosen: Ids,
        gates: Array,
        levels: NDArray[np.int8],
        parts: Array,
        out: Array,
    ) -> bool:
        """See `Ops.run_hits`: plans cost a processor little of its time."""
        return False

    def run_experts(
        self,
        x: Array,
        layer: ExpertLayer,
        request: Request,
        groups: Iterator[list[int]],
        plan: Plan,
        parts: Array,
        out: Array,
        beside: Beside | None,
    ) -> bool:
        """See `Ops.run_experts`: asks the slots itself."""
        self._project(x, layer, request)
        matrices, to = (None, None) if beside is None else beside
        _core.run_experts(
            self._ws, x, request.slots, request.experts, request.levels, plan.offsets, plan.tokens,
            plan.rows, plan.gates, parts, out, layer.activation, layer.biases, layer.basis, request.projected,
            matrices, to,
        )  # fmt: skip
        return beside is not None

    def combine(self, parts: Array, plan: Plan, out: Array) -> None:
        """See `Ops.combine`."""
        _core.combine(self._ws, parts, plan.rows, plan.gates, out)

    def stand_in(
        self, x: Array, maps: tuple[Array, Array, Array], experts: Ids, plan: Plan, out: Array
    ) -> None:
        """See `Ops.stand_in`."""
        up, bias, down = maps
        tokens, slots = (plan.rows < 0).nonzero()
        chosen, gates = experts[tokens, slots], plan.gates[tokens, slots]
        for e in sorted(set(chosen.tolist())):
            at = chosen == e
            rows = tokens[at]
            inner = np.empty((len(rows), len(bias[e])), np.float32)
            _core.linear_f32(self._ws, x[rows], up[e], inner)
            inner += bias[e]
            inner *= gates[at, None]
            added = inner[:, :1] * down[e, 0]
            for i in range(
                1, len(bias[e])
            ):  # one after the other, so that the order is the same everywhere
                added += inner[:, i : i + 1] * down[e, i]
            out[rows] += added

"""The verbs of the forward pass on a device: kernels on a queue, and the CPU's bits.

Weights outside the experts, keys and values and activations lie in the device's memory. The host has what schedulers
look at, the embedding, of which a token needs one row, and the experts that are not in the device's memory: it computes
them itself. See `Ops` for the verbs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import astuple, replace
from time import perf_counter
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import ModelConfig
from edgemoe.ops import (
    ExpertLayer,
    Ids,
    OpsShape,
    RouterWeights,
    RowTable,
    attend_in_steps,
    run_experts_in_steps,
)  # fmt: skip
from edgemoe.ops_cpu import CpuOps
from edgemoe.ops_cuda_ahead import Ahead
from edgemoe.ops_cuda_mixers import Array, CudaMixers
from edgemoe.ops_notes import DeviceNotes
from edgemoe.placement import MOST_HEAD_DIM, Both, lacks
from edgemoe.plan import Plan
from edgemoe.specs import Activation, AttentionSpec, MixerSpec, MlaSpec, RouterSpec
from edgemoe.store import Request
from edgemoe.tiers import Tiers

__all__ = ["CudaOps"]

HostArray = NDArray[np.float32]

_FEW_TOKENS = 4  # whose activations are copied to the host with their routing, as it probably computes experts
_LOGIT_ROWS = 16  # of which logits are made at once


class CudaOps(CudaMixers):
    """Runs operations on a device, and experts that are not there on the host. One caller at a time."""

    repeats = True
    """Work is noted and repeated; without that what comes is the same, later."""
    runs_ahead = True
    """Layers of which it has all experts need no host; likewise."""
    counts_chosen = False

    def __init__(
        self,
        shape: OpsShape,
        device: _core.Device,
        config: ModelConfig,
        *,
        hosts: bool,
        corrected: bool,
        shares: bool = False,
    ) -> None:
        """Args:
        hosts: the host runs some mixers.
        corrected: matrices may have corrections.
        shares: experts in the host's memory are lent to the device, which runs all of them.
        """
        super().__init__(
            device, _core.DeviceWorkspace(device, *_workspace(shape, config, corrected))
        )
        self._cpu = CpuOps(_host_shape(shape, hosts))
        d, e, k = config.hidden_size, config.num_experts, config.experts_per_token
        self._logits = self.empty(min(shape.max_tokens, _LOGIT_ROWS), config.vocab_size)
        self._scores = self.empty(shape.max_tokens, max(e, 1))
        self._unturned = self.empty(shape.max_tokens, 0)
        self._is_posted = False
        """Logits are on their way to the host, and the rows that they are of if these are few."""
        self._notes = DeviceNotes(self._ws)
        self._ahead = Ahead(device, self._ws, config) if _may_run_ahead(config, corrected) else None
        self._x = np.empty((shape.max_tokens, d), np.float32)
        self._parts = np.empty((shape.max_tokens * max(k, 1), d), np.float32)
        self._shares = shares
        self._layers: dict[int, tuple[ExpertLayer, tuple[ExpertLayer, list[Any], Any]]] = {}
        """By its identity, a layer, and what its experts have: on the host; biases and basis on the device."""

    @staticmethod
    def scratch_bytes(shape: OpsShape, config: ModelConfig, *, corrected: bool) -> int:
        """Returns what the operations' own scratch takes of a device."""
        rows = min(shape.max_tokens, _LOGIT_ROWS)
        floats = (rows * config.vocab_size, shape.max_tokens * max(config.num_experts, 1), 0)
        own = sum(_core.Device.taken(4 * n) for n in floats)
        if _may_run_ahead(config, corrected):
            own += Ahead.bytes(config)
        return own + _core.DeviceWorkspace.bytes(*_workspace(shape, config, corrected))

    @staticmethod
    def host_bytes(shape: OpsShape, config: ModelConfig, *, hosts: bool) -> int:
        """Returns the host's memory of the operations' scratch."""
        rows = shape.max_tokens * (1 + config.experts_per_token)
        return CpuOps.scratch_bytes(_host_shape(shape, hosts)) + 4 * rows * config.hidden_size

    def beside(self, spec: MixerSpec, keys: str, values: str) -> CpuOps | None:
        """See `Ops.beside`."""
        return self._cpu if lacks(spec, keys, values) else None

    def download(self, x: Array, out: HostArray) -> None:
        """See `Ops.download`."""
        _core.device_download(self._ws, [x], [out])

    def upload(self, x: HostArray, out: Array) -> None:
        """See `Ops.upload`."""
        self._x_of = None
        out.upload(x)

    def settle(self) -> None:
        """See `Ops.settle`; waits."""
        _core.device_download(self._ws, [], [])

    def host(self, *shape: int, dtype: str) -> NDArray[Any]:
        """See `Ops.host`."""
        return self._cpu.host(*shape, dtype=dtype)

    def kv_layer(
        self, spec: AttentionSpec, keys: str, values: str, capacity: int, *, resident: bool = True
    ) -> _core.DeviceKvLayer:
        """See `Ops.kv_layer`; memory of a device is taken at once."""
        return _core.DeviceKvLayer(
            device=self._device, key_type=keys, value_type=values, num_heads=spec.num_kv_heads,
            capacity=capacity, head_dim=spec.head_dim,
        )  # fmt: skip

    def copy_kv(
        self, source: _core.DeviceKvLayer, target: _core.DeviceKvLayer, begin: int, end: int
    ) -> None:
        """See `Ops.copy_kv`."""
        target.take(source, begin, end)

    def attention_weights(
        self, layer: int, spec: AttentionSpec, tensors: Mapping[str, Any], keys: str
    ) -> _core.DeviceAttention:
        """See `Ops.attention_weights`."""
        q_norm, k_norm, ones = tensors.get("q_norm"), tensors.get("k_norm"), None
        if spec.qk_norm == "unit" or spec.v_norm:
            ones = self.empty(spec.head_dim)
            ones.upload(np.ones(spec.head_dim, np.float32))
        if spec.qk_norm == "unit":
            q_norm = k_norm = ones
        return _core.DeviceAttention(
            index=layer, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
            window=spec.window, scale=spec.scale, q_bias=tensors.get("q_bias"), k_bias=tensors.get("k_bias"),
            v_bias=tensors.get("v_bias"), q_norm=q_norm, k_norm=k_norm, v_norm=ones if spec.v_norm else None,
            sinks=tensors.get("sinks"), norm_per_head=spec.qk_norm in ("head", "unit"), norm_eps=spec.norm_eps,
            clip=spec.clip or 0.0, rope_dim=spec.rope_dim, norm_after_rope=spec.norm_after_rope,
            chunk=spec.chunk, growth=spec.growth, grow_every=spec.grow_every,
        )  # fmt: skip

    def rope_table(self, frequencies: HostArray, scale: float) -> _core.Rope:
        """See `Ops.rope_table`."""
        return _core.Rope(frequencies, scale)

    # ------------------------------------------------------------ work that is repeated

    def place(self, spec: AttentionSpec | MlaSpec, pos: int) -> Hashable | None:
        """See `Ops.place`."""
        return self._notes.place(spec, pos) if self.repeats else None

    def repeat(self, key: Hashable | None, run: Callable[[], None]) -> None:
        """See `Ops.repeat`."""
        if key is None or (note := self._notes.of(key, run)) is None:
            run()
        else:
            self._is_posted, self._x_of = self._ws.repeat(note), None

    def forget_work(self) -> None:
        """See `Ops.forget_work`."""
        self._notes.forget()

    # ------------------------------------------------------------ rows

    def embed(self, table: RowTable | Both, ids: Ids, scale: float, out: Array) -> None:
        """See `Ops.embed`."""
        self._x_of = None
        rows = self._x[: len(ids)]
        self._cpu.embed(table.host if isinstance(table, Both) else table, ids, scale, rows)
        out.upload(rows)

    def norm(self, x: Array, weight: Array, eps: float, out: Array) -> None:
        """See `Ops.norm`."""
        self._x_of = None
        _core.device_add_norm(self._ws, None, 0.0, x, weight, eps, out)

    def linear(
        self,
        x: Array,
        weights: Sequence[_core.DeviceMatrix | Both],
        outs: Sequence[Array | HostArray],
    ) -> None:
        """See `Ops.linear`; an `out` of numpy, alone, is the host's, and waited for."""
        matrices = [w.device if isinstance(w, Both) else w for w in weights]
        if not isinstance(outs[0], np.ndarray):
            _core.device_linear(self._ws, x, matrices, cast("list[Array]", outs))
            return
        out = outs[0]
        for first in range(0, len(x), len(self._logits)):
            part = self._logits[: min(len(self._logits), len(x) - first)]
            _core.device_linear(self._ws, x[first : first + len(part)], matrices, [part])
            _core.device_download(self._ws, [part], [out[first : first + len(part)]])

    def ffn(
        self,
        x: Array,
        gate: _core.DeviceMatrix | None,
        up: _core.DeviceMatrix,
        down: _core.DeviceMatrix,
        out: Array,
        *,
        activation: Activation,
    ) -> None:
        """See `Ops.ffn`."""
        _core.device_ffn(self._ws, x, gate, up, down, out, activation)

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
        _core.device_add_rows(self._ws, x, scale, gate_weight, gate_input, out)

    def add_norm(
        self, added: Array, scale: float, x: Array, weight: Array, eps: float, out: Array
    ) -> None:
        """See `Ops.add_norm`."""
        self._x_of = None
        _core.device_add_norm(self._ws, added, scale, x, weight, eps, out)

    def add_bias(self, bias: Array | HostArray, out: Array | HostArray) -> None:
        """See `Ops.add_bias`."""
        if isinstance(out, np.ndarray):
            self._cpu.add_bias(cast(HostArray, bias), out)
        else:
            _core.device_add_bias(self._ws, cast(Array, bias), out)

    def scale(self, factor: float, out: Array | HostArray) -> None:
        """See `Ops.scale`."""
        if isinstance(out, np.ndarray):
            self._cpu.scale(factor, out)
        else:
            _core.device_scale(self._ws, factor, out)

    def weigh(self, x: Array, gates: HostArray, out: Array) -> None:
        """See `Ops.weigh`."""
        self._x_of = None
        _core.device_weigh(self._ws, x, gates, out)

    def soft_cap(self, cap: float, out: HostArray) -> None:
        """See `Ops.soft_cap`: of logits, which are the host's."""
        self._cpu.soft_cap(cap, out)

    # ------------------------------------------------------------ attention

    def rope(self, table: _core.Rope, pos: int, cos: Array, sin: Array) -> None:
        """See `Ops.rope`."""
        host = np.empty((2, *cos.shape), np.float32)
        table.angles(pos, host[0], host[1])
        cos.upload(host[0])
        sin.upload(host[1])

    def attention(
        self,
        weights: _core.DeviceAttention,
        q: Array,
        k: Array,
        v: Array,
        pos: int,
        cos: Array | None,
        sin: Array | None,
        table: _core.Rope | None,
        kv: _core.DeviceKvLayer,
        out: Array,
    ) -> None:
        """See `Ops.attention`; what it raises is raised by the next verb that waits."""
        if cos is None or sin is None:
            cos = sin = self._unturned[: len(q)]
        _core.device_attention(self._ws, weights, q, k, v, pos, cos, sin, kv, out)

    attend = attend_in_steps  # a queue waits for nobody

    # ------------------------------------------------------------ experts

    def route_rule(self, spec: RouterSpec) -> _core.RouteRule:
        """See `Ops.route_rule`."""
        if self._ahead is not None:
            self._ahead.change(spec.top_k)
        return self._cpu.route_rule(spec)

    def begin_route(self, x: Array, router: RouterWeights) -> None:
        """See `Ops.begin_route`: logits are the device's, and on their way to the host with a few tokens' rows."""
        logits = self._scores[: len(x)]
        _core.device_matmul(self._ws, x, cast(Any, router.weight), logits)
        there = [logits, x] if len(x) <= _FEW_TOKENS else [logits]
        self._is_posted = _core.device_post(self._ws, there)

    def route(
        self,
        x: Array,
        router: RouterWeights,
        rule: _core.RouteRule,
        *,
        scores: HostArray,
        experts: Ids,
        gates: HostArray,
    ) -> None:
        """See `Ops.route`: the choice is the host's, which plans by it."""
        is_few = len(x) <= _FEW_TOKENS
        outs = [scores, self._x[: len(x)]] if is_few else [scores]
        if self._is_posted:
            _core.device_collect(self._ws, outs)
        else:
            _core.device_download(self._ws, [self._scores[: len(x)], x][: len(outs)], outs)
        self._x_of = x if is_few else None
        self._cpu.choose_by(*_biases(router), rule, scores, experts, gates)

    def slot_scores(
        self,
        x: Array,
        layers: tuple[HostArray, HostArray, HostArray],
        experts: Ids,
        gates: HostArray,
        scores: HostArray,
    ) -> None:
        """See `Ops.slot_scores`: on the host, where its small layers are."""
        self._cpu.slot_scores(self._copy(x), layers, experts, gates, scores)

    def look_ahead(
        self,
        x: Array,
        routers: Sequence[RouterWeights],
        rule: _core.RouteRule,
        eps: float,
        *,
        normed: Array,
        scores: Array,
        experts: Ids,
        gates: HostArray,
    ) -> None:
        """See `Ops.look_ahead`."""
        for i, router in enumerate(routers):
            norm, weight = cast(Any, router.norm), cast(Any, router.weight)
            _core.device_add_norm(self._ws, None, 0.0, x, norm, eps, normed.item(i))
            _core.device_matmul(self._ws, normed.item(i), weight, scores.item(i))
        logits = np.empty(scores.shape, np.float32)
        _core.device_download(self._ws, [scores], [logits])
        for i, router in enumerate(routers):
            self._cpu.choose_by(*_biases(router), rule, logits[i], experts[i], gates[i])

    def ahead(
        self, slots: Any, levels: NDArray[np.int8], rule: _core.RouteRule, *, is_start: bool
    ) -> frozenset[int]:
        """See `Ops.ahead`: layers of which the device has all experts."""
        if self._ahead is None or not self.runs_ahead or not isinstance(slots, Tiers):
            return frozenset()
        return self._ahead.layers(slots.device, levels, rule, is_start)

    def choose(self, layer: int, x: Array, router: RouterWeights, rule: _core.RouteRule) -> None:
        """See `Ops.choose`."""
        _core.device_matmul(self._ws, x, cast(Any, router.weight), self._scores[:1])
        cast(Ahead, self._ahead).choose(layer, self._scores[:1], router, rule)

    def run_chosen(
        self, layer: int, x: Array, weights: ExpertLayer, parts: Array, out: Array, beside: Any
    ) -> bool:
        """See `Ops.run_chosen`: what is beside them is for itself."""
        _, biases, _ = self._layer(weights)
        cast(Ahead, self._ahead).run(layer, x, weights.activation, biases, parts, out)
        return False

    def chosen(self) -> Ids:
        """See `Ops.chosen`."""
        return cast(Ahead, self._ahead).chosen()

    def expect(self, slots: Any, first: int, experts: NDArray[np.int32], beside: Any) -> None:
        """See `Ops.expect`: of no use to a device."""

    def expert_ffn(
        self,
        x: Array,
        layer: ExpertLayer,
        request: Request,
        plan: Plan,
        group: Sequence[int],
        parts: Array,
    ) -> None:
        """See `Ops.expert_ffn`: a group is all the device's, or all the host's."""
        slots: Any = request.slots
        layer, biases, basis = self._layer(layer)

        def run_there(cache: Any, positions: Sequence[int], stream: Any = None) -> None:
            _core.device_expert_ffn(
                self._ws, x, cache, request.experts, request.levels, plan.offsets, plan.tokens,
                positions, parts, layer.activation, biases, basis, stream,
            )  # fmt: skip

        if self._shares:
            return run_there(slots, group)
        rates = None
        if isinstance(slots, Tiers):
            if slots.is_there:
                return run_there(slots.device, group)
            passing, group = slots.passing(
                request.experts, request.levels, plan.offsets, list(group)
            )
            if passing:
                if group:  # which the processor runs meanwhile: it must not wait for what passes
                    self._copy(x)
                run_there(slots.host, passing, slots.stream)
            rates, sizes = slots.rates, slots.sizes
            request = replace(request, slots=slots.host)
        if not group:
            return None
        rows, x_here = self._parts[: len(plan.tokens)], self._copy(x)
        start = perf_counter()
        self._cpu.expert_ffn(x_here, layer, request, plan, group, rows)
        if rates is not None:
            tokens = sum(int(plan.offsets[i + 1] - plan.offsets[i]) for i in group)
            size = int(sizes[request.levels[list(group)]].sum())
            rates.note(size, tokens, len(group), perf_counter() - start)
        for i in group:
            first, end = int(plan.offsets[i]), int(plan.offsets[i + 1])
            parts[first:end].upload(rows[first:end])
        return None

    run_experts = run_experts_in_steps

    def run_hits(
        self,
        x: Array,
        layer: ExpertLayer,
        slots: Any,
        first: int,
        chosen: Ids,
        gates: HostArray,
        levels: NDArray[np.int8],
        parts: Array,
        out: Array,
    ) -> bool:
        """See `Ops.run_hits`: it has them where no copy is under way."""
        if not self.repeats or not isinstance(slots, Tiers) or not slots.is_settled:
            return False
        _, biases, basis = self._layer(layer)
        has_all = _core.device_run_hits(
            self._ws, x, slots.device, first, chosen, gates, levels, slots.weights, slots.unit, parts, out,
            layer.activation, biases, basis,
        )  # fmt: skip
        if has_all:
            slots.advance(first, 1)
        return has_all

    def combine(self, parts: Array, plan: Plan, out: Array) -> None:
        """See `Ops.combine`."""
        _core.device_combine(self._ws, parts, plan.rows, plan.gates, out)

    def stand_in(
        self,
        x: Array,
        maps: tuple[HostArray, HostArray, HostArray],
        experts: Ids,
        plan: Plan,
        out: Array,
    ) -> None:
        """See `Ops.stand_in`: on the host, where its small maps are."""
        sums = np.empty((len(x), maps[0].shape[2]), np.float32)
        _core.device_download(self._ws, [cast(Any, out)], [sums])
        self._cpu.stand_in(self._copy(x), maps, experts, plan, sums)
        out.upload(sums)

    def _layer(self, layer: ExpertLayer) -> tuple[ExpertLayer, list[Any], Any]:
        """Returns what a layer's experts have beside matrices: on the host, and biases and basis on the device."""
        if id(layer) not in self._layers:
            biases, basis = cast(Any, layer.biases), cast(Any, layer.basis)
            host = replace(
                layer, biases=None if biases is None else tuple(b.host for b in biases),
                basis=None if basis is None else basis.host,
            )  # fmt: skip
            there = [] if biases is None else [b.device for b in biases]
            own = host, there, None if basis is None else basis.device
            self._layers[id(layer)] = layer, own  # which keeps its identity from being another's
        return self._layers[id(layer)][1]

    def _copy(self, x: Array) -> HostArray:
        """Returns the host's copy of what was routed last."""
        out = self._x[: len(x)]
        if self._x_of is not x:
            _core.device_download(self._ws, [x], [out])
            self._x_of = x
        return out


def _may_run_ahead(config: ModelConfig, corrected: bool) -> bool:
    """Returns whether the device could choose experts by itself: where these take what the router gives them."""
    return bool(config.moe_layers) and not corrected and not config.gate_input


def _biases(router: RouterWeights) -> tuple[HostArray | None, HostArray | None]:
    """Returns those of a router, the host's."""
    bias, choice_bias = (
        None if b is None else cast(Any, b).host for b in (router.bias, router.choice_bias)
    )
    return bias, choice_bias


def _workspace(s: OpsShape, config: ModelConfig, corrected: bool) -> tuple[Any, ...]:
    """Returns the last arguments of a `DeviceWorkspace`."""
    # Wider heads are the host's.
    _, *shape = astuple(replace(s, head_dim=min(s.head_dim, MOST_HEAD_DIM)))
    routed = s.max_tokens * max(config.experts_per_token, 1)
    return (*shape, routed, corrected)


def _host_shape(shape: OpsShape, hosts: bool) -> OpsShape:
    """Returns the same for the host, which only attends where it runs mixers."""
    return shape if hosts else replace(shape, max_context=1)

"""The verbs of the forward pass on a device: kernels on a queue, and the CPU's bits.

Weights outside the experts, keys and values and activations lie in the device's memory. The host has what schedulers
look at, the embedding, of which a token needs one row, and the experts that are not in the device's memory: it computes
them itself. See `Ops` for the verbs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import ModelConfig
from edgemoe.file.format import MoeFile
from edgemoe.ops import ExpertLayer, Ids, OpsShape, RouterWeights
from edgemoe.ops_cpu import CpuOps
from edgemoe.plan import Plan
from edgemoe.specs import Activation, AttentionSpec, RouterSpec
from edgemoe.store import Request, read_dense
from edgemoe.tiers import Tiers

__all__ = ["CudaOps", "Tied", "load_on", "unsupported"]

Array = _core.DeviceArray
HostArray = NDArray[np.float32]

_FEW_TOKENS = 4  # whose activations are copied to the host with their routing, as it probably computes experts
_LOGIT_ROWS = 16  # of which logits are made at once
_MOST_HEAD_DIM = 256
_CACHES = ("f16", "f32", "q8_0")

# What the device knows, by name. A model with anything further runs on the CPU until that is known here too.
_ATTENTION = frozenset(
    ("num_heads", "num_kv_heads", "head_dim", "scale", "window", "qkv_bias", "o_bias", "qk_norm", "norm_eps", "clip",
     "rope", "norm_after_rope")
)  # fmt: skip
_ROPE = frozenset(("name", "dim", "scale", "short_length"))
_CONFIG = frozenset(
    ("family", "vocab_size", "hidden_size", "num_layers", "context_length", "norm_eps", "tied", "mixers",
     "layer_mixers", "num_experts", "experts_per_token", "expert_hidden", "moe_layers", "scoring", "renormalise",
     "choice_bias", "gate_scale", "groups", "used_groups", "group_score", "shared_hidden", "shared_sigmoid",
     "embedding_multiplier", "residual_multiplier", "logits_divisor", "eos_ids", "router_bias")
)  # fmt: skip
_TENSORS = frozenset(
    ("attn_norm", "ffn_norm", "router", "choice_bias", "shared.gate", "shared.up", "shared.down", "shared.sigmoid",
     "router_bias", "q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tied:
    """Is an embedding that is the head too: the host decodes its rows, the device multiplies with it."""

    host: _core.Nested
    device: _core.DeviceMatrix


def unsupported(moe: MoeFile, keys: str = "f16", values: str = "f16") -> str | None:
    """Returns what of a model has no kernels for a device yet, None when all has.

    Args:
        keys: the kind that caches store keys as.
        values: the same of values.
    """
    config = moe.config
    for kind in (keys, values):
        if kind not in _CACHES:
            return f"a KV cache in {kind} ({', '.join(_CACHES)} have)"
    if name := _unknown(config, _CONFIG):
        return f"{name} {getattr(config, name)}"
    for spec in config.mixers:
        if type(spec) is not AttentionSpec:
            return f"a mixer of the kind {spec.kind}"
        for part, known in ((spec, _ATTENTION), (spec.rope, _ROPE)):
            if part is not None and (name := _unknown(part, known)):
                return f"attention with {name}"
        if spec.head_dim > _MOST_HEAD_DIM:
            return f"heads of {spec.head_dim} columns, more than {_MOST_HEAD_DIM}"
        if keys == "q8_0" and spec.has_constant_keys:
            return "keys in 8 bits of a model with key biases (-ctk f16 has)"
    if moe.scheme.correction:
        return "a correction of low rank"
    for full in moe.tensors:
        if full.startswith("layers.") and full.split(".", 2)[2] not in _TENSORS:
            return f"the tensor {full}"
    return None


def _unknown(spec: Any, known: frozenset[str]) -> str | None:
    """Returns a field that is not among the known ones, and not at a default that says nothing."""
    for field in fields(spec):
        says_something = field.default is MISSING or getattr(spec, field.name) != field.default
        if field.name not in known and says_something:
            return field.name
    return None


def load_on(device: _core.Device, moe: MoeFile, level: int, *, verify: bool) -> dict[str, Any]:
    """Reads every tensor outside the routed experts to where it is used, one at a time; see `load_dense`."""
    ropes = {name for spec in moe.config.ropes for name in spec.tensors()}
    out: dict[str, Any] = {}
    for name, weight in read_dense(moe, level, verify=verify):
        if isinstance(weight, _core.Nested):
            if name == "embed" and not moe.config.tied:
                out[name] = weight
            else:
                there = _core.DeviceMatrix(device, weight)
                out[name] = Tied(weight, there) if name == "embed" else there
        elif name in ropes or name.split(".")[-1] in ("choice_bias", "router_bias"):
            out[name] = weight
        else:
            out[name] = _uploaded(device, weight)
    return out


def _uploaded(device: _core.Device, array: HostArray) -> Array:
    out = _core.DeviceArray(device, array.shape)
    out.upload(array)
    return out


class CudaOps:
    """Runs operations on a device, and experts that are not there on the host. One caller at a time."""

    def __init__(self, shape: OpsShape, device: _core.Device, config: ModelConfig) -> None:
        self._device, self._cpu = device, CpuOps(shape)
        self._ws = _core.DeviceWorkspace(device, *_workspace(shape), _routed(shape, config))
        d, e, k = config.hidden_size, config.num_experts, config.experts_per_token
        self._logits = self.empty(min(shape.max_tokens, _LOGIT_ROWS), config.vocab_size)
        self._scores = self.empty(shape.max_tokens, max(e, 1))
        self._x = np.empty((shape.max_tokens, d), np.float32)
        self._x_of: Array | None = None
        """What `_x` is a copy of."""
        self._parts = np.empty((shape.max_tokens * max(k, 1), d), np.float32)

    @staticmethod
    def scratch_bytes(shape: OpsShape, config: ModelConfig) -> int:
        """Returns what the operations' own scratch takes of a device."""
        rows = min(shape.max_tokens, _LOGIT_ROWS)
        floats = (rows * config.vocab_size, shape.max_tokens * max(config.num_experts, 1))
        own = sum(_core.Device.taken(4 * n) for n in floats)
        return own + _core.DeviceWorkspace.bytes(*_workspace(shape), _routed(shape, config))

    @staticmethod
    def host_bytes(shape: OpsShape, config: ModelConfig) -> int:
        """Returns the host's memory of the operations' scratch."""
        rows = shape.max_tokens * (1 + config.experts_per_token)
        return CpuOps.scratch_bytes(replace(shape, max_context=1)) + 4 * rows * config.hidden_size

    def empty(self, *shape: int) -> Array:
        """See `Ops.empty`."""
        return _core.DeviceArray(self._device, shape)

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
        return _core.DeviceAttention(
            index=layer, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
            window=spec.window, scale=spec.scale, q_bias=tensors.get("q_bias"), k_bias=tensors.get("k_bias"),
            v_bias=tensors.get("v_bias"), q_norm=tensors.get("q_norm"), k_norm=tensors.get("k_norm"),
            norm_per_head=spec.qk_norm == "head", norm_eps=spec.norm_eps, clip=spec.clip or 0.0,
            rope_dim=spec.rope_dim, norm_after_rope=spec.norm_after_rope,
        )  # fmt: skip

    def rope_table(self, frequencies: HostArray, scale: float) -> _core.Rope:
        """See `Ops.rope_table`."""
        return _core.Rope(frequencies, scale)

    # ------------------------------------------------------------ rows

    def embed(self, table: _core.Nested | Tied, ids: Ids, scale: float, out: Array) -> None:
        """See `Ops.embed`."""
        self._x_of = None
        rows = self._x[: len(ids)]
        self._cpu.embed(table.host if isinstance(table, Tied) else table, ids, scale, rows)
        out.upload(rows)

    def norm(self, x: Array, weight: Array, eps: float, out: Array) -> None:
        """See `Ops.norm`."""
        self._x_of = None
        _core.device_add_norm(self._ws, None, 0.0, x, weight, eps, out)

    def linear(
        self,
        x: Array,
        weights: Sequence[_core.DeviceMatrix | Tied],
        outs: Sequence[Array | HostArray],
    ) -> None:
        """See `Ops.linear`; an `out` of numpy, alone, is the host's, and waited for."""
        matrices = [w.device if isinstance(w, Tied) else w for w in weights]
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
        gate: _core.DeviceMatrix,
        up: _core.DeviceMatrix,
        down: _core.DeviceMatrix,
        out: Array,
        *,
        activation: Activation,
    ) -> None:
        """See `Ops.ffn`."""
        assert activation == "swiglu"
        _core.device_ffn(self._ws, x, gate, up, down, out)

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

    def add_bias(self, bias: Array, out: Array) -> None:
        """See `Ops.add_bias`."""
        _core.device_add_bias(self._ws, bias, out)

    def scale(self, factor: float, out: Array | HostArray) -> None:
        """See `Ops.scale`."""
        if isinstance(out, np.ndarray):
            self._cpu.scale(factor, out)
        else:
            _core.device_scale(self._ws, factor, out)

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
            cos = sin = self.empty(len(q), 0)
        _core.device_attention(self._ws, weights, q, k, v, pos, cos, sin, kv, out)

    # ------------------------------------------------------------ experts

    def route_rule(self, spec: RouterSpec) -> _core.RouteRule:
        """See `Ops.route_rule`."""
        return self._cpu.route_rule(spec)

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
        """See `Ops.route`: logits are the device's, the choice is the host's, which plans by it."""
        logits = self._scores[: len(x)]
        _core.device_matmul(self._ws, x, cast(Any, router.weight), logits)
        self._x_of = None
        if len(x) <= _FEW_TOKENS:
            _core.device_download(self._ws, [logits, x], [scores, self._x[: len(x)]])
            self._x_of = x
        else:
            _core.device_download(self._ws, [logits], [scores])
        self._cpu.choose(router, rule, scores, experts, gates)

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
            self._cpu.choose(router, rule, logits[i], experts[i], gates[i])

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
        if isinstance(slots, Tiers):
            if slots.is_there:
                _core.device_expert_ffn(
                    self._ws, x, slots.device, request.experts, request.levels, plan.offsets,
                    plan.tokens, group, parts,
                )  # fmt: skip
                return
            request = replace(request, slots=slots.host)
        rows = self._parts[: len(plan.tokens)]
        self._cpu.expert_ffn(self._copy(x), layer, request, plan, group, rows)
        for i in group:
            first, end = int(plan.offsets[i]), int(plan.offsets[i + 1])
            parts[first:end].upload(rows[first:end])

    def combine(self, parts: Array, plan: Plan, out: Array) -> None:
        """See `Ops.combine`."""
        _core.device_combine(self._ws, parts, plan.rows, plan.gates, out)

    def _copy(self, x: Array) -> HostArray:
        """Returns the host's copy of what was routed last."""
        out = self._x[: len(x)]
        if self._x_of is not x:
            _core.device_download(self._ws, [x], [out])
            self._x_of = x
        return out


def _workspace(s: OpsShape) -> tuple[int, int, int, int, int, int]:
    """Returns the first arguments of a `DeviceWorkspace`."""
    return s.max_tokens, s.max_cols, s.max_hidden, s.max_context, s.head_dim, s.num_heads


def _routed(shape: OpsShape, config: ModelConfig) -> int:
    """Returns the most pairs of a token and an expert."""
    return shape.max_tokens * max(config.experts_per_token, 1)

"""The verbs of the forward pass: what a device must do to run a model.

The model and the experts see only these. They never look inside an array but for those of `host`: a device's arrays
are its own, have `shape`, `len` and slices of leading rows, and nothing else. Every verb gives the same bits on every
device, and a row's result never depends on the rows beside it. Arrays are contiguous float32 unless said; what a verb
writes is an argument, made by `empty` or `host`. One caller at a time.

Shape letters: T tokens of a batch, D hidden, K experts per token, E experts, V vocabulary, p layers ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import ModelConfig
from edgemoe.plan import Plan
from edgemoe.specs import Activation, AttentionSpec, MixerSpec, MlaSpec, RouterSpec
from edgemoe.store import Request

__all__ = [
    "Array", "AttentionMatrices", "AttentionWeights", "Basis", "Beside", "DeltaRule", "ExpertLayer", "Ids", "KvLayer",
    "LatentMatrices", "LatentWeights", "MambaRule", "Matrix", "Ops", "OpsShape", "RopeTable", "RouteRule",
    "RouterWeights", "RowTable", "absorb_queries", "attend_in_steps", "attend_latents_in_steps", "kv_bytes", "kv_parts",
    "kv_ring", "rope_bytes", "run_experts_in_steps",
]  # fmt: skip

Array = NDArray[np.float32]
"""Activations and small weights."""
Basis = NDArray[np.int8]
"""V of corrections, rows in 8 bits."""
Ids = NDArray[np.int32]
Matrix = _core.Nested
"""A resident matrix [rows, cols] as the file has it."""
RowTable = _core.Nested | _core.StoredRows
"""What rows are looked up in: a matrix that is resident, or is so in part."""
RouteRule = _core.RouteRule
"""How a router's logits become a choice."""
AttentionWeights = _core.AttentionLayer
"""Biases and norms of one layer's attention, and how it computes."""
LatentWeights = _core.LatentLayer
"""The norm of one layer's latents, and how it computes."""
RopeTable = _core.Rope
"""Frequencies that turn queries and keys by their positions."""
KvLayer = _core.KvLayer
"""Keys and values of one layer and sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaRule:
    """What one layer's delta rule has besides its matrices."""

    key_heads: int
    rate: Array
    """[value_heads]: a step's decay is exp(-rate * softplus(x + bias)), or exp(-5 * sigmoid(rate * (x + bias)))."""
    bias: Array
    """[value_heads] or [value_heads * key_dim], as the decays are."""
    bounded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaRule:
    """What one layer's Mamba-2 has besides its matrices; all [heads]."""

    groups: int
    rate: Array
    """A step's decay is exp(-rate * step)."""
    step_bias: Array
    """A step is softplus(x + bias)."""
    skip: Array
    """How much of its input passes by the state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterWeights:
    """One layer's router."""

    norm: Array
    """[D], of the residual before it."""
    weight: Array
    """[E, D]"""
    bias: Array | None
    """[E], of the logits."""
    choice_bias: Array | None
    """[E], of the scores, for choosing alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayer:
    """What the experts of one layer have beside their matrices."""

    activation: Activation
    biases: tuple[Array, Array, Array] | None = None
    """Of all experts' gates [E, H], ups [E, H] and downs [E, D]."""
    basis: Basis | None = None
    """[rank, D padded to 64]: V of all experts' gates and ups, where these have corrections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpsShape:
    """Says how large an engine's operations get."""

    threads: int
    max_tokens: int
    """Of a batch."""
    max_cols: int
    """The widest input of a matrix."""
    max_hidden: int
    """The widest FFN."""
    max_context: int
    """Positions that attention sees."""
    head_dim: int
    num_heads: int
    """Of queries."""

    @classmethod
    def of(cls, config: ModelConfig, threads: int) -> OpsShape:
        """Returns what a model needs for one token of one position; batches and contexts are made of it."""
        d = config.hidden_size
        heads, widths = zip(*(m.heads for m in config.mixers), strict=True)
        return cls(
            threads=threads, max_tokens=1,
            max_cols=max(d, *(m.widest_input(d) for m in config.mixers)),
            max_hidden=max(config.expert_hidden, *config.shared_hidden, 0), max_context=1,
            head_dim=max(2, *widths), num_heads=max(1, *heads),
        )  # fmt: skip


def kv_bytes(kind: str, num_heads: int, capacity: int, head_dim: int) -> int:
    """Returns the memory of one layer's keys or values, stored as `kind`; the same on every device."""
    return _core.KvLayer.bytes(kind, num_heads, capacity, head_dim)


def kv_ring(window: int, tokens: int) -> int:
    """Returns the capacity of a layer that keeps a window only, for passes of at most `tokens`; likewise."""
    return _core.KvLayer.ring(window, tokens)


def kv_parts(
    layer: KvLayer, kinds: tuple[str, ...], heads: int, head_dim: int, capacity: int, length: int
) -> tuple[Any, ...]:
    """Returns where the first positions lie in a layer, a view [heads, bytes] for each of its kinds."""

    def of_head(kind: str, positions: int) -> int:
        return kv_bytes(kind, 64, positions, head_dim) // 64  # what is rounded is all of them

    views, at, blocks = [], 0, -(-length // 32) * 32
    for kind in kinds:
        whole = of_head(kind, capacity)
        found = layer.content[at : at + heads * whole].reshape(heads, whole)
        views.append(found[:, : min(of_head(kind, blocks), whole)])
        at += kv_bytes(kind, heads, capacity, head_dim)
    return tuple(views)


def rope_bytes(rope_dim: int, kept: int) -> int:
    """Returns the memory of a `RopeTable` that keeps so many positions once all were seen; the same on every device."""
    return _core.Rope.bytes(rope_dim // 2, kept)


class AttentionMatrices(NamedTuple):
    """Are a layer's projections."""

    qkv: tuple[Matrix, Matrix, Matrix]
    out: Matrix


class LatentMatrices(NamedTuple):
    """Are a layer's projections with latent attention."""

    heads: int
    kv_a: Matrix
    q_a: Matrix
    """Gives queries, where there is no q_b."""
    q_norm: Array | None
    """[q_rank], of what q_a gives, where there is a q_b."""
    q_b: Matrix | None
    k_b: Matrix
    v_b: Matrix
    out: Matrix


class Beside(NamedTuple):
    """Is an FFN that every token takes, beside a layer's experts."""

    matrices: tuple[Matrix | None, Matrix, Matrix]
    """Gate, up and down."""
    out: Array
    """[T, D]"""


class Ops(Protocol):
    """Is one device."""

    # ------------------------------------------------------------ memory

    def empty(self, *shape: int) -> Array:
        """Returns a new array of the device."""

    def beside(self, spec: MixerSpec, keys: str, values: str) -> Ops | None:
        """Returns what runs a mixer that these operations know too little of, on the host; None where they run it.

        keys and values: the kinds that its cache stores them as.
        """

    def download(self, x: Array, out: Array) -> None:
        """Copies to the host's out; waits."""

    def upload(self, x: Array, out: Array) -> None:
        """Copies from the host's x."""

    def settle(self) -> None:
        """Raises what attention could not store, and no verb since has raised."""

    def host(self, *shape: int, dtype: str) -> NDArray[Any]:
        """Returns a new array that Python reads after a verb has written it: what routers choose, for schedulers."""

    def kv_layer(
        self, spec: AttentionSpec, keys: str, values: str, capacity: int, *, resident: bool = False
    ) -> KvLayer:
        """Returns room for `capacity` positions, stored as the kinds `keys` and `values`.

        A position lies where its remainder by the capacity says; see `kv_ring`. Where it is not `resident`, a small
        one's memory is taken as it is written to.
        """

    def copy_kv(self, source: KvLayer, target: KvLayer, begin: int, end: int) -> None:
        """Copies positions [begin, end) from one layer to another."""

    def latents(self, spec: MlaSpec, kind: str, capacity: int) -> KvLayer:
        """Returns room for the latents of `capacity` positions, stored as `kind`."""

    def attention_weights(
        self, layer: int, spec: AttentionSpec, tensors: Mapping[str, Array | Matrix], keys: str
    ) -> AttentionWeights:
        """Returns what `attention` needs of a layer beside its matrices, from its tensors by name.

        Args:
            layer: its number, for errors.
            spec: how it computes.
            tensors: all that the file has of it.
            keys: the kind that caches store keys as. Those in codes leave large biases out, and scores have them.
        """

    def latent_weights(
        self, layer: int, spec: MlaSpec, tensors: Mapping[str, Array | Matrix]
    ) -> LatentWeights:
        """Returns what `latent_attention` needs of a layer beside its matrices; see `attention_weights`."""

    def rope_table(self, frequencies: Array, scale: float) -> RopeTable:
        """Returns what turns positions; `scale` multiplies cosines and sines."""

    # ------------------------------------------------------------ work that is repeated

    def place(self, spec: AttentionSpec | MlaSpec, pos: int) -> Hashable | None:
        """Says that a pass of one token is at `pos`, where others may come to be.

        Returns:
            What tells apart passes whose attention is not the same work; None where none is repeated.
        """

    def repeat(self, key: Hashable | None, run: Callable[[], None]) -> None:
        """Calls `run`, which does the same work whenever the key is the same, or does that work without it.

        Args:
            key: None for work that is never the same.
        """

    def forget_work(self) -> None:
        """Says that the same keys mean other work from now on."""

    # ------------------------------------------------------------ rows

    def embed(self, table: RowTable, ids: Ids, scale: float, out: Array) -> None:
        """out [T, D] = scale * table[ids]."""

    def norm(self, x: Array, weight: Array, eps: float, out: Array) -> None:
        """out [T, D] = RMS norm of x; out may be x."""

    def linear(self, x: Array, weights: Sequence[Matrix], outs: Sequence[Array]) -> None:
        """outs[i] [T, rows] = x [T, cols] times weights[i] transposed."""

    def linear_f32(self, x: Array, weights: Sequence[Array], outs: Sequence[Array]) -> None:
        """The same of float32 matrices, few rows that decide much; x is not rounded."""

    def linear_heads(self, x: Array, weight: Matrix, heads: int, out: Array) -> None:
        """out [T, heads * n], of each head the first columns = its rows of `weight` times its first columns of x.

        weight [heads * rows, cols], rows a multiple of 16; x [T, heads * m]. What is beside them stays.
        """

    def ffn(
        self,
        x: Array,
        gate: Matrix | None,
        up: Matrix,
        down: Matrix,
        out: Array,
        *,
        activation: Activation,
    ) -> None:
        """out [T, D] = down(activation(gate x, up x)); without a gate where the activation needs none."""

    def add(
        self,
        x: Array,
        scale: float,
        out: Array,
        *,
        gate_weight: Array | None = None,
        gate_input: Array | None = None,
    ) -> None:
        """out [T, D] += scale * x, each row times sigmoid(gate_weight · gate_input) if given."""

    def add_norm(
        self, added: Array, scale: float, x: Array, weight: Array, eps: float, out: Array
    ) -> None:
        """x [T, D] += scale * added, and out [T, D] = RMS norm of x: what stands between two halves of a layer."""

    def add_bias(self, bias: Array, out: Array) -> None:
        """out [T, D] += bias [D]."""

    def scale(self, factor: float, out: Array) -> None:
        """out *= factor."""

    def multiply(self, factors: Array, out: Array) -> None:
        """out [T, D] *= factors, [T, D], [D] or [1]."""

    def weigh(self, x: Array, gates: Array, out: Array) -> None:
        """out [T, D] = x * gates [T, 1], which are the host's."""

    def soft_cap(self, cap: float, out: Array) -> None:
        """out = cap * tanh(out / cap)."""

    # ------------------------------------------------------------ attention

    def rope(self, table: RopeTable, pos: int, cos: Array, sin: Array) -> None:
        """cos and sin [T, rope_dim / 2] for the positions from `pos`."""

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
        """Biases, norms and rotates q, k, v in place, stores k and v at `pos` in kv and attends causally.

        q and out [T, heads * head_dim], k and v [T, kv_heads * head_dim]; cos and sin are what `rope` gave, None
        with `table` where positions turn nothing. Positions before `pos` stay as they are.

        Raises:
            RangeError: a key or value does not fit the type of kv; names the layer, the number and what holds it.
        """

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
        """`linear` of x [T, D] to q, k and v, `attention` to heads, and `linear` of these to out [T, D].

        All of it at once: between calls of a single token's layer processors would wait.

        Args:
            matrices: of q, k, v, and of the output.
            rows: scratch for q, k and v.
        """

    def gate_heads(self, x: Array, gate: Array, kind: str) -> None:
        """x [T, heads * head_dim] *= what a gate says.

        kind: "sigmoid" of gate [T, heads * head_dim], or "sigmoid_head" or "softplus_head" of gate [T, heads].
        """

    # ------------------------------------------------------------ recurrent mixers, of one sequence

    # `before` is the state before the tokens, None for all zeros, and `after` becomes that after them; they are not
    # the same.

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
        """out [T, C]: a causal convolution over time of each channel, and silu if asked for; out may be x.

        weight [taps, C], the last tap for the newest token; bias [C]; before and after [taps - 1, C].
        """

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
        """out [T, value_heads * value_dim] of the gated delta rule; qkv, decay and beta are changed.

        qkv [T, C]: all q, all k, all v. decay [T, value_heads] or [T, value_heads * key_dim] and beta [T,
        value_heads]: before softplus and sigmoid. before and after [value_heads, key_dim, value_dim].
        """

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
        """out [T, heads * head_dim] of Mamba-2; step is changed, decay is scratch, both [T, heads].

        xbc [T, heads * head_dim + 2 * groups * state_dim]; step: before softplus. before and after [heads, state_dim,
        head_dim].
        """

    def gated_norm(
        self, x: Array, gate: Array, weight: Array, eps: float, groups: int, kind: str
    ) -> None:
        """x [T, C], in place: RMS norm of each of `groups` parts of a row, beside a gate [T, C].

        kind: norm(x) * silu(gate) ("silu"), norm(x) * sigmoid(gate) ("sigmoid"), norm(x * silu(gate)) ("silu_first").
        weight [C], or [C / groups] for all parts.
        """

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
        """Attends causally to latents, which are one key for all heads, and whose leading columns are the values.

        Norms and rotates keys [T, latent + rope] in place and stores them at `pos` in kv. absorbed [T, heads *
        (latent + rope)] has what `linear_heads` made of q [T, heads * (nope + rope)], and gets q's rotated columns;
        cos and sin are what `rope` gave, or None where positions turn nothing. out [T, heads * latent].

        Raises:
            RangeError: as `attention`.
        """

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
        """Is all of a layer of latent attention on x [T, D], with one state and without a gate, at once; as `attend`.

        Args:
            eps: of the norm after q_a.
            rows: scratch for what q_a, q_b, k_b and kv_a give, what heads see, and what v_b makes of that.
        """

    # ------------------------------------------------------------ experts

    def route_rule(self, spec: RouterSpec) -> RouteRule:
        """Returns what `route` and `look_ahead` need to know of a model's routers."""

    def begin_route(self, x: Array, router: RouterWeights) -> None:
        """Begins the next `route`, which is for the same: all of it that a device does without the host."""

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
        """Writes each token's experts and gates [T, K], best first, and the scores of all, scores [T, E].

        The three are the host's, which waits for them.
        """

    def ahead(
        self, slots: Any, levels: NDArray[np.int8], rule: RouteRule, *, is_start: bool
    ) -> frozenset[int]:
        """Returns the layers with experts for which `choose` and `run_chosen` may be called, in a pass of one token.

        Args:
            slots: where experts lie, as in `Request`.
            levels: [layers * E], what experts run at.
            is_start: a pass begins. In the middle of one layers may leave, and none come.
        """

    def choose(self, layer: int, x: Array, router: RouterWeights, rule: RouteRule) -> None:
        """Chooses a layer's experts for x [1, D], as `route` does, where the host does not look.

        Args:
            layer: its place among those with experts.
        """

    def run_chosen(
        self,
        layer: int,
        x: Array,
        weights: ExpertLayer,
        parts: Array,
        out: Array,
        beside: Beside | None,
    ) -> bool:
        """out [1, D] = the gated sum of what the experts that were chosen last for a layer make of x [1, D].

        Args:
            parts: scratch [K or more, D].
            beside: what may be run with them.

        Returns:
            Whether it was: always the same.
        """

    counts_chosen: bool
    """Whether `run_chosen` counts uses where experts lie, as a request does; else who called it is to."""

    def chosen(self) -> Ids:
        """Returns the experts that `choose` chose last for each layer, [layers, K]: the host's; waits."""

    def slot_scores(
        self,
        x: Array,
        layers: tuple[Array, Array, Array],
        experts: Ids,
        gates: Array,
        scores: Array,
    ) -> None:
        """scores [T, K, B] = for each of a token's experts [T, K], its own linear layer on x [T, D] and its gate.

        layers: weight [E, B, D], gate_weight [E, B], bias [E, B]; gates [T, K]. `scores` is the host's.
        """

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
        """Writes what p later layers' routers choose for x [T, D] after their own norms: experts, gates [p, T, K].

        normed [p, T, D] and scores [p, T, E] are scratch; experts and gates are the host's.
        """

    def expect(
        self, slots: Any, first: int, experts: NDArray[np.int32], beside: Beside | None
    ) -> None:
        """Says that experts `first` + experts [K], as the file numbers them, will probably run next: a hint, no more.

        slots: where they lie, as in `Request`; beside: what may run with them.
        """

    def expert_ffn(
        self,
        x: Array,
        layer: ExpertLayer,
        request: Request,
        plan: Plan,
        group: Sequence[int],
        parts: Array,
    ) -> None:
        """Runs the experts at positions `group` of a plan that was requested; writes their rows of `parts` [m, D]."""

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
        """Runs what a router chose for x [1, D], as `run_experts` would if it were planned, where none has to come.

        Args:
            first: the layer's first expert, as the file numbers them.
            chosen: [1, K], with gates [1, K].
            levels: [layers * E], what experts run at.

        Returns:
            Whether it did; else it is to be planned.
        """

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
        """`expert_ffn` for each group of a request as it arrives, and `combine` to out [T, D].

        Computing one group hides the reads of the next. The request is over then, also where it fails.

        Args:
            groups: what the store gives of it, for who does not ask the slots themselves.
            parts: scratch [m, D].
            beside: an FFN on the same x with the same activation.

        Returns:
            Whether that was run too; else it is left to `ffn`.
        """

    def combine(self, parts: Array, plan: Plan, out: Array) -> None:
        """out [T, D]: each token's parts times their gates, added in the order of plan.rows."""

    def stand_in(
        self, x: Array, maps: tuple[Array, Array, Array], experts: Ids, plan: Plan, out: Array
    ) -> None:
        """Adds to out [T, D] what maps give of x [T, D] in place of the experts that a plan leaves out.

        Args:
            maps: of the layer, the host's; see `edgemoe.quant.StandIns`.
            experts: [T, K], what the plan's slots are of. A token's are added in their order in the file.
        """


def attend_in_steps(
    ops: Any, weights: Any, x: Any, matrices: AttentionMatrices, rows: tuple[Any, Any, Any], pos: int,
    cos: Any, sin: Any, table: Any, kv: Any, heads: Any, out: Any,
) -> None:  # fmt: skip
    """Is `Ops.attend` made of other verbs: the method of operations that gain nothing by one call."""
    ops.linear(x, matrices.qkv, rows)
    ops.attention(weights, *rows, pos, cos, sin, table, kv, heads)
    ops.linear(heads, (matrices.out,), (out,))


def attend_latents_in_steps(
    ops: Any, weights: Any, x: Any, matrices: LatentMatrices, eps: float, rows: Sequence[Any], pos: int,
    cos: Any, sin: Any, kv: Any, out: Any,
) -> None:  # fmt: skip
    """Is `Ops.attend_latents` made of other verbs; likewise."""
    q_a, q, absorbed, keys, latents, values = rows
    absorb_queries(ops, x, matrices, eps, (q_a, q, absorbed, keys))
    ops.latent_attention(weights, q, absorbed, keys, pos, cos, sin, kv, latents)
    ops.linear_heads(latents, matrices.v_b, matrices.heads, values)
    ops.linear(values, (matrices.out,), (out,))


def absorb_queries(
    ops: Any, x: Any, matrices: LatentMatrices, eps: float, rows: Sequence[Any]
) -> None:
    """Is what comes before latent attention: the first four rows of `Ops.attend_latents`."""
    q_a, q, absorbed, keys = rows
    if matrices.q_b is None:
        ops.linear(x, (matrices.kv_a, matrices.q_a), (keys, q))
    else:
        ops.linear(x, (matrices.kv_a, matrices.q_a), (keys, q_a))
        ops.norm(q_a, matrices.q_norm, eps, q_a)
        ops.linear(q_a, (matrices.q_b,), (q,))
    ops.linear_heads(q, matrices.k_b, matrices.heads, absorbed)


def run_experts_in_steps(
    ops: Any, x: Any, layer: ExpertLayer, request: Request, groups: Iterator[list[int]], plan: Plan,
    parts: Any, out: Any, beside: Beside | None,
) -> bool:  # fmt: skip
    """Is `Ops.run_experts` made of other verbs; likewise."""
    for group in groups:
        ops.expert_ffn(x, layer, request, plan, group, parts)
    ops.combine(parts, plan, out)
    return False

"""The verbs of the forward pass on a CPU: numpy arrays in, native kernels underneath.

One object per device; the model never looks inside an array. All arrays are contiguous float32 unless said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import ModelConfig
from edgemoe.plan import Plan

__all__ = ["CpuOps", "OpsShape"]

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpsShape:
    """Says how large an engine's operations get."""

    threads: int
    max_tokens: int
    """Of a chunk."""
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
        """Returns what a model needs for one token of one position; chunks and contexts are made of it."""
        return cls(
            threads=threads, max_tokens=1,
            max_cols=max(config.hidden_size, config.num_heads * config.head_dim),
            max_hidden=max([config.expert_hidden, *config.shared_hidden]), max_context=1,
            head_dim=config.head_dim, num_heads=config.num_heads,
        )  # fmt: skip

    @property
    def scratch_bytes(self) -> int:
        """Memory that the operations' own scratch takes once all of it was used."""
        return _core.Workspace.bytes(*astuple(self))


class CpuOps:
    """Runs operations on some threads with scratch of its own. One caller at a time."""

    def __init__(self, shape: OpsShape) -> None:
        self._ws = _core.Workspace(*astuple(shape))

    def embed(self, table: _core.Nested, ids: NDArray[np.int32], scale: float, out: Array) -> None:
        """out [T, D] = scale * table[ids]."""
        table.decode_rows(ids, out, scale)

    def norm(self, x: Array, weight: Array, eps: float, out: Array) -> None:
        """out [T, D] = RMS norm of x."""
        _core.rms_norm(self._ws, x, weight, eps, out)

    def linear(self, x: Array, weights: Sequence[_core.Nested], outs: Sequence[Array]) -> None:
        """outs[i] [T, rows] = x [T, cols] times weights[i] transposed."""
        _core.linear(self._ws, x, weights, outs)

    def rope(self, inv_freq: Array, pos: int, scale: float, cos: Array, sin: Array) -> None:
        """cos and sin [T, head_dim / 2] for the positions from `pos`."""
        _core.rope_table(inv_freq, pos, scale, cos, sin)

    def attention(
        self,
        layer: _core.AttentionLayer,
        q: Array,
        k: Array,
        v: Array,
        pos: int,
        cos: Array,
        sin: Array,
        kv: _core.KvLayer,
        out: Array,
    ) -> None:
        """Biases, norms and rotates q, k, v in place, stores k and v at `pos` in kv and attends causally.

        q and out [T, heads * head_dim], k and v [T, kv_heads * head_dim].
        """
        _core.attention(self._ws, layer, q, k, v, pos, cos, sin, kv, out)

    def route(
        self,
        x: Array,
        router: Array,
        *,
        over_top_k: bool,
        renormalise: bool,
        scores: Array,
        experts: NDArray[np.int32],
        gates: Array,
    ) -> None:
        """Writes each token's experts and gates [T, K], best first, and the probabilities of all, scores [T, E]."""
        _core.route(self._ws, x, router, over_top_k, renormalise, scores, experts, gates)

    def slot_scores(
        self,
        x: Array,
        layers: tuple[Array, Array, Array],
        experts: NDArray[np.int32],
        gates: Array,
        scores: Array,
    ) -> None:
        """scores [T, K, B] = for each of a token's experts [T, K], its own linear layer on x [T, D] and its gate.

        layers: weight [E, B, D], gate_weight [E, B], bias [E, B]; gates [T, K].
        """
        _core.slot_scores(self._ws, x, *layers, experts, gates, scores)

    def look_ahead(
        self,
        x: Array,
        norms: Sequence[Array],
        routers: Sequence[Array],
        eps: float,
        *,
        over_top_k: bool,
        renormalise: bool,
        normed: Array,
        scores: Array,
        experts: NDArray[np.int32],
        gates: Array,
    ) -> None:
        """Writes what p later layers' routers [E, D] choose for x [1, D] after their own norms: experts, gates [p, K].

        normed [p, D] and scores [p, E] are scratch.
        """
        _core.look_ahead(
            self._ws,
            x,
            norms,
            routers,
            eps,
            over_top_k,
            renormalise,
            normed,
            scores,
            experts,
            gates,
        )

    def ffn(
        self,
        x: Array,
        gate: _core.Nested,
        up: _core.Nested,
        down: _core.Nested,
        out: Array,
        *,
        hidden: Array | None = None,
    ) -> None:
        """out [T, D] = down(silu(gate x) * (up x)); hidden [T, H], if given, gets what down is applied to."""
        _core.ffn(self._ws, x, gate, up, down, out, hidden)

    def expert_ffn(
        self,
        x: Array,
        cache: _core.Cache,
        experts: NDArray[np.int32],
        levels: NDArray[np.int8],
        plan: Plan,
        group: Sequence[int],
        parts: Array,
        *,
        hidden: Array | None = None,
    ) -> None:
        """Runs the experts at positions `group` of a plan; their rows of `parts` [m, D] are written.

        So are their rows of `hidden` [m, H], if given: what each w_down is applied to.
        """
        _core.expert_ffn(
            self._ws, x, cache, experts, levels, plan.offsets, plan.tokens, group, parts, hidden
        )

    def combine(self, parts: Array, plan: Plan, out: Array) -> None:
        """out [T, D]: each token's parts times their gates, added in the order of plan.rows."""
        _core.combine(self._ws, parts, plan.rows, plan.gates, out)

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
        _core.add_rows(self._ws, x, scale, gate_weight, gate_input, out)

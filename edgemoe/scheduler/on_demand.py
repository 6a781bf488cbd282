"""The exact baseline: what the router asked for, at the bits asked for, loaded now."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Plan, Routing
from edgemoe.scheduler.base import Scheduler, Setting

__all__ = ["OnDemand"]


class OnDemand(Scheduler):
    """Plans every routed expert at one precision.

    A single token's experts are read best first; a prompt's in the order of the file.
    """

    def __init__(self, setting: Setting, *, look_ahead: int = 0, prompt_ahead: int = 0) -> None:
        num_experts = setting.num_experts
        self.look_ahead = look_ahead
        self._prompt_ahead = prompt_ahead
        self._num_layers = setting.num_layers
        self._all_bits = np.full(setting.num_layers * num_experts, setting.bits, np.int8)
        self._first = np.arange(0, setting.num_layers * num_experts, num_experts, dtype=np.int32)[:, None]
        self._num_experts = num_experts
        self._bits = np.full(num_experts, setting.bits, np.int8)
        self._range = np.arange(num_experts + 1, dtype=np.int32)
        self._zeros = np.zeros(num_experts, np.int32)

    def plan(self, routing: Routing, residency: NDArray[np.int8]) -> Plan:
        """See `Scheduler.plan`; the plan does not depend on the residency."""
        T, K = routing.experts.shape
        if T == 1:
            ahead = ahead_bits = None
            if routing.ahead_experts is not None:
                p, layer = len(routing.ahead_experts), routing.layer
                ahead = (routing.ahead_experts + self._first[layer + 1 : layer + 1 + p]).reshape(-1)
                ahead_bits = self._all_bits[: len(ahead)]
            return Plan(
                routing.layer, routing.experts[0], self._bits[:K], self._range[: K + 1],
                self._zeros[:K], self._range[:K].reshape(1, K), routing.gates, ahead, ahead_bits,
            )  # fmt: skip
        ahead = ahead_bits = None
        if self._prompt_ahead and routing.layer + 1 < self._num_layers:
            absent = np.flatnonzero(residency[routing.layer + 1] == 0)[: self._prompt_ahead]
            ahead = absent.astype(np.int32) + self._first[routing.layer + 1]
            ahead_bits = self._all_bits[: len(ahead)]
        flat = routing.experts.reshape(-1)
        order = np.argsort(flat, kind="stable").astype(np.int32)
        counts = np.bincount(flat, minlength=self._num_experts)
        used = np.flatnonzero(counts).astype(np.int32)
        offsets = np.zeros(len(used) + 1, np.int32)
        np.cumsum(counts[used], out=offsets[1:])
        rows = np.empty(T * K, np.int32)
        rows[order] = np.arange(T * K, dtype=np.int32)
        return Plan(
            routing.layer, used, self._bits[: len(used)], offsets,
            order // K, rows.reshape(T, K), routing.gates, ahead, ahead_bits,
        )  # fmt: skip

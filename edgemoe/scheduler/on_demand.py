"""The exact baseline: what the router asked for, at the bits asked for, loaded now; and what comes next, early."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Plan, Routing
from edgemoe.scheduler.base import Scheduler, Setting
from edgemoe.scheduler.look_ahead import LookAhead

__all__ = ["OnDemand"]

_PROMPT_AHEAD = 4


class OnDemand(Scheduler):
    """Plans every routed expert at one precision.

    A single token's experts are read best first, and those that the next layer will probably want ahead of it; a
    prompt's in the order of the file, into the next layer.
    """

    def __init__(self, setting: Setting, *, look_ahead: bool = True) -> None:
        """Args:
        look_ahead: read ahead for the next layer; without effect when everything fits.
        """
        L, E = setting.num_layers, setting.num_experts
        self._num_experts = E
        self._last = L - 1
        self._bits = np.full(E, setting.bits, np.int8)
        self._range = np.arange(E + 1, dtype=np.int32)
        self._zeros = np.zeros(E, np.int32)
        self._ahead = LookAhead(setting) if look_ahead and not setting.fits else None
        self.look_ahead = int(self._ahead is not None)

    def plan(self, routing: Routing, residency: NDArray[np.int8]) -> Plan:
        """See `Scheduler.plan`; only what is read ahead depends on the residency."""
        T, K = routing.experts.shape
        ahead = self._ahead
        if T == 1:
            return Plan(
                routing.layer, routing.experts[0], self._bits[:K], self._range[: K + 1],
                self._zeros[:K], self._range[:K].reshape(1, K), routing.gates,
                *(ahead.wishes(routing, residency) if ahead is not None else ()),
            )  # fmt: skip
        flat = routing.experts.reshape(-1)
        order = np.argsort(flat, kind="stable").astype(np.int32)
        counts = np.bincount(flat, minlength=self._num_experts)
        used = np.flatnonzero(counts).astype(np.int32)
        offsets = np.zeros(len(used) + 1, np.int32)
        np.cumsum(counts[used], out=offsets[1:])
        rows = np.empty(T * K, np.int32)
        rows[order] = np.arange(T * K, dtype=np.int32)
        soon = None
        if ahead is not None and len(used) == self._num_experts and routing.layer < self._last:
            # A prompt that wants everything here will want nearly everything there.
            soon = np.flatnonzero(residency[routing.layer + 1] == 0)[:_PROMPT_AHEAD].astype(
                np.int32
            )
            soon += (routing.layer + 1) * self._num_experts
        return Plan(
            routing.layer, used, self._bits[: len(used)], offsets,
            order // K, rows.reshape(T, K), routing.gates,
            soon, None if soon is None else self._bits[: len(soon)],
        )  # fmt: skip

    def passed(self, tokens: int, seconds: float) -> None:
        """See `Scheduler.passed`."""
        if self._ahead is not None:
            self._ahead.passed(tokens, seconds)
            self.look_ahead = int(self._ahead.is_on)

    def report(self) -> str:
        """See `Scheduler.report`."""
        return self._ahead.report() if self._ahead is not None else ""

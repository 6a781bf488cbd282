"""The exact baseline: experts that the router chose, at the bits asked for, read on demand or a layer ahead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Plan, Routing
from edgemoe.scheduler.base import Scheduler, Setting
from edgemoe.scheduler.look_ahead import LookAhead
from edgemoe.scheduler.options import option, read_options
from edgemoe.scheduler.plans import plan_token, prompt_ahead

__all__ = ["OnDemand"]


@dataclass(frozen=True, slots=True)
class OnDemandOptions:
    """The options of on-demand."""

    look_ahead: bool = option(
        True,
        "read ahead for the next layer, as long as it pays; without effect when everything fits",
    )


class OnDemand(Scheduler):
    """Plans every routed expert at one precision, or each at its own, fixed offline. Exact.

    A single token's experts are read best first; then come the experts that the next layer will probably want. A
    prompt's experts are read in the order of the file. If a prompt uses every expert of a layer, the first missing
    experts of the next layer are read ahead too.
    """

    Options = OnDemandOptions
    is_routed = True

    def __init__(
        self, setting: Setting, *, bits: NDArray[np.int8] | None = None, **options: Any
    ) -> None:
        """Args:
        bits: [num_layers, num_experts], the bits of each expert, all among the file's levels; None for the setting's
            bits everywhere.
        """
        o = read_options(OnDemandOptions, options)
        L, E = shape = setting.num_layers, setting.num_experts
        if bits is None:
            bits = np.full(shape, setting.bits, np.int8)
        elif bits.shape != shape or not np.isin(bits, setting.level_bits).all():
            raise ValueError(f"bits: expected {list(shape)} of {setting.level_bits}")
        else:
            self.notes = (
                f"lossy: experts at {bits.mean():.2f} bits on average, {bits.min()} to {bits.max()}",
            )
        self._num_experts = E
        self._last = L - 1
        self._bits = self.fixed_bits = bits
        self._all_bits = bits.reshape(-1)
        self._ahead = LookAhead(setting, bits) if o.look_ahead and not setting.fits else None
        self.reads_ahead = self._ahead is not None
        self.look_ahead = int(self.reads_ahead)

    def plan(self, routing: Routing, residency: NDArray[np.int8]) -> Plan:
        """See `Scheduler.plan`. Only the experts to read ahead depend on the residency."""
        T, K = routing.experts.shape
        ahead = self._ahead
        if T == 1:
            bits = self._bits[routing.layer].take(routing.experts[0])
            wishes = ahead.wishes(routing, residency) if ahead is not None else ()
            return plan_token(routing, bits, None, *wishes)
        flat = routing.experts.reshape(-1)
        order = np.argsort(flat, kind="stable").astype(np.int32)
        counts = np.bincount(flat, minlength=self._num_experts)
        used = np.flatnonzero(counts).astype(np.int32)
        offsets = np.zeros(len(used) + 1, np.int32)
        np.cumsum(counts[used], out=offsets[1:])
        rows = np.empty(T * K, np.int32)
        rows[order] = np.arange(T * K, dtype=np.int32)
        soon = soon_bits = None
        if ahead is not None and routing.is_decoding:
            soon, soon_bits = ahead.wishes(routing, residency)
        elif ahead is not None and len(used) == self._num_experts and routing.layer < self._last:
            soon = prompt_ahead(routing.layer + 1, residency)
            soon_bits = self._all_bits[soon]
        return Plan(
            routing.layer, used, self._bits[routing.layer][used], offsets,
            order // K, rows.reshape(T, K), routing.gates,
            soon, soon_bits,
        )  # fmt: skip

    def passed(self, tokens: int, seconds: float, sequences: int = 1) -> None:
        """See `Scheduler.passed`."""
        if self._ahead is not None:
            self._ahead.passed(tokens, seconds, sequences)
            self.look_ahead = int(self._ahead.is_on)

    def state(self) -> Mapping[str, NDArray[Any]]:
        """See `Scheduler.state`."""
        return self._ahead.state() if self._ahead is not None else {}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Scheduler.restore`."""
        if self._ahead is not None:
            self._ahead.restore(state)

    def report(self) -> str:
        """See `Scheduler.report`."""
        return self._ahead.report() if self._ahead is not None else ""

"""EdgeMoE: fixed bits per expert, and look-ahead by guessing the next layer's experts from the path so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.plan import Plan, Routing
from edgemoe.scheduler.allocation import allocated_bits
from edgemoe.scheduler.base import Scheduler, Setting
from edgemoe.scheduler.options import check, option, read_options
from edgemoe.scheduler.plans import plan_slots, plan_token
from edgemoe.scheduler.transitions import Transitions

__all__ = ["Expertwise"]


@dataclass(frozen=True, slots=True)
class ExpertwiseOptions:
    """The options of expertwise."""

    preload: int = option(
        3,
        "experts of the next layer to read, likeliest first, until its router answers; 0 for none",
    )
    layers: int = option(2, "guess from the experts of so many layers before, 1 or 2")
    allocation: bool = option(
        True,
        "run every expert at the bits that the file's section `allocation` gives it, if it has one",
    )

    def __post_init__(self) -> None:
        check("preload", self.preload, 0, 1 << 16)
        check("layers", self.layers, 1, 2)


class Expertwise(Scheduler):
    """Runs each expert at bits fixed beforehand and reads the next layer's likely experts ahead.

    While a layer computes, the experts of the next layer that most often followed those of the last two layers are
    read, likeliest first. Once the next layer's router has chosen, reads of wrong guesses are cancelled. Which
    experts follow which is learned while running, on top of the counts of `edgemoe profile train --table`, if the file
    has them. Without an allocation in the file it is exact, at the bits of `--bits`. Reading ahead is for single
    tokens: a prompt needs all experts anyway.
    """

    Options = ExpertwiseOptions
    paper = "EdgeMoE, arXiv 2308.14352 (IEEE TMC 2025), section III"
    drops = "frequency-distance"

    def __init__(self, setting: Setting, **options: Any) -> None:
        o = read_options(ExpertwiseOptions, options)
        L, E = setting.num_layers, setting.num_experts
        bits = allocated_bits(setting) if o.allocation else None
        if bits is None:
            bits = np.full((L, E), setting.bits, np.int8)
        elif (bits < setting.bits).any():
            self.notes = (f"lossy: experts at {bits.mean():.2f} bits on average, by allocation",)
        self._bits = self.fixed_bits = bits
        self._levels = (np.searchsorted(setting.level_bits, bits) + 1).astype(np.int8)
        self._preload = o.preload
        self.reads_ahead = o.preload > 0
        self._num_layers, self._num_experts = L, E
        self._transitions = (
            Transitions(L, E, setting.experts_per_token, depth=o.layers) if o.preload else None
        )
        if self._transitions is not None and "transitions" in setting.sections:
            self._transitions.take(setting.sections["transitions"])

    def plan(self, routing: Routing, residency: NDArray[np.int8]) -> Plan:
        """See `Scheduler.plan`."""
        layer, transitions = routing.layer, self._transitions
        if transitions is not None:
            transitions.update(routing)
        if len(routing.experts) > 1:
            return plan_slots(routing, self._bits[layer][routing.experts])
        bits = self._bits[layer].take(routing.experts[0])
        if transitions is None or layer + 1 == self._num_layers:
            return plan_token(routing, bits)
        # Only experts that are missing from memory and have followed this path before.
        most = min(self._preload, len(bits))
        scores, has = transitions.predict(layer + 1), residency[layer + 1]
        ahead = _core.likeliest(scores, has, self._levels[layer + 1], most)
        if len(ahead) == 0:
            return plan_token(routing, bits)
        ahead_bits = self._bits[layer + 1].take(ahead)
        ahead += np.int32((layer + 1) * self._num_experts)
        return plan_token(routing, bits, None, ahead, ahead_bits)

    def passed(self, tokens: int, seconds: float, sequences: int = 1) -> None:
        """See `Scheduler.passed`: learns the path."""
        if self._transitions is not None:
            self._transitions.learn()

    def state(self) -> Mapping[str, NDArray[Any]]:
        """See `Scheduler.state`."""
        return self._transitions.state() if self._transitions is not None else {}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Scheduler.restore`."""
        if self._transitions is not None:
            self._transitions.restore(state)

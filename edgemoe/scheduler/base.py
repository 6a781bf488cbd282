"""The contract between a scheduler and the runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgemoe.plan import Plan, Priorities, Routing
from edgemoe.quant import BitRouters, StandIns

__all__ = ["SECTIONS", "NoOptions", "Scheduler", "Setting"]

SECTIONS = ("allocation", "bit-routers", "paths", "stand-ins", "transitions")
"""The sections of a `.moe` file that schedulers read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a scheduler decides about: the model, its levels of precision and the memory for experts."""

    num_layers: int
    """Layers with routed experts."""
    num_experts: int
    """Per layer. With adapters, these are places for experts, some of which may be empty; see `num_there`."""
    experts_per_token: int
    bits: int
    """The precision that the user asked for, the highest that may be planned."""
    level_bits: tuple[int, ...]
    """Bits of the file's levels up to `bits`, ascending: level i + 1 has level_bits[i]."""
    level_bytes: tuple[int, ...]
    """Bytes of one expert at each of these levels, in memory and to read; the mean where experts have other levels.

    An expert that lacks a level is planned like all others. It runs at the highest level that it has, and once that is
    in memory it counts as resident at the highest level of all.
    """
    slots_bytes: int
    """Memory for experts, in bytes."""
    layers: tuple[int, ...] = ()
    """The numbers that these layers have in the model, by which users name experts; empty for 0, 1, …."""
    sections: Mapping[str, bytes] = field(default_factory=dict)
    """The contents of those of `SECTIONS` that the file has, by name."""

    num_there: int = 0
    """Experts in all layers together; 0 where no place is empty."""
    has_inputs: bool = True
    """Whether routings carry `Routing.bit_logits`, which need a layer's input. A trace's routings do not."""

    @property
    def fits(self) -> bool:
        """Whether every expert fits in memory at `bits`, so that nothing will ever be evicted."""
        count = self.num_there or self.num_layers * self.num_experts
        return self.slots_bytes >= count * self.level_bytes[-1]


@dataclass(frozen=True, slots=True)
class NoOptions:
    """The options of a scheduler that has none."""


class Scheduler(ABC):
    """The base class of schedulers, which decide what runs and what is read but carry out neither.

    A scheduler holds no weights, so a recorded trace can be replayed through it without a model. It is made as
    `cls(setting, **options)`; a ValueError names the option that is wrong.
    """

    Options: ClassVar[type] = NoOptions
    """A frozen dataclass whose fields are made by `option`."""
    paper: ClassVar[str] = ""
    """The paper that it implements."""
    drops: ClassVar[str] = "lfu"
    """The default eviction, a name in `edgemoe.scheduler.evict`; "own" if the scheduler sets the policy itself."""

    look_ahead: int = 0
    """How many of the next layers' routers are applied to a layer's input; may change between tokens."""
    reads_ahead: bool = False
    """Whether plans may have something in `Plan.ahead`, now or later."""
    policy: str | Priorities = "lfu"
    """What the cache evicts first: by its own counts ("lfu" or "lru"), or by priorities, always the same object."""
    keep_level: int = 0
    """The level to which the cache lowers experts before it evicts any; 0: it evicts at once."""
    bit_routers: BitRouters | None = None
    """Routers of precisions whose logits it needs with every routing, in `Routing.bit_logits`; None for none."""
    is_routed: bool = False
    """Whether every plan is exactly the router's choice at `fixed_bits`.

    Then no plan needs to be asked for in a layer whose experts are all in memory.
    """
    leaves_out: bool = False
    """Whether plans may leave experts out."""
    stand_ins: StandIns | None = None
    """What runs in place of experts that are left out; None for nothing.

    With stand-ins, slot k of a token in a plan belongs to slot k of the token in the routing.
    """
    notes: tuple[str, ...] = ()
    """What makes the answer differ from the router's own at `bits`, one line each; empty when exact."""

    fixed_bits: NDArray[np.int8] | None = None
    """[num_layers, num_experts]: the bits of each expert, if they were fixed offline; None for the setting's bits."""

    substituted: int = 0
    """How many experts have been chosen in place of the router's choice so far."""

    @abstractmethod
    def plan(self, routing: Routing, residency: NDArray[np.int8]) -> Plan:
        """Plans one layer.

        Args:
            routing: what the router chose.
            residency: [num_layers, num_experts], the level of each expert now in memory, 0 = absent; a live,
                read-only view.
        """

    def begin(self) -> None:  # noqa: B027 (most have nothing to do)
        """Called when a new sequence starts; other sequences may be under way."""

    def tokens(self, ids: NDArray[np.int32], sequences: int = 1) -> None:  # noqa: B027
        """Called before all layers run for the next tokens.

        Args:
            ids: [T], the tokens of one sequence after another.
            sequences: how many sequences the tokens belong to. A sequence may have gone back some tokens before.
        """

    def passed(self, tokens: int, seconds: float, sequences: int = 1) -> None:  # noqa: B027
        """Called after all layers have run for `tokens` tokens, which took `seconds`.

        While decoding, `tokens` equals `sequences`.
        """

    def state(self) -> Mapping[str, NDArray[Any]]:
        """Returns what it has learned that helps a later run, under the names in `edgemoe.runtime.profile`."""
        return {}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:  # noqa: B027
        """Takes what `state` returned in an earlier run. Called before anything is planned.

        Args:
            state: arrays by name, with the shapes in `edgemoe.runtime.profile`. Arrays of this scheduler may be
                missing, and arrays of others may be present.
        """

    def report(self) -> str:
        """Returns a few words for the statistics line on what it did so far; "" for nothing to say."""
        return ""

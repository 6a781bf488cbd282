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
"""Those of a file by which schedulers decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Says what a scheduler decides about: the model, its levels and the room for experts."""

    num_layers: int
    """Layers with routed experts."""
    num_experts: int
    """Per layer; with adapters places for experts, which may be without, see `num_there`."""
    experts_per_token: int
    bits: int
    """The precision that the user asked for, the highest that may be planned."""
    level_bits: tuple[int, ...]
    """Bits of the file's levels up to `bits`, ascending: level i + 1 has level_bits[i]."""
    level_bytes: tuple[int, ...]
    """Memory and reading of one expert at these levels; the mean where experts differ in what they have.

    An expert that lacks a level is planned like all others: it gives what it has, and is resident at the highest level
    once that is there.
    """
    slots_bytes: int
    """Memory for experts."""
    layers: tuple[int, ...] = ()
    """The model's layers that these are, by which users name experts; empty for 0, 1, …."""
    sections: Mapping[str, bytes] = field(default_factory=dict)
    """Of the file, those of `SECTIONS` that it has."""

    num_there: int = 0
    """Experts in all; 0 where every place of a layer has one."""
    has_inputs: bool = True
    """Whether routings come with what needs a layer's input, `Routing.bit_logits`; a trace's do not."""

    @property
    def fits(self) -> bool:
        """Says whether every expert fits at `bits`, so that nothing will ever be dropped."""
        count = self.num_there or self.num_layers * self.num_experts
        return self.slots_bytes >= count * self.level_bytes[-1]


@dataclass(frozen=True, slots=True)
class NoOptions:
    """Is for a scheduler without options."""


class Scheduler(ABC):
    """Decides; does nothing. Holds no weights, so that a recorded trace replays it without a model.

    Made as `cls(setting, **options)`; a ValueError names the option that is wrong.
    """

    Options: ClassVar[type] = NoOptions
    """A frozen dataclass whose fields are made by `option`."""
    paper: ClassVar[str] = ""
    """Where it comes from."""
    drops: ClassVar[str] = "lfu"
    """Which of the evictions it is made for, see `edgemoe.scheduler.evict`; "own" when it decides that itself."""

    look_ahead: int = 0
    """How many of the next layers' routers are applied to a layer's input; may change between tokens."""
    policy: str | Priorities = "lfu"
    """What the cache drops first: by a count of its own, "lfu" or "lru", or by priorities, always the same object."""
    keep_level: int = 0
    """What the cache lowers experts to before it evicts any; 0: it evicts at once."""
    bit_routers: BitRouters | None = None
    """Routers of precisions whose logits it wants to be told with every routing."""
    is_routed: bool = False
    """Whether plans are what routers choose, at `fixed_bits`, so that they need not be asked for where experts are."""
    leaves_out: bool = False
    """Whether plans may leave experts out."""
    stand_ins: StandIns | None = None
    """What takes the place of those; None for nothing. Slots of its plans are then those of the routings."""
    notes: tuple[str, ...] = ()
    """What makes the answer differ from the router's own at `bits`, one line each; empty when exact."""

    fixed_bits: NDArray[np.int8] | None = None
    """[num_layers, num_experts]: what experts run at where that was decided offline; None for the setting's bits."""

    substituted: int = 0
    """Experts that were chosen in place of the router's so far."""

    @abstractmethod
    def plan(self, routing: Routing, residency: NDArray[np.int8]) -> Plan:
        """Plans one layer.

        Args:
            routing: what the router chose.
            residency: [num_layers, num_experts], levels now in memory, 0 = absent; a live view, read only.
        """

    def begin(self) -> None:  # noqa: B027 (most have nothing to do)
        """A new sequence starts; others may be in the middle."""

    def tokens(self, ids: NDArray[np.int32], sequences: int = 1) -> None:  # noqa: B027
        """All layers will now run for the next tokens [T] of so many sequences, one after the other.

        A sequence may have gone back some tokens before.
        """

    def passed(self, tokens: int, seconds: float, sequences: int = 1) -> None:  # noqa: B027
        """All layers have run for `tokens` tokens, which took `seconds`; of as many sequences while decoding."""

    def state(self) -> Mapping[str, NDArray[Any]]:
        """Returns what it learned and is of use in another run, under the names of `edgemoe.runtime.profile`."""
        return {}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:  # noqa: B027
        """Takes what `state` of an earlier run returned, before anything is planned.

        Args:
            state: by name; it may lack its own and have others. Shapes are those of `edgemoe.runtime.profile`.
        """

    def report(self) -> str:
        """Returns what it did so far in a few words for the statistics line; "" for nothing to say."""
        return ""

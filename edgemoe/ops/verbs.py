"""All verbs, as one protocol."""

from __future__ import annotations

from typing import Protocol

from edgemoe.ops.attention import AttentionVerbs
from edgemoe.ops.experts import ExpertVerbs
from edgemoe.ops.memory import MemoryVerbs
from edgemoe.ops.recurrent import RecurrentVerbs
from edgemoe.ops.repeats import RepeatVerbs
from edgemoe.ops.rows import RowVerbs
from edgemoe.specs import MixerSpec

__all__ = ["Ops"]


class Ops(
    MemoryVerbs, RowVerbs, AttentionVerbs, RecurrentVerbs, ExpertVerbs, RepeatVerbs, Protocol
):
    """Is one device."""

    def beside(self, spec: MixerSpec, keys: str, values: str) -> Ops | None:
        """Returns what runs a mixer that these operations know too little of, on the host; None where they run it.

        keys and values: the kinds that its cache stores them as.
        """

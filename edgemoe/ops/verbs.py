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
    """All verbs of one device: a CPU (`CpuOps`) or an accelerator (`CudaOps`)."""

    def beside(self, spec: MixerSpec, keys: str, values: str) -> Ops | None:
        """Returns operations of the host for a mixer that this device has no kernels for; None if it runs the mixer.

        Args:
            keys: the type in which the cache stores keys.
            values: the same for values.
        """

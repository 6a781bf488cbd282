"""The division of a device's memory: what must be there, what the context takes, and what is left for experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgemoe import _core
from edgemoe.errors import OutOfBudget
from edgemoe.file.format import MoeFile
from edgemoe.model import KvTypes, layer_state_bytes, scratch_bytes
from edgemoe.ops import OpsShape
from edgemoe.ops.cuda import CudaOps
from edgemoe.ops.cuda.placement import host_bytes, places
from edgemoe.runtime.context import CHUNKS, DEFAULT_CONTEXT, SMALLEST_CONTEXT, longest_context

__all__ = ["Vram", "default_vram"]

_ROUNDING_BYTES = 1 << 16  # for small arrays of scratch, which take whole allocation units
_STATE_ROUNDING = 1 << 13  # likewise for a layer's state, which may consist of several arrays


def default_vram(device_free: int) -> int:
    """Returns the bytes that an engine may take of a device when the user sets no limit: what is free, less a margin.

    The margin is 8% of what is free, and at least 256 MiB or, on a small device, a quarter of it.
    """
    return device_free - max(device_free * 8 // 100, min(256 << 20, device_free // 4))


@dataclass(frozen=True, slots=True)
class Vram:
    """A division of `total` bytes of a device's memory. All numbers are bytes, except `context` and `chunk`."""

    total: int
    dense: int
    """Weights outside the routed experts."""
    kv: int
    """The states of all sequences with a full context."""
    scratch: int
    """Activations of a pass over `chunk` tokens."""
    context: int
    """Positions of each sequence."""
    chunk: int
    """Tokens of a prompt that are computed in one pass."""
    hosted: Mapping[int, str]
    """The layers whose mixers the host runs, and why."""
    held: int
    """Weights outside the routed experts that are in the host's memory, in bytes."""
    is_shared: bool
    """Whether the memory is also the host's. Then the host's budget decides what experts get."""

    @classmethod
    def divide(
        cls,
        moe: MoeFile,
        *,
        vram: int,
        dense_level: int,
        context: int | None,
        kv_types: KvTypes,
        ops: OpsShape,
        sequences: int,
        hosted: Mapping[int, str],
        is_shared: bool = False,
    ) -> Vram:
        """Returns a division of `vram` bytes with the context and the chunk that fit.

        Args:
            vram: bytes of the device's memory.
            hosted: the layers whose mixers the host runs, and why.
            is_shared: the device has no memory of its own.

        The others are as in `Budget.divide`.

        Raises:
            OutOfBudget: nothing fits; says the smallest size that works, and what takes the room.
        """
        config = moe.config
        names = [name for name, place in places(moe, dense_level, hosted) if place != "host"]
        dense = sum(_core.Device.taken(moe.tensors[n].size(dense_level)) for n in names)
        if moe.bases is not None:
            dense += len(moe.bases) * _core.Device.taken(moe.bases[0].nbytes)
        corrected = bool(moe.scheme.correction)

        def kv_bytes(context: int, chunk: int) -> int:
            layers = layer_state_bytes(config, context, kv_types, chunk)
            return sum(
                _core.Device.taken(n) + _STATE_ROUNDING
                for i, n in enumerate(layers) if i not in hosted
            )  # fmt: skip

        held = host_bytes(moe, dense_level, hosted)

        def sized(context: int, chunk: int) -> Vram:
            shape = replace(ops, max_tokens=chunk, max_context=context)
            kv = kv_bytes(context, chunk)
            scratch = scratch_bytes(config, chunk, sequences) + _ROUNDING_BYTES
            scratch += CudaOps.scratch_bytes(shape, config, corrected=corrected)
            return cls(
                vram, dense, sequences * kv, scratch, context, chunk, hosted, held, is_shared
            )

        least = sized(context or min(SMALLEST_CONTEXT, config.context_length), CHUNKS[-1])
        if least.room < 0 and is_shared:
            return least  # the host's budget will say how much is missing
        if least.room < 0:
            raise OutOfBudget(
                f"{_mib(vram)} of the device are too little; the smallest that works is "
                f"{_mib(vram - least.room)}: {least.parts()}; --device cpu needs none"
            )
        if context is None:  # the context may take a quarter of what is left
            most = min(DEFAULT_CONTEXT, config.context_length)
            each = (least.kv + least.room // 4) // sequences
            context = longest_context(least.context, most, each, lambda n: kv_bytes(n, CHUNKS[0]))
        fits = (sized(context, chunk) for chunk in CHUNKS)
        limit = least.scratch + (vram - least.dense - least.kv - least.scratch) // 4
        return next(
            (v for v in fits if v.room >= 0 and v.scratch <= limit), sized(context, CHUNKS[-1])
        )

    @property
    def taken(self) -> int:
        """What everything but the experts takes."""
        return self.dense + self.kv + self.scratch

    @property
    def room(self) -> int:
        """What is left for experts; negative when `total` is too small."""
        return self.total - self.taken

    def parts(self) -> str:
        """Returns text for an error: what takes room that experts cannot have, and how much of it."""
        return (
            f"{_mib(self.dense)} for dense weights, {_mib(self.kv)} for {self.context} tokens of context, "
            f"{_mib(self.scratch)} for scratch"
        )


def _mib(n: int) -> str:
    return f"{-(-n >> 20)} MiB"

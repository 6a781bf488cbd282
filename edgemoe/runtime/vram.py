"""Divides a device's memory: what must lie there, what the context takes, and what is left for experts."""

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

_ROUNDING_BYTES = 1 << 16  # arrays of a few bytes take whole units
_STATE_ROUNDING = 1 << 13  # likewise of a layer's state, which may be of several arrays


def default_vram(device_free: int) -> int:
    """Returns what an engine may take of a device when the user set nothing: what is free, less a margin."""
    return device_free - max(device_free * 8 // 100, min(256 << 20, device_free // 4))


@dataclass(frozen=True, slots=True)
class Vram:
    """Is a division of `total` bytes of a device; all fields in bytes but the two counts."""

    total: int
    dense: int
    kv: int
    scratch: int
    context: int
    """Positions."""
    chunk: int
    """Tokens of a prompt that are computed at once."""
    hosted: Mapping[int, str]
    """The layers whose mixers the host runs, and why."""
    held: int
    """What of the weights outside the experts is the host's."""
    is_shared: bool
    """The memory is the host's: what experts get is a matter of the host's budget."""

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
        """Fits context and chunk into `vram`; arguments as those of `Budget.divide`.

        Args:
            hosted: the layers whose mixers the host runs.
            is_shared: the device has no memory of its own.

        Raises:
            OutOfBudget: says the smallest that works, and what takes the room.
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
            return least  # the host's budget says how much is missing of it
        if least.room < 0:
            raise OutOfBudget(
                f"{_mib(vram)} of the device are too little; the smallest that works is "
                f"{_mib(vram - least.room)}: {least.parts()}; --device cpu needs none"
            )
        if context is None:  # it may take a quarter of what is left
            most = min(DEFAULT_CONTEXT, config.context_length)
            held = (least.kv + least.room // 4) // sequences
            context = longest_context(least.context, most, held, lambda n: kv_bytes(n, CHUNKS[0]))
        fits = (sized(context, chunk) for chunk in CHUNKS)
        limit = least.scratch + (vram - least.dense - least.kv - least.scratch) // 4
        return next(
            (v for v in fits if v.room >= 0 and v.scratch <= limit), sized(context, CHUNKS[-1])
        )

    @property
    def taken(self) -> int:
        """Everything but experts."""
        return self.dense + self.kv + self.scratch

    @property
    def room(self) -> int:
        """What is left for experts; negative when `total` is too small."""
        return self.total - self.taken

    def parts(self) -> str:
        """Returns what takes room that experts cannot have, and how much."""
        return (
            f"{_mib(self.dense)} for dense weights, {_mib(self.kv)} for {self.context} tokens of context, "
            f"{_mib(self.scratch)} for scratch"
        )


def _mib(n: int) -> str:
    return f"{-(-n >> 20)} MiB"

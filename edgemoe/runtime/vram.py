"""Divides a device's memory: what must lie there, what the context takes, and what is left for experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgemoe import _core
from edgemoe.errors import OutOfBudget
from edgemoe.file.format import MoeFile
from edgemoe.model import KvTypes, layer_state_bytes, scratch_bytes
from edgemoe.ops import OpsShape
from edgemoe.ops_cuda import CudaOps

__all__ = ["Vram", "default_vram"]

_DEFAULT_CONTEXT, _SMALLEST_CONTEXT, _STEP = 4096, 256, 32
_CHUNKS = (512, 256, 128, 64, 32, 16)
_ROUNDING_BYTES = 1 << 16  # arrays of a few bytes take whole units


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
    ) -> Vram:
        """Fits context and chunk into `vram`; arguments as those of `Budget.divide`.

        Raises:
            OutOfBudget: says the smallest that works, and what takes the room.
        """
        config = moe.config
        names = [n for n in moe.tensors if n != "embed" or config.tied]
        dense = sum(_core.Device.taken(sum(moe.tensors[n].lengths[:dense_level])) for n in names)

        def sized(context: int, chunk: int) -> Vram:
            shape = replace(ops, max_tokens=chunk, max_context=context)
            kv = sum(map(_core.Device.taken, layer_state_bytes(config, context, kv_types)))
            scratch = scratch_bytes(config, chunk, sequences) + _ROUNDING_BYTES
            scratch += CudaOps.scratch_bytes(shape, config)
            return cls(vram, dense, sequences * kv, scratch, context, chunk)

        least = sized(context or min(_SMALLEST_CONTEXT, config.context_length), _CHUNKS[-1])
        if least.room < 0:
            raise OutOfBudget(
                f"{_mib(vram)} of the device are too little; the smallest that works is "
                f"{_mib(vram - least.room)}: {least.parts()}; --device cpu needs none"
            )
        if context is None:  # it may take a quarter of what is left
            step = sequences * sum(layer_state_bytes(config, _STEP, kv_types))
            more = least.room // 4 // max(step, 1) * _STEP
            context = max(
                least.context, min(_DEFAULT_CONTEXT, config.context_length, least.context + more)
            )
        fits = (sized(context, chunk) for chunk in _CHUNKS)
        limit = least.scratch + (vram - least.dense - least.kv - least.scratch) // 4
        return next(
            (v for v in fits if v.room >= 0 and v.scratch <= limit), sized(context, _CHUNKS[-1])
        )

    @property
    def room(self) -> int:
        """What is left for experts; negative when `total` is too small."""
        return self.total - self.dense - self.kv - self.scratch

    def parts(self) -> str:
        """Returns what takes room that experts cannot have, and how much."""
        return (
            f"{_mib(self.dense)} for dense weights, {_mib(self.kv)} for {self.context} tokens of context, "
            f"{_mib(self.scratch)} for scratch"
        )


def _mib(n: int) -> str:
    return f"{-(-n >> 20)} MiB"

"""Divides the memory budget: what must be resident, what the context takes, and what is left for expert slots."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, replace

from edgemoe import hardware
from edgemoe.errors import OutOfBudget
from edgemoe.file.format import MoeFile
from edgemoe.model import KvTypes, kept_rope_bytes, scratch_bytes, state_bytes
from edgemoe.ops import OpsShape
from edgemoe.ops_cpu import CpuOps
from edgemoe.store import all_expert_bytes, dense_bytes, expert_bytes

__all__ = ["Budget", "default_ram", "parse_size"]

_DEFAULT_CONTEXT = 4096
_SMALLEST_CONTEXT = 256
_CHUNKS = (512, 256, 128, 64, 32, 16)

# Thread stacks, allocator slack and the growth of the interpreter during a chat. Generous: benchmarks/budget.py
# shows how much of a budget stays unused.
_MARGIN_BYTES = 24 << 20

# What the resident size of a process differs by from run to run.
_JITTER_BYTES = 1 << 20

_SIZE = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+) *([KMGT]?)(?:iB|B)?", re.IGNORECASE | re.ASCII)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str | int) -> int:
    """Reads "4GiB", "512MB", "1.5G" or a number of bytes; K, M, G and T are powers of 1024, "B" and "iB" optional.

    Raises:
        ValueError: not a size.
    """
    try:
        if isinstance(text, str):
            found = _SIZE.fullmatch(text.strip())
            if found is None:
                raise ValueError
            size = int(float(found[1]) * _UNITS[found[2].upper()])
        elif isinstance(text, bool):
            raise TypeError
        else:
            size = operator.index(text)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"size: expected something like 4GiB or 512MB, got {text!r}") from None
    if size <= 0:
        raise ValueError(f"size: expected more than nothing, got {text!r}")
    return size


def default_ram() -> int:
    """Returns what this process may take in all when the user set nothing: what is free, less a margin."""
    free = hardware.available_bytes()
    return hardware.process_bytes() + free - max(free // 10, min(256 << 20, free // 4))


@dataclass(frozen=True, slots=True)
class Budget:
    """Is a division of `ram` bytes; all fields in bytes but the two counts."""

    ram: int
    process: int
    """What the process takes that is not the engine's."""
    dense: int
    active_dense: int
    """Of `dense`, what computing one token reads: all but the embedding, unless that is also the head."""
    kv: int
    scratch: int
    expert: int
    """The largest expert, the least that can be resident."""
    experts: int
    """Every routed expert at the bits in use."""
    context: int
    """Positions."""
    chunk: int
    """Tokens of a prompt that are computed at once."""

    @classmethod
    def divide(
        cls,
        moe: MoeFile,
        *,
        ram: int,
        process: int,
        level: int,
        dense_level: int,
        context: int | None,
        kv_types: KvTypes,
        ops: OpsShape,
        sequences: int = 1,
        outside: int = 0,
    ) -> Budget:
        """Fits context and chunk into `ram`.

        Args:
            ram: for process and engine together.
            process: what is taken already.
            level: rungs of an expert.
            context: positions that must fit; None for what fits well.
            kv_types: how their keys and values are stored.
            sequences: how many have a context each.
            ops: the operations' shape but for chunk and context.
            outside: what of `process` the caller's budget does not count; errors leave it out.

        Raises:
            OutOfBudget: says the smallest budget that works, and what takes the room.
        """
        config = moe.config
        expert = expert_bytes(moe, level)
        dense = dense_bytes(moe, dense_level)
        embedding = 0 if config.tied else sum(moe.tensors["embed"].lengths[:dense_level])
        # Eight bytes of page table for every 4 KiB, and a little for the levels above.
        process += _MARGIN_BYTES + ram // 480

        def sized(context: int, chunk: int) -> Budget:
            shape = replace(ops, max_tokens=chunk, max_context=context)
            return cls(
                ram=ram, process=process, dense=dense, active_dense=dense - embedding,
                kv=sequences * state_bytes(config, context, kv_types),
                scratch=CpuOps.scratch_bytes(shape) + scratch_bytes(config, chunk, sequences)
                + kept_rope_bytes(config, context, kv_types),
                expert=expert, experts=all_expert_bytes(moe, level),
                context=context, chunk=chunk,
            )  # fmt: skip

        least = sized(context or min(_SMALLEST_CONTEXT, config.context_length), _CHUNKS[-1])
        if least.room < expert:
            each = f"{sequences} times " if sequences > 1 else ""
            raise OutOfBudget(
                f"a budget of {_mib(ram - outside)} is too small; the smallest that works is "
                f"{_mib(least.fixed + expert + _JITTER_BYTES - outside)}: "
                f"{_mib(least.process - outside)} for the process, {_mib(least.dense)} for dense weights, "
                f"{_mib(least.kv)} for {each}{least.context} tokens of context, {_mib(least.scratch)} for scratch, "
                f"{_mib(expert)} for one expert"
            )
        # Context and chunk may take an eighth each of what would else hold experts.
        spare = least.room - expert
        if context is None:
            most = min(_DEFAULT_CONTEXT, config.context_length)
            # A multiple of what the cache grows by, so that rounding takes no more than its share.
            more = spare // 8 // (sequences * state_bytes(config, 32, kv_types)) * 32
            context = max(least.context, min(most, least.context + more))
        fits = (sized(context, chunk) for chunk in _CHUNKS)
        limit = sized(context, _CHUNKS[-1]).scratch + spare // 8
        return next(b for b in fits if b.scratch <= limit)

    @property
    def fixed(self) -> int:
        """Everything but experts."""
        return self.process + self.dense + self.kv + self.scratch

    @property
    def room(self) -> int:
        """What is left; negative when `ram` is too small."""
        return self.ram - self.fixed

    @property
    def slots(self) -> int:
        """What expert slots get."""
        return min(self.room, self.experts)


def _mib(n: int) -> str:
    return f"{-(-n >> 20)} MiB"

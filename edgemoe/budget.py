"""Divides the memory budget: what must be resident, what the context takes, and what is left for expert slots."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgemoe import hardware
from edgemoe.errors import OutOfBudget
from edgemoe.format import MoeFile
from edgemoe.model.decoder import scratch_bytes
from edgemoe.model.kv import KvCache
from edgemoe.store import dense_bytes, expert_bytes

__all__ = ["Budget", "default_ram", "parse_size"]

_DEFAULT_CONTEXT = 4096
_SMALLEST_CONTEXT = 256
_CHUNKS = (512, 256, 128, 64, 32, 16)

# Page tables, thread stacks, allocator slack and the growth of the interpreter during a chat (measured: 9 MiB
# over 40 turns of the demo model).
_MARGIN_BYTES = 24 << 20

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str | int) -> int:
    """Reads "4GiB", "512MB", "1.5G" or a number of bytes; K, M, G and T are powers of 1024, "B" and "iB" optional.

    Raises:
        ValueError: not a size.
    """
    if isinstance(text, int):
        size = text
    else:
        clean = text.strip().upper()
        number = clean.rstrip("BIKMGT")
        unit = clean[len(number) :].strip().removesuffix("B").removesuffix("I")
        try:
            size = int(float(number) * _UNITS[unit])
        except (KeyError, ValueError, OverflowError):
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
    """One expert, the least that can be resident."""
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
        extra_scratch: int,
    ) -> Budget:
        """Fits context and chunk into `ram`.

        Args:
            ram: for process and engine together.
            process: what is taken already.
            level: rungs of an expert.
            context: positions that must fit; None for what fits well.
            extra_scratch: bytes of the operations' own scratch.

        Raises:
            OutOfBudget: says the smallest budget that works, and what takes the room.
        """
        config = moe.config
        per_token = KvCache.bytes_per_token(config)
        expert = expert_bytes(moe, level)
        num_experts = len(moe.experts.offsets)
        smallest_context = context or min(_SMALLEST_CONTEXT, config.context_length)
        dense = dense_bytes(moe, dense_level)
        least = cls(
            ram=ram, process=process + _MARGIN_BYTES, dense=dense,
            active_dense=dense - (0 if config.tied else sum(moe.tensors["embed"].lengths[:dense_level])),
            kv=per_token * smallest_context,
            scratch=extra_scratch + scratch_bytes(config, _CHUNKS[-1]) + 8 * smallest_context,
            expert=expert, experts=expert * num_experts,
            context=smallest_context, chunk=_CHUNKS[-1],
        )  # fmt: skip
        if least.room < expert:
            raise OutOfBudget(
                f"a budget of {_mib(ram)} is too small; the smallest that works is {_mib(least.smallest)}: "
                f"{_mib(least.process)} for the process, {_mib(least.dense)} for dense weights, "
                f"{_mib(least.kv)} for {least.context} tokens of context, {_mib(least.scratch)} for scratch, "
                f"{_mib(expert)} for one expert"
            )
        # Context and chunk may take an eighth each of what would else hold experts.
        spare = least.room - expert
        if context is None:
            most = min(_DEFAULT_CONTEXT, config.context_length)
            context = max(smallest_context, min(most, smallest_context + spare // 8 // per_token))
        chunk = next(
            (
                c
                for c in _CHUNKS
                if scratch_bytes(config, c) <= scratch_bytes(config, _CHUNKS[-1]) + spare // 8
            ),
            _CHUNKS[-1],
        )
        return replace(
            least,
            kv=per_token * context,
            scratch=extra_scratch + scratch_bytes(config, chunk) + 8 * context,
            context=context,
            chunk=chunk,
        )

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

    @property
    def smallest(self) -> int:
        """The smallest `ram` that works."""
        return self.fixed + self.expert


def _mib(n: int) -> str:
    return f"{n / 2**20:.0f} MiB"

"""The division of the memory budget: what must be resident, what the context takes, and what is left for experts."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from edgemoe import hardware
from edgemoe.config import ModelConfig
from edgemoe.errors import OutOfBudget
from edgemoe.file.format import ALIGNMENT, MoeFile
from edgemoe.model import (
    KvTypes,
    kept_rope_bytes,
    layer_state_bytes,
    scratch_bytes,
    state_pieces,
)
from edgemoe.ops import OpsShape
from edgemoe.ops.cpu import CpuOps
from edgemoe.ops.cuda import CudaOps
from edgemoe.runtime.context import (
    CHUNKS,
    DEFAULT_CONTEXT,
    KV_STEP,
    SMALLEST_CONTEXT,
    longest_context,
)
from edgemoe.runtime.vram import Vram
from edgemoe.store import all_expert_bytes, dense_bytes, expert_bytes, looked_up_bytes

__all__ = ["Budget", "default_ram", "parse_size"]

# What a process grows by from the opening of a model to the end of its first reply: code that is mapped when it first
# runs, stacks and the interpreter (8 MiB); and what rendering a chat template may take (12 MiB, `Meter.most_bytes`).
_GROWTH_BYTES = (8 << 20) + (12 << 20)

# Float64 and index arrays of a sampler that keeps the whole vocabulary: bytes for each token of the vocabulary.
_SAMPLER_BYTES = 33

# How much the resident size of a process varies from run to run, and from one measurement to the next.
_JITTER_BYTES = 1 << 20

# One byte of page tables for so many bytes of memory: 8 bytes for every 4 KiB (1 in 512), and the levels above.
_PER_TABLE = 480

# A layer's state of this size or larger is resident as soon as it is made; see `Mixer.state_bytes`.
_HUGE_STATE_BYTES = 4 << 20

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
    """Returns the bytes that this process may take in all when the user sets no limit.

    That is what it has and what is free, less a margin: a tenth of what is free, and at least 256 MiB or, on a small
    machine, a quarter of it.
    """
    free = hardware.available_bytes()
    return hardware.process_bytes() + free - max(free // 10, min(256 << 20, free // 4))


class _States:
    """The host memory that the layers of one sequence take, as a function of the context and the chunk.

    With a device, only the layers that the host runs count.
    """

    def __init__(
        self, config: ModelConfig, kv_types: KvTypes, hosted: Iterable[int] | None
    ) -> None:
        self._config, self._kv_types = config, kv_types
        self._hosted = None if hosted is None else tuple(hosted)
        first, second = (self._layers(n * KV_STEP, n * KV_STEP) for n in (1, 2))
        self._steps = [b - a for a, b in zip(first, second, strict=True)]
        self._same = [a - n for a, n in zip(first, self._steps, strict=True)]  # at any context

    def total(self, context: int, chunk: int) -> int:
        """Returns the bytes of all layers together."""
        return sum(self._layers(context, chunk))

    def growth(self, context: int, chunk: int) -> dict[str, int]:
        """Returns what a new sequence takes at once and what each position adds, as fields of `Budget`."""
        layers = self._layers(context, chunk)
        # A layer whose state a shorter chunk makes smaller is resident at once.
        growing = self._layers(context, context)
        small = [
            n < _HUGE_STATE_BYTES and n == most for n, most in zip(layers, growing, strict=True)
        ]
        at_once = zip(self._same, layers, small, strict=True)
        return {
            "kv_at_once": sum(same if late else every for same, every, late in at_once),
            "kv_step": sum(n for n, late in zip(self._steps, small, strict=True) if late),
            "kv_edges": state_pieces(self._config) * ALIGNMENT if any(small) else 0,
        }

    def _layers(self, context: int, chunk: int) -> list[int]:
        layers = layer_state_bytes(self._config, context, self._kv_types, chunk)
        return layers if self._hosted is None else [layers[i] for i in self._hosted]


@dataclass(frozen=True, slots=True)
class Budget:
    """A division of `ram` bytes. All fields are bytes, except `sequences`, `context`, `chunk` and `is_shared`."""

    ram: int
    """The whole budget: the process and the engine together."""
    process: int
    """What the process takes apart from the engine."""
    growth: int
    """What the process will grow by until it has made a reply, and what sampling takes while it runs."""
    tables: int
    """Page tables for `ram` bytes."""
    dense: int
    """Resident weights: all but the routed experts, those of adapters included. With a device, the host's part."""
    active_dense: int
    """Dense weights of the model that computing a token reads: all but the embedding, unless it is also the head."""
    sequences: int
    """How many sequences `kv` is for."""
    kv: int
    """The states of all sequences with a full context: keys and values, and what recurrent layers remember."""
    kv_at_once: int
    """The part of one sequence's state that is resident as soon as it is made."""
    kv_step: int
    """What every 32 positions (`KV_STEP`) of one sequence add to `kv_at_once`."""
    kv_edges: int
    """What pages that are filled in part may add to that, for one sequence."""
    scratch: int
    """Activations of a pass over `chunk` tokens."""
    row: int
    """The part of `scratch` that each token of a chunk takes."""
    expert: int
    """The largest expert: the least that must be resident."""
    experts: int
    """All routed experts at the bits in use."""
    context: int
    """Positions of each sequence, prompt and reply together."""
    chunk: int
    """Tokens of a prompt that are computed in one pass."""
    slack: int
    """What must stay free even when the process has just been measured exactly."""
    device: int = 0
    """What a device that shares the host's memory takes of it, apart from experts."""
    is_shared: bool = False
    """Whether a device runs the experts in host memory. Then the slots have their full size from the start."""
    fixed_slots: int | None = None
    """What expert slots get in measurements, whatever is left; None for what is left."""

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
        slots: int | None = None,
        opening: int = 0,
        outside: int = 0,
        vram: Vram | None = None,
        beside: tuple[int, int] = (0, 0),
    ) -> Budget:
        """Returns a division of `ram` with the context and the chunk that fit. All sizes are bytes.

        Args:
            moe: the file.
            ram: for the process and the engine together.
            process: what the process takes already.
            level: how many rungs of an expert are used.
            dense_level: how many rungs of all other matrices are used.
            context: positions that must fit; None for as many as fit well.
            kv_types: how keys and values are stored.
            ops: the shape of the operations; its chunk and context are replaced.
            sequences: how many sequences have a context each.
            slots: what experts get, whatever is left; None for what is left.
            opening: the peak of the process while it read the file, which `ram` must cover too.
            outside: the part of `process` that the caller's budget does not count; error messages leave it out.
            vram: how a device's memory is divided. The context and most weights are in it then, not in `ram`.
            beside: what adapters take: of dense weights, and of scratch for each token of a chunk.

        Raises:
            OutOfBudget: nothing fits; says the smallest budget that works, and what takes the room.
        """
        config = moe.config
        expert = expert_bytes(moe, level)
        dense = dense_bytes(moe, dense_level)
        held = dense + beside[0] if vram is None else vram.held
        context = context if vram is None else vram.context
        sampler = _SAMPLER_BYTES * config.vocab_size
        shared = vram is not None and vram.is_shared
        row = scratch_bytes(config, 1) - scratch_bytes(config, 0) + beside[1]
        states = _States(config, kv_types, None if vram is None else vram.hosted)

        def sized(context: int, chunk: int) -> Budget:
            shape = replace(ops, max_tokens=chunk, max_context=context)
            own = CpuOps.scratch_bytes(shape)
            if vram is not None:
                own = CudaOps.host_bytes(shape, config, hosts=bool(vram.hosted))
            rope = kept_rope_bytes(config, context, kv_types)
            return cls(
                ram=ram, process=process, growth=_GROWTH_BYTES + sampler,
                tables=ram // _PER_TABLE,
                dense=held, active_dense=dense - looked_up_bytes(moe, dense_level),
                sequences=sequences,
                kv=sequences * states.total(context, chunk), **states.growth(context, chunk),
                scratch=own + scratch_bytes(config, chunk, sequences) + rope + beside[1] * chunk,
                row=row,
                expert=expert, experts=all_expert_bytes(moe, level),
                context=context, chunk=chunk, slack=_JITTER_BYTES + sampler + rope,
                device=vram.taken if vram is not None and shared else 0, is_shared=shared, fixed_slots=slots,
            )  # fmt: skip

        least = sized(context or min(SMALLEST_CONTEXT, config.context_length), CHUNKS[-1])
        if least.room < expert or ram < opening:
            raise least._too_small(opening, outside)
        if context is None:
            context = _context_of(least, states, config)
        return _fitting(
            sized, context, least.room - expert, CHUNKS[0] if vram is None else vram.chunk
        )

    def _too_small(self, opening: int, outside: int) -> OutOfBudget:
        needed = self.fixed - self.tables + self.expert + _JITTER_BYTES
        smallest = needed + needed // (_PER_TABLE - 1) + 1  # with its own page tables
        least = replace(self, tables=smallest // _PER_TABLE)
        read = f"; reading the tokenizer takes {_mib(opening)}" if opening > smallest else ""
        return OutOfBudget.of(
            self.ram - outside, max(smallest, opening + _JITTER_BYTES) - outside,
            f"{least.parts(outside)}, {_mib(self.expert)} for one expert", read,
        )  # fmt: skip

    @property
    def fixed(self) -> int:
        """What everything but the experts takes."""
        own = self.process + self.growth + self.tables + self.dense + self.kv + self.scratch
        return own + self.device

    @property
    def room(self) -> int:
        """What is left for experts; negative when `ram` is too small."""
        return self.ram - self.fixed

    @property
    def slots(self) -> int:
        """What expert slots are certain to have."""
        room = self.room if self.fixed_slots is None else self.fixed_slots
        return min(room, self.experts)

    @property
    def most_slots(self) -> int:
        """What expert slots may have while contexts and scratch do not use what is reserved for them."""
        if self.fixed_slots is not None or self.is_shared:
            return self.slots
        taken = self.process + self.tables + self.dense + self.sequences * self.kv_at_once
        return max(min(self.ram - taken, self.experts), self.slots)

    def kv_bytes(self, positions: int) -> int:
        """Returns what the first `positions` of a sequence add to `kv_at_once` once they are stored."""
        if positions == 0:
            return 0
        late = self.kv // self.sequences - self.kv_at_once
        return min(-(-positions // KV_STEP) * self.kv_step, late) + self.kv_edges

    @property
    def kv_late(self) -> int:
        """What a sequence may take beyond `kv_bytes` of the last position that was counted."""
        return self.kv_step + self.kv_edges if self.kv_step else 0

    def parts(self, outside: int = 0) -> str:
        """Returns text for an error: what takes room that experts cannot have, and how much of it.

        Args:
            outside: bytes that are left out of the process's.
        """
        each = f"{self.sequences} times " if self.sequences > 1 else ""
        there = f", {_mib(self.device)} for what the device has" if self.device else ""
        return (
            f"{_mib(self.process - outside)} for the process, {_mib(self.growth)} for what it grows by, "
            f"{_mib(self.tables)} for page tables, {_mib(self.dense)} for dense weights, "
            f"{_mib(self.kv)} for {each}{self.context} tokens of context, {_mib(self.scratch)} for scratch{there}"
        )


# The context and the chunk may each take an eighth of what would otherwise hold experts.


def _context_of(least: Budget, states: _States, config: ModelConfig) -> int:
    """Returns the context that fits well, given a division with the smallest context and chunk."""
    spare = least.room - least.expert
    return longest_context(
        least.context, min(DEFAULT_CONTEXT, config.context_length),
        (least.kv + spare // 8) // least.sequences, lambda n: states.total(n, CHUNKS[0]),
    )  # fmt: skip


def _fitting(
    sized: Callable[[int, int], Budget], context: int, spare: int, most_chunk: int
) -> Budget:
    """Returns the division with the longest chunk that fits well.

    Args:
        sized: makes a division from a context and a chunk.
        spare: bytes that the smallest context and chunk leave beside one expert.
    """
    fits = (sized(context, chunk) for chunk in CHUNKS if chunk <= most_chunk)
    small = sized(context, CHUNKS[-1])
    limit = small.scratch + small.kv + spare // 8
    return next(b for b in fits if b.scratch + b.kv <= limit)


def _mib(n: int) -> str:
    return f"{-(-n >> 20)} MiB"

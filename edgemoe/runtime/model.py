"""A model that is ready to run, made from a file and options. It has no sequence, no position and no sampler."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.arguments import path_of, whole
from edgemoe.config import ModelConfig
from edgemoe.errors import DeviceError, DeviceLost
from edgemoe.experts import Experts
from edgemoe.file.format import MoeFile
from edgemoe.model import MOST_AHEAD, Batch, Decoder, SequenceState, read_bytes
from edgemoe.ops import Array, Ops
from edgemoe.runtime.adapters import Adapters
from edgemoe.runtime.budget import Budget
from edgemoe.runtime.options import EngineOptions
from edgemoe.runtime.room import Room
from edgemoe.runtime.trace import TraceHeader
from edgemoe.runtime.trace_writer import TraceWriter
from edgemoe.scheduler import Scheduler, Setting
from edgemoe.scheduler.watched import Watched
from edgemoe.store import ExpertStore

__all__ = ["Counters", "Model"]


class Counters(NamedTuple):
    """What a model has done since it was opened."""

    store: dict[str, Any]
    """See `ExpertStore.stats`."""
    routed: int
    """Pairs of a token and an expert, as the routers chose them."""
    skipped: int
    """Pairs that were not run."""
    substituted: int
    """Pairs for which another expert ran."""


@dataclass(slots=True, kw_only=True, eq=False)
class Model:
    """Weights, operations, expert store and scheduler, which together run batches. Made by `opening.open_model`.

    One thread at a time may use it, except for `counters`, which any thread may read.
    """

    moe: MoeFile
    """The file, without its sections."""
    options: EngineOptions
    bits: int
    """The most bits that any expert may run at."""
    top_bits: NDArray[np.int8]
    """[layers * E]: the most bits that each expert may run at; with adapters, at each place."""
    threads: int
    budget: Budget
    room: Room
    setting: Setting
    """What the scheduler knows of the model; without the file's sections."""
    ops: Ops
    device: _core.Device | None = None
    """Where `ops` run; None for the processor."""
    store: ExpertStore
    experts: Experts
    decoder: Decoder
    weights: Mapping[str, Any]
    """All weights except those of the routed experts, by name, as the decoder has them."""
    adapters: Adapters
    given: ModelConfig
    """The file's config, whose experts per token the options may have changed in `config`."""
    most_bits: int
    """The bits for which memory was divided: `bits` can be changed up to this value."""
    most_experts: int
    """The experts per token for which memory was divided, likewise."""
    sections_bytes: int
    """Memory that reading the file's sections takes; 0 if none of them is of use to schedulers."""
    notes: tuple[str, ...] = ()
    """The chosen options that change the answer, one line each; empty if the model is exact."""
    counters: Counters = field(init=False)
    """The counters as of the last pass. Replaced as a whole and never modified, so that any thread may read them."""

    def __post_init__(self) -> None:
        self.count()

    def make_state(self) -> SequenceState:
        """Returns the state of a new sequence.

        Raises:
            ValueError: there are already as many states as memory was divided for.
        """
        most = self.options.sequences
        if len(self.room.states) >= most:
            raise ValueError(f"sequences: the model was opened for {most} at once")
        state = self.decoder.make_state()
        self.room.states.add(state)
        return state

    def forward(self, batch: Batch) -> Array:
        """Runs tokens of one sequence or several through all layers, and adds them to the sequences.

        Args:
            batch: at most `budget.chunk` tokens.

        Returns:
            The last hidden states [T, D], for `logits`; scratch, valid until the next call.

        Raises:
            ValueError: tokens do not fit a sequence's context; nothing has run.
            Cancelled: the batch was cancelled; the sequences are as they were, and everything stays usable.
            ReadError: the disk failed; likewise.
            FormatError: a checksum does not match; likewise.
            RangeError: a key or value does not fit the type of the KV cache, or a logit of a router is not a finite
                number; likewise.
            DeviceError: the device failed; likewise.
            DeviceLost: the device failed for good; the model must be opened again, by another process.
        """
        if len(batch) > self.budget.chunk:
            raise ValueError(
                f"batch: expected at most {self.budget.chunk} tokens, got {len(batch)}"
            )
        for part in batch.slices:
            part.state.begin(part.count)
        for part in batch.slices:
            self._catch_up(part.state, batch, part.count)
        hidden = self._pass(batch)
        for part in batch.slices:
            part.state.commit(batch.ids[part.start : part.stop].tolist())
        return hidden

    def _catch_up(self, state: SequenceState, batch: Batch, count: int) -> None:
        """Computes a sequence's states again if its next `count` tokens change the frequencies of its positions.

        With LongRoPE the frequencies depend on the sequence's length. Logits are always those of the whole sequence
        computed at once, as in transformers. An error leaves the sequence's tokens as they were; the next call goes on
        where this one ended.
        """
        length = max(state.goal, state.length + count)
        if not self.config.turns_alike(state.turned, length):
            state.held = 0
        state.turned = length
        while state.held < state.length:
            ids = np.array(state.ids[state.held : state.held + self.budget.chunk], np.int32)
            again = Batch.of((state, ids))
            again.is_cancelled = batch.is_cancelled
            self._pass(again)
            state.held += len(ids)

    def _pass(self, batch: Batch) -> Array:
        """Runs a batch through all layers: one pass for each set of dense weights; all passes share the experts.

        Adapters with dense tensors of their own have a set of their own; see `Adapters.variants`.
        """
        variants = self.adapters.variants
        sets = sorted({variants[part.state.adapter] for part in batch.slices})
        if len(sets) == 1:
            (batch.variant,) = sets
            return self._pass_of_one(batch)
        self.room.fit(batch)
        out = np.empty((len(batch), self.config.hidden_size), np.float32)
        for variant in sets:
            mine = [part for part in batch.slices if variants[part.state.adapter] == variant]
            some = Batch.of(*((part.state, batch.ids[part.start : part.stop]) for part in mine))
            some.is_cancelled, some.variant = batch.is_cancelled, variant
            hidden = self._pass_of_one(some)
            for part, to in zip(some.slices, mine, strict=True):
                out[to.start : to.stop] = hidden[part.start : part.stop]
        return out

    def _pass_of_one(self, batch: Batch) -> Array:
        """Runs a batch whose tokens all have the same dense weights through all layers."""
        scheduler, observer = self.scheduler, self.experts.observer
        self.room.fit(batch)
        if observer is not None:
            observer.begin(batch)
        for part in batch.slices:
            if part.state.held == 0:
                scheduler.begin()
        start, sequences = time.perf_counter(), len(batch.slices)
        try:
            with self._says_whether_lost():
                scheduler.tokens(batch.ids, sequences)
                hidden = self.decoder.forward(batch)
                scheduler.passed(len(batch), time.perf_counter() - start, sequences)
        finally:
            self.count()
        return hidden

    @contextlib.contextmanager
    def _says_whether_lost(self) -> Iterator[None]:
        """Raises DeviceLost in place of a DeviceError if the device is lost."""
        try:
            yield
        except DeviceError as error:
            if self.device is None or not self.device.is_lost:
                raise
            raise DeviceLost(
                f"{self.options.device} is lost, and the model has to be opened again: {error}"
            ) from error

    def logits(self, hidden: Array, out: NDArray[np.float32], of: SequenceState) -> None:
        """Computes logits from rows of `forward`'s result.

        Args:
            hidden: [T, D]: rows of one sequence, or of several with the same `variant`.
            out: [T, V], where the logits are written.
            of: one of these sequences; says which weights to use.

        Raises:
            DeviceError: the device failed.
            DeviceLost: the device failed for good; the model must be opened again, by another process.
        """
        with self._says_whether_lost():
            self.decoder.logits(hidden, out, self.variant(of))
        if self.experts.observer is not None:
            self.experts.observer.end()

    def variant(self, state: SequenceState) -> int:
        """Returns the number of the set of dense weights that a sequence is computed with; see `Adapters.variants`."""
        return self.adapters.variants[state.adapter]

    def count(self) -> None:
        """Publishes the counters as they are now."""
        e = self.experts
        self.counters = Counters(self.store.stats, e.routed, e.skipped, e.scheduler.substituted)

    @property
    def config(self) -> ModelConfig:
        """The model's shape, with the experts per token of the options."""
        return self.moe.config

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler, which decides which experts are read when, and at how many bits."""
        return self.experts.scheduler

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that computing one token reads from memory, at the bits in use: the mean over experts."""
        c, every = self.config, np.arange(len(self.top_bits), dtype=np.int32)
        sizes = self.store.sizes(every, self.top_bits)
        expert = float(sizes[sizes > 0].mean())
        return self.budget.active_dense + int(len(c.moe_layers) * c.experts_per_token * expert)

    def kv_bytes(self, length: int) -> int:
        """Returns the bytes of keys and values that attention reads for a token after `length` others."""
        return read_bytes(self.config, length, self.options.kv_types)

    def warm(self) -> int:
        """Loads the experts that were used most, until the slots are full; returns the bytes read.

        Raises:
            ReadError: the disk failed.
            FormatError: a checksum does not match.
        """
        uses, store = self.store.uses.reshape(-1), self.store
        order = np.argsort(-uses, kind="stable")[: np.count_nonzero(uses)].astype(np.int32)
        bits = self.top_bits[order]
        total = np.cumsum(store.sizes(order, bits))
        fit = int(np.searchsorted(total, self.room.size, side="right"))
        before = int(store.stats["bytes_read"])
        try:
            store.load(order[:fit], bits[:fit])
        finally:
            self.count()
        return int(store.stats["bytes_read"]) - before

    def record(self, path: str | os.PathLike[str], *, look_ahead: int = 0) -> None:
        """Records a trace from now on; see `Engine.record`."""
        if self.experts.observer is not None:
            raise ValueError("record: the engine is observed already")
        look_ahead = whole("look_ahead", look_ahead, 0, MOST_AHEAD)
        scheduler = self.scheduler
        if look_ahead > scheduler.look_ahead:
            scheduler = Watched(scheduler, look_ahead)
        setting, slot_bytes = self.setting, self.store.cache.slot_bytes
        rungs = np.minimum(self.moe.experts.rungs, len(setting.level_bits))
        header = TraceHeader(
            model=str(self.moe.source.get("name", self.moe.path.name)),
            num_experts=setting.num_experts,
            experts_per_token=setting.experts_per_token,
            num_layers=setting.num_layers,
            bits=setting.bits,
            level_bits=setting.level_bits,
            level_bytes=tuple(map(slot_bytes, range(1, len(setting.level_bits) + 1))),
            rungs=() if (rungs == rungs.max()).all() else tuple(rungs.tolist()),
            slots_bytes=setting.slots_bytes,
            scheduler=self.options.scheduler,
            look_ahead=scheduler.look_ahead,
            reads_ahead=scheduler.reads_ahead,
            threads=self.threads,
        )
        writer = TraceWriter(path_of("path", path), header, ran_there=self.store.watch())
        self.room.hold()  # a replay relies on the slots having the size that the header says
        self.experts.scheduler, self.experts.observer = scheduler, writer

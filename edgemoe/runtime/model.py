"""A model that is ready to run: what a file and options become. No sequence, no position, no sampler."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import ModelConfig
from edgemoe.experts import Experts
from edgemoe.file.format import MoeFile
from edgemoe.model import MOST_AHEAD, Decoder, KvCache
from edgemoe.ops import Ops
from edgemoe.runtime.budget import Budget
from edgemoe.runtime.options import EngineOptions
from edgemoe.runtime.trace import TraceHeader, TraceWriter
from edgemoe.scheduler import Scheduler, Setting
from edgemoe.scheduler.watched import Watched
from edgemoe.store import ExpertStore

__all__ = ["Model"]


@dataclass(slots=True, kw_only=True, eq=False)
class Model:
    """Holds weights, operations, store and scheduler. One thread at a time. Made by `opening.open_model`."""

    moe: MoeFile
    """Without its sections."""
    options: EngineOptions
    bits: int
    """The most precision that an expert may run at."""
    top_bits: NDArray[np.int8]
    """[layers * E]: the same for each."""
    threads: int
    budget: Budget
    setting: Setting
    """What the scheduler decides about; without the file's sections."""
    ops: Ops
    store: ExpertStore
    experts: Experts
    decoder: Decoder
    notes: tuple[str, ...] = ()
    """What the user chose that changes the answer, one line each; empty when exact."""

    @property
    def config(self) -> ModelConfig:
        """What the model is."""
        return self.moe.config

    @property
    def scheduler(self) -> Scheduler:
        """Who decides."""
        return self.experts.scheduler

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that computing one token reads from memory, at the bits in use."""
        c, every = self.config, np.arange(len(self.top_bits), dtype=np.int32)
        expert = float(self.store.sizes(every, self.top_bits).mean())
        return self.budget.active_dense + int(len(c.moe_layers) * c.experts_per_token * expert)

    def kv_bytes(self, length: int) -> int:
        """Returns the bytes of keys and values that attention reads for a token after `length` others."""
        return KvCache.read_bytes(self.config, length, self.options.kv_types)

    def warm(self) -> int:
        """Loads the experts that were used most, until the slots are full; returns the bytes read."""
        uses, store = self.store.uses.reshape(-1), self.store
        order = np.argsort(-uses, kind="stable")[: np.count_nonzero(uses)].astype(np.int32)
        bits = self.top_bits[order]
        total = np.cumsum(store.sizes(order, bits))
        fit = int(np.searchsorted(total, self.setting.slots_bytes, side="right"))
        before = int(store.stats["bytes_read"])
        store.load(order[:fit], bits[:fit])
        return int(store.stats["bytes_read"]) - before

    def record(self, path: str | os.PathLike[str], *, look_ahead: int = 0) -> TraceWriter:
        """Observes with a trace from now on; see `Engine.record`."""
        if self.experts.observer is not None:
            raise ValueError("record: the engine is observed already")
        if not 0 <= look_ahead <= MOST_AHEAD:
            raise ValueError(f"look-ahead: expected 0 to {MOST_AHEAD} layers, got {look_ahead}")
        reads_ahead = self.scheduler.look_ahead > 0
        if look_ahead > self.scheduler.look_ahead:
            self.experts.scheduler = Watched(self.scheduler, look_ahead)
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
            look_ahead=self.scheduler.look_ahead,
            reads_ahead=reads_ahead,
            threads=self.threads,
        )
        writer = self.experts.observer = TraceWriter(path, header)
        return writer

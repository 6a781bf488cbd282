"""The figures of one call of an engine: `Stats` holds them, `Meter` counts them."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core, hardware
from edgemoe.runtime.model import Model

__all__ = ["Meter", "Stats"]

_CHANGES = ("hits", "misses", "evictions", "bytes_read", "read_s", "wait_s")
_DEVICE_CHANGES = ("device_hits", "device_bytes_in")  # only of stores with experts on a device


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What one call of `generate`, `logits` or `extend` did; for a running call, what it did so far."""

    prompt_tokens: int = 0
    """Tokens of the prompt that were computed."""
    cached_tokens: int = 0
    """Tokens of the prompt that were kept from the call before."""
    new_tokens: int = 0
    prompt_s: float = 0.0
    decode_s: float = 0.0
    """Time from the first token of the reply to the last, in seconds, as are all times."""
    first_token_s: float = 0.0
    """Time to the first token, computing the prompt included."""
    hits: int = 0
    """Uses of an expert that was resident. An expert that several tokens of a pass use in a layer counts once."""
    misses: int = 0
    """Uses of an expert that had to be read first."""
    device_hits: int = 0
    """Uses of an expert that ran on a device; all others ran on the processor. The device runs experts that are in its
    memory, and some that are copied to it for the occasion, whether they were hits or misses."""
    device_bytes_in: int = 0
    """Bytes of experts that were copied to a device's memory."""
    device_bytes: int = 0
    """Bytes of experts in a device's memory now."""
    evictions: int = 0
    bytes_read: int = 0
    read_s: float = 0.0
    """Time with at least one read in flight."""
    wait_s: float = 0.0
    """Time for which computing stalled on reads."""
    average_bits: float = 0.0
    """The mean over the experts that ran."""
    skipped_share: float = 0.0
    """The share of the pairs of a token and an expert, as the routers chose them, that did not run."""
    substituted_share: float = 0.0
    """The share of these pairs for which another expert ran."""
    peak_bytes: int = 0
    """The process's highest resident memory since its start."""
    resident_bytes: int = 0
    """Bytes of experts in memory now."""
    kv_bytes: int = 0
    """What the KV cache takes once the context is full."""
    scheduler: str = ""
    """What the scheduler reports about itself, if anything."""
    logits_hash: str = ""
    """CRC-32C of the last logits, in hexadecimal: the same for every budget and number of threads."""

    @property
    def hit_rate(self) -> float:
        """Hits per use of an expert; 1 if there were no uses."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else 1.0


class Meter:
    """The counters of one call of a sequence, as differences of the model's counters, which run since it was opened.

    Updated on the thread that runs the model; `stats` may be called on any thread.
    """

    def __init__(self, model: Model, kv_bytes: int) -> None:
        self._model: Model | None = model
        self._kv_bytes = kv_bytes
        self._frozen = Stats()
        self.row_lock = threading.Lock()
        """Held while the logits that `hash` was given are overwritten."""
        self.start()

    def start(self) -> None:
        """Notes that a call begins."""
        assert self._model is not None
        self._base = self._model.counters
        self._prompt = (0, 0, 0.0)
        self.prompt_progress = (0, 0)
        """Tokens of the prompt computed so far, and in all. Replaced as a whole, so that any thread may read it."""
        self._times = (0, 0.0, 0.0)
        self._row: NDArray[np.float32] | None = None

    def prompt(self, computed: int, cached: int, seconds: float) -> None:
        """Notes how many tokens of the prompt were computed, how many were kept from before, and the time it took."""
        self._prompt = (computed, cached, seconds)

    def token(self, seconds: float) -> None:
        """Notes that a token was made, `seconds` after the reply began."""
        count, first, _ = self._times
        self._times = (count + 1, first if count else seconds, seconds)

    def hash(self, row: NDArray[np.float32]) -> None:
        """Notes the last logits, [V]; whoever overwrites them must hold `row_lock`."""
        self._row = row

    def stats(self) -> Stats:
        """Returns what the call has done so far, as of the model's last pass."""
        model = self._model
        if model is None:
            return self._frozen
        now, base = model.counters, self._base
        new_tokens, first_s, last_s = self._times
        computed, cached, prompt_s = self._prompt
        with self.row_lock:
            row = self._row
            logits_hash = "" if row is None else f"{_core.crc32c(row):08x}"
        change = {name: now.store[name] - base.store[name] for name in _CHANGES}
        for name in _DEVICE_CHANGES:
            change[name] = now.store.get(name, 0) - base.store.get(name, 0)
        uses = change["hits"] + change["misses"]
        routed = max(now.routed - base.routed, 1)
        return Stats(
            skipped_share=(now.skipped - base.skipped) / routed,
            substituted_share=(now.substituted - base.substituted) / routed,
            prompt_tokens=computed,
            cached_tokens=cached,
            prompt_s=prompt_s,
            new_tokens=new_tokens,
            first_token_s=first_s,
            decode_s=last_s - first_s,
            average_bits=(now.store["bits"] - base.store["bits"]) / uses if uses else 0.0,
            peak_bytes=hardware.peak_bytes(),
            resident_bytes=now.store["resident_bytes"],
            device_bytes=now.store.get("device_bytes", 0),
            kv_bytes=self._kv_bytes,
            scheduler=model.scheduler.report(),
            logits_hash=logits_hash,
            **change,
        )

    def freeze(self) -> None:
        """Keeps the last figures and lets go of the model."""
        self._frozen = self.stats()
        self._model = None

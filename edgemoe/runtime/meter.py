"""Counts what one call of an engine does: `Stats` is what it says, `Meter` how it is counted."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core, hardware
from edgemoe.runtime.model import Model

__all__ = ["Meter", "Stats"]

_CHANGES = ("hits", "misses", "evictions", "bytes_read", "read_s", "wait_s")
_DEVICE_CHANGES = ("device_hits", "device_bytes_in")  # of stores that have experts there


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Says what one call of `generate` or `logits` did; counters of a running call so far."""

    prompt_tokens: int = 0
    """Tokens of the prompt that were computed."""
    cached_tokens: int = 0
    """Tokens of the prompt that were kept from the call before."""
    new_tokens: int = 0
    prompt_s: float = 0.0
    decode_s: float = 0.0
    """Time in which the tokens after the first were made."""
    first_token_s: float = 0.0
    """From the call to the first token."""
    hits: int = 0
    """Experts that were wanted and resident."""
    misses: int = 0
    device_hits: int = 0
    """Of `hits`, those in a device's memory, which ran there; all others ran on the processor."""
    device_bytes_in: int = 0
    """Of experts, copied to a device's memory."""
    device_bytes: int = 0
    """Of experts in a device's memory, now."""
    evictions: int = 0
    bytes_read: int = 0
    read_s: float = 0.0
    """Time with at least one read under way."""
    wait_s: float = 0.0
    """Time that computing stood still for reads."""
    average_bits: float = 0.0
    """Of the experts that ran."""
    skipped_share: float = 0.0
    """Of what the routers chose, pairs of a token and an expert."""
    substituted_share: float = 0.0
    """The same, of those for which another expert ran."""
    peak_bytes: int = 0
    """The process's highest resident memory since its start."""
    resident_bytes: int = 0
    """Of experts, now."""
    kv_bytes: int = 0
    """What the KV cache takes once the context is full."""
    scheduler: str = ""
    """What the scheduler says of itself, if anything."""
    logits_hash: str = ""
    """CRC-32C of the last logits: the same on every budget and thread count."""

    @property
    def hit_rate(self) -> float:
        """Returns hits per use of an expert, 1 when there was none."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else 1.0


class Meter:
    """Turns a model's counters since it was opened into those of one call of a sequence.

    Counted on the thread that runs the model; `stats` may be asked for on any.
    """

    def __init__(self, model: Model, kv_bytes: int) -> None:
        self._model: Model | None = model
        self._kv_bytes = kv_bytes
        self._frozen = Stats()
        self.row_lock = threading.Lock()
        """Held while the logits are written that `hash` was told of."""
        self.start()

    def start(self) -> None:
        """A call begins."""
        assert self._model is not None
        self._base = self._model.counters
        self._prompt = (0, 0, 0.0)
        self.prompt_progress = (0, 0)
        """Tokens of the prompt that were computed so far, and in all; replaced as a whole."""
        self._times = (0, 0.0, 0.0)
        self._row: NDArray[np.float32] | None = None

    def prompt(self, computed: int, cached: int, seconds: float) -> None:
        """So many tokens of the prompt were computed, and so many were there."""
        self._prompt = (computed, cached, seconds)

    def token(self, seconds: float) -> None:
        """A token was made, so long after the call began."""
        count, first, _ = self._times
        self._times = (count + 1, first if count else seconds, seconds)

    def hash(self, row: NDArray[np.float32]) -> None:
        """These are the last logits, [V]; written over under `row_lock` alone."""
        self._row = row

    def stats(self) -> Stats:
        """Returns what the call did so far, as of the model's last pass."""
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
        """Keeps the last figures when the model goes."""
        self._frozen = self.stats()
        self._model = None

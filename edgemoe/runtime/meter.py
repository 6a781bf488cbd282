"""Counts what one call of an engine does: `Stats` is what it says, `Meter` how it is counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core, hardware
from edgemoe.experts import Experts

__all__ = ["Meter", "Stats"]


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
    """Turns counters since the start into those of one call."""

    def __init__(self, experts: Experts, kv_bytes: int) -> None:
        self._experts: Experts | None = experts
        self._kv_bytes = kv_bytes
        self._frozen = Stats()
        self.start()

    def start(self) -> None:
        assert self._experts is not None
        self._base = self._experts.store.stats
        self._base_choices = _choices(self._experts)
        self._prompt = (0, 0, 0.0)
        self._tokens = 0
        self._first_s = self._last_s = 0.0
        self._row: NDArray[np.float32] | None = None

    def prompt(self, computed: int, cached: int, seconds: float) -> None:
        self._prompt = (computed, cached, seconds)

    def token(self, seconds: float) -> None:
        if self._tokens == 0:
            self._first_s = seconds
        self._tokens += 1
        self._last_s = seconds

    def hash(self, row: NDArray[np.float32]) -> None:
        self._row = row

    def stats(self) -> Stats:
        experts = self._experts
        if experts is None:
            return self._frozen
        now, base = experts.store.stats, self._base
        uses = now["hits"] + now["misses"] - base["hits"] - base["misses"]
        routed, skipped, substituted = (
            a - b for a, b in zip(_choices(experts), self._base_choices, strict=True)
        )
        return Stats(
            skipped_share=skipped / max(routed, 1),
            substituted_share=substituted / max(routed, 1),
            prompt_tokens=self._prompt[0],
            cached_tokens=self._prompt[1],
            prompt_s=self._prompt[2],
            new_tokens=self._tokens,
            first_token_s=self._first_s,
            decode_s=self._last_s - self._first_s,
            average_bits=(now["bits"] - base["bits"]) / uses if uses else 0.0,
            peak_bytes=hardware.peak_bytes(),
            resident_bytes=now["resident_bytes"],
            kv_bytes=self._kv_bytes,
            scheduler=experts.scheduler.report(),
            logits_hash="" if self._row is None else f"{_core.crc32c(self._row):08x}",
            **{
                k: now[k] - base[k]
                for k in ("hits", "misses", "evictions", "bytes_read", "read_s", "wait_s")
            },
        )

    def freeze(self) -> None:
        """Keeps the last figures when the counters go."""
        self._frozen = self.stats()
        self._experts = None


def _choices(experts: Experts) -> tuple[int, int, int]:
    """Returns what routers chose, what was skipped of it and what another expert ran for, since the start."""
    return experts.routed, experts.skipped, experts.scheduler.substituted

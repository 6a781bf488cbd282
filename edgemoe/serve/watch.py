"""The stream of events behind the page: memory, the experts in it, reads, and running and waiting requests.

The first event has the whole state; later ones, up to four a second, have what has changed. The cost of a viewer is
bounded, and without viewers there is none.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from sse_starlette.sse import EventSourceResponse
from starlette.responses import Response

import edgemoe
from edgemoe import hardware
from edgemoe.scheduler import SCHEDULERS
from edgemoe.serve.problems import Problem
from edgemoe.serve.service import Service

__all__ = ["Watch", "set_now"]

_PAUSE = 0.25  # seconds
_MOST_VIEWERS = 8
_READ, _RAN, _LACKED = 16, 32, 64  # flags of an expert's byte, above its bits (0 to 8)


class Watch:
    """The source of /events for all viewers. Used on the event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._viewers = 0

    def response(self) -> Response:
        """Returns a stream for one more viewer.

        Raises:
            Problem: there are too many viewers.
        """
        if self._viewers >= _MOST_VIEWERS:
            raise Problem(429, f"{_MOST_VIEWERS} pages look already", retry_after=10)
        return EventSourceResponse(self._events(), sep="\n", headers={"Cache-Control": "no-cache"})

    async def _events(self) -> AsyncIterator[bytes]:
        service = self._service
        self._viewers += 1
        try:
            view = _Experts(service)
            log = service.log.count
            yield _event(
                "all", {**everything(service), "map": view.whole(), "log": service.log.since(0)}
            )
            before, options = None, service.model.options
            while not service.is_stopping and service.worker.error is None:
                await asyncio.sleep(_PAUSE)
                now = _figures(service)
                what = {**now, **view.changed()}
                if service.model.options is not options:
                    options = service.model.options
                    yield _event("set", set_now(service))
                if service.log.count != log:
                    what["log"], log = service.log.since(log), service.log.count
                if what == before:  # nothing has changed since the last event
                    continue
                before = now
                yield _event("now", what)
        finally:
            self._viewers -= 1


class _Experts:
    """The bits of each expert in memory, and the counts of its uses, as one viewer has seen them last."""

    def __init__(self, service: Service) -> None:
        store, moe = service.model.store, service.model.moe
        self._store = store
        self._bits = np.array([0, *store.level_bits], np.uint8)
        self._have = moe.expert_bits.reshape(-1).astype(np.uint8)
        self._seen = self._resident()
        self._counts = self._counted()

    def _counted(self) -> tuple[NDArray[np.uint32], ...]:
        """Returns how often each expert was read, how often it ran, and how often it missed, [layers * E] each."""
        store = self._store
        return store.reads.flatten(), store.runs.flatten(), store.lacks.flatten()

    def _resident(self) -> NDArray[np.uint8]:
        """Returns the bits of each expert that are in memory now, [layers * E]."""
        return np.minimum(self._bits[self._store.residency.reshape(-1)], self._have)

    def whole(self) -> str:
        """Returns the bits of all experts, a byte for each, in base64."""
        return _text(self._seen)

    def changed(self) -> dict[str, str]:
        """Returns what has changed since the last call; empty if nothing has.

        An expert's state is a byte: its bits, and flags for whether it was read, ran, or missed since the last call.
        "map" has the state of every expert; "cells" has a little-endian word for each expert that changed, its number
        times 256 plus its state. Both are in base64; the shorter one is sent.
        """
        bits, counts = self._resident(), self._counted()
        state = bits.copy()
        for flag, now, before in zip((_READ, _RAN, _LACKED), counts, self._counts, strict=True):
            state[now != before] |= flag
        changed = np.flatnonzero(state != self._seen)
        self._seen, self._counts = bits, counts
        if len(changed) == 0:
            return {}
        if 4 * len(changed) > len(state):
            return {"map": _text(state)}
        return {"cells": _text((changed.astype("<u4") << 8) | state[changed])}


def _text(array: NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _event(name: str, what: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: ".encode() + msgspec.json.encode(what) + b"\n\n"


def everything(service: Service) -> dict[str, Any]:
    """Returns what seldom or never changes, for the first event."""
    model, config = service.model, service.model.config
    return {
        "version": edgemoe.__version__, "name": service.names[0], "family": config.family,
        "layers": len(config.moe_layers), "experts": model.moe.places,  # including those of adapters
        "context": service.context, "isa": hardware.isa(), "threads": model.threads,
        "level_bits": model.store.level_bits, "file_bytes": model.moe.file_bytes,
        "dense_bits": model.options.dense_bits or model.moe.dense_ladder[-1],
        "kv_types": [model.options.cache_type_k, model.options.cache_type_v],
        "tools": service.reading.name, "can_reason": service.can_reason,
        "can_form": service.grammars is not None,
        "sampling": dataclasses.asdict(service.sampling),
        "most": {"bits": model.most_bits, "experts": model.most_experts}, "schedulers": list(SCHEDULERS),
        **set_now(service),
    }  # fmt: skip


def set_now(service: Service) -> dict[str, Any]:
    """Returns what can be changed while the model runs, and what depends on it."""
    model = service.model
    now = {
        "bits": model.bits, "is_auto": model.options.bits == "auto",
        "experts": model.config.experts_per_token, "scheduler": model.options.scheduler,
        "options": {name: str(value) for name, value in model.options.options.items()},
    }  # fmt: skip
    return {
        "set": now, "notes": model.notes, "fingerprint": service.fingerprint, "budget": _budget(service),
    }  # fmt: skip


def _budget(service: Service) -> dict[str, int]:
    """Returns the division of the memory, in bytes."""
    model = service.model
    b, every = model.budget, np.arange(len(model.top_bits), dtype=np.int32)
    return {
        "ram": b.ram + service.settings.reserved, "server": service.settings.reserved,
        "process": b.process, "growth": b.growth, "tables": b.tables, "dense": b.dense, "kv": b.kv,
        "scratch": b.scratch, "experts": int(model.store.sizes(every, model.top_bits).sum()),
    }  # fmt: skip


def _figures(service: Service) -> dict[str, Any]:
    """Returns the present figures; those under "count" are totals since the start."""
    model, batcher = service.model, service.batcher
    s, views = model.store.stats, batcher.views
    budget = model.budget
    return {
        "count": {
            "made": batcher.made, "computed": batcher.computed, "hits": s["hits"], "misses": s["misses"],
            "read": s["bytes_read"], "wait_s": round(float(s["wait_s"]), 3), "bits": s["bits"],
        },
        "rss": hardware.process_bytes(), "slots": model.room.size, "resident": s["resident_bytes"],
        "residents": s["resident_experts"], "waiting": batcher.waiting,
        "kv": sum(budget.kv_at_once + budget.kv_bytes(v.length) for v in views),
        "busy": [[v.length, int(v.is_busy), v.prompt, v.made] for v in views],
    }  # fmt: skip

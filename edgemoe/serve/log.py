"""The log of the last requests for the operator: their routes and figures, and none of their texts."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from edgemoe.runtime.requests import Outcome

__all__ = ["Asked", "RequestLog", "asked_now"]

_MOST = 200


@dataclass(slots=True)
class Asked:
    """A request that is being answered."""

    route: str = ""
    is_logged: bool = False
    """Whether it will be logged when its reply ends, and so need not be when it fails."""
    status: int = 0
    """The status of an answer that is an error."""
    held: int = 0
    """Bytes that it has of the budget until its answer has ended; see `Desk.read`."""
    entries: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_MOST))
    """What the log has of its replies."""


asked_now: ContextVar[Asked | None] = ContextVar("asked_now", default=None)
"""The request that is being answered."""


class RequestLog:
    """The last 200 requests. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: deque[tuple[int, dict[str, Any]]] = deque(maxlen=_MOST)
        self.count = 0
        """How many requests were logged in all."""

    def failed(self, asked: Asked, route: str, status: int) -> None:
        """Logs that a request was answered with an error: in the entries of its replies, if it has any."""
        with self._lock:
            asked.status = status
            for entry in asked.entries:
                entry["status"] = status
            if not asked.is_logged:
                self._add({"at": time.time(), "route": route, "status": status})

    def reply(self, asked: Asked, outcome: Outcome, ignored: list[str]) -> None:
        """Logs a reply that has ended, before or after an answer to its request has begun."""
        f = outcome.figures
        entry = {
            "at": time.time(), "route": asked.route, "status": 500 if outcome.reason == "error" else 200,
            "end": outcome.reason, "prompt": f.prompt_tokens, "cached": f.cached_tokens, "made": f.new_tokens,
            "queue_s": f.queue_s, "prompt_s": f.prompt_s, "decode_s": f.decode_s, "hits": f.hits,
            "misses": f.misses, "read": f.bytes_read, "bits": round(f.average_bits, 2), "hash": f.logits_hash,
            "ignored": ignored,
        }  # fmt: skip
        with self._lock:
            entry["status"] = asked.status or entry["status"]
            asked.entries.append(entry)
            self._add(entry)

    def _add(self, entry: dict[str, Any]) -> None:
        self._entries.append((self.count, entry))
        self.count += 1

    def since(self, count: int) -> list[dict[str, Any]]:
        """Returns the requests after the first `count` of all, oldest first, as far as they are kept."""
        with self._lock:
            return [entry for number, entry in self._entries if number >= count]

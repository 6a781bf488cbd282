"""Actions on a sequence, as llama.cpp's /slots has them: save under a name, restore, erase."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec

from edgemoe.errors import EdgemoeError, OutOfBudget
from edgemoe.model import SequenceState
from edgemoe.serve import fields
from edgemoe.serve.problems import Problem, wrong
from edgemoe.serve.service import Service

__all__ = ["ACTIONS", "Named", "act"]

ACTIONS = ("save", "restore", "erase")


class Named(msgspec.Struct):
    """The body of a save or restore."""

    filename: str


async def act(service: Service, slot: int, action: str, body: bytes) -> dict[str, Any]:
    """Performs an action on a sequence, once no request has it; returns what was done.

    Args:
        service: the server's model.
        slot: the number of the sequence.
        action: "save", "restore" or "erase".
        body: a `Named`, except for "erase".

    Raises:
        Problem: there is no such sequence or action, the server has no folder for prefixes, or the action failed.
    """
    if service.store is None:
        raise Problem(
            501, "sequences are saved, restored and erased only with --slot-save-path DIR"
        )
    if not 0 <= slot < len(service.batcher.views):
        raise wrong("id_slot", f"expected 0 to {len(service.batcher.views) - 1}, got {slot}")
    if action not in ACTIONS:
        raise wrong("action", f"expected one of {', '.join(ACTIONS)}, got {action!r:.80}")
    if action == "erase":
        return {"id_slot": slot, "n_erased": await _with(service, slot, _erase)}
    named, ignored = fields.read(body, Named)
    service.note(ignored)
    name = named.filename
    store, start = service.store, time.perf_counter()

    def save(state: SequenceState) -> tuple[int, int]:
        if not state.length:
            raise ValueError(f"sequence {slot} holds no conversation to save")
        return state.length, store.save_as(state, name)

    def restore(state: SequenceState) -> tuple[int, int]:
        size = store.restore_from(state, name)
        return state.length, size

    tokens, size = await _with(service, slot, save if action == "save" else restore)
    count, moved = ("n_saved", "n_written") if action == "save" else ("n_restored", "n_read")
    took = {f"{action}_ms": 1000 * (time.perf_counter() - start)}
    return {"id_slot": slot, "filename": name, count: tokens, moved: size, "timings": took}


def _erase(state: SequenceState) -> int:
    count = state.length
    state.rewind(0)
    return count


async def _with(service: Service, slot: int, use: Callable[[SequenceState], Any]) -> Any:
    try:
        return await asyncio.wrap_future(service.batcher.with_slot(slot, use))
    except OutOfBudget as error:
        raise Problem(503, str(error)) from None
    except EdgemoeError as error:
        raise Problem(400, f"filename: {error}", param="filename") from None
    except ValueError as error:
        raise wrong("filename", str(error)) from None
    except OSError as error:
        raise Problem(500, f"filename: {error.strerror}", param="filename") from None
    except RuntimeError as error:
        raise Problem(503, str(error)) from None

"""Bodies of requests: received within the budget and a time limit, and read one at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request

from edgemoe.errors import size_text
from edgemoe.serve import connections
from edgemoe.serve.log import asked_now
from edgemoe.serve.problems import Problem
from edgemoe.serve.service import Service

__all__ = ["body_of", "read_body"]

_T = TypeVar("_T")

_LARGEST_BODY = 16 << 20


async def body_of(
    request: Request, *, most: int, grow: Callable[[int], Awaitable[None]] | None = None,
    into: bytearray | None = None,
) -> bytes:  # fmt: skip
    """Returns a request's body.

    Args:
        request: the request.
        most: the most bytes.
        grow: makes room for so many bytes more, when they are about to come.
        into: where the body is stored, also as much of it as has come before an error.

    Raises:
        Problem: it is larger than `most` bytes, or no part of it came for `connections.PATIENCE` seconds.
    """
    too_large = Problem(413, f"body: expected at most {size_text(most)}")
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > most:  # without waiting for any of it
        raise too_large
    body = bytearray() if into is None else into
    room, whole = 0, int(said) if said.isdecimal() else most
    stream = request.stream()
    while True:
        try:
            part = await asyncio.wait_for(anext(stream), connections.PATIENCE)
        except StopAsyncIteration:
            return body  # type: ignore[return-value]  # not copied, as it may be large
        except asyncio.TimeoutError:
            raise Problem(408, f"body: nothing came for {connections.PATIENCE:g} s") from None
        if len(body) + len(part) > most:
            raise too_large
        if len(body) + len(part) > room and grow is not None:
            # Twice as much as before, so that few passes are waited for, but not more than there will be.
            more = max(min(room, whole - room), len(part))
            await grow(more)
            room += more
        body += part


async def read_body(service: Service, request: Request, read: Callable[[Service, bytes], _T]) -> _T:
    """Returns what `read` makes of a request's body; see `Desk.read`."""
    desk, held = service.desk, 0

    async def grow(size: int) -> None:
        nonlocal held
        await desk.hold(size, of=held + size)
        held += size

    body = bytearray()
    try:
        whole = await body_of(request, most=_LARGEST_BODY, grow=grow, into=body)
        desk.release(held - len(body))
        held = len(body)
        async with desk.line:
            return await asyncio.to_thread(desk.read, read, service, whole, asked_now.get())
    finally:
        # Its memory is given back: errors refer to it, and asyncio's cycles keep them for a while.
        with contextlib.suppress(BufferError):
            body.clear()
        desk.release(held)

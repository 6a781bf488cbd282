"""Changes how the model runs while it runs, for who may use the server."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import msgspec
from starlette.requests import Request

from edgemoe.runtime.change import CHANGEABLE
from edgemoe.serve import fields
from edgemoe.serve.problems import Problem, wrong
from edgemoe.serve.service import Service
from edgemoe.serve.watch import set_now

__all__ = ["change_settings"]


class _Change(msgspec.Struct):
    bits: int | Literal["auto"] | msgspec.UnsetType | None = msgspec.UNSET
    experts: int | msgspec.UnsetType | None = msgspec.UNSET
    scheduler: str | msgspec.UnsetType = msgspec.UNSET
    options: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


async def change_settings(service: Service, request: Request, body: bytes) -> dict[str, Any]:
    """Changes bits, experts per token, scheduler or its options for all, from the next pass on; returns what holds.

    Raises:
        Problem: a page from elsewhere asks, or something cannot be changed to this; nothing is then.
    """
    _check_origin(service, request)
    said, unknown = fields.read(body, _Change, is_strict=False)
    if unknown:
        raise wrong(
            unknown[0], f"cannot be changed while the model runs; expected {', '.join(CHANGEABLE)}"
        )
    wanted = {k: v for k, v in msgspec.structs.asdict(said).items() if v is not msgspec.UNSET}
    try:
        await asyncio.wrap_future(service.batcher.change(**wanted))
    except ValueError as error:
        name, _, rest = str(error).partition(": ")
        if name not in CHANGEABLE:  # of an option of the scheduler, or of the model as a whole
            name, rest = "options", str(error)
        raise wrong(name, rest) from None
    except RuntimeError as error:
        raise Problem(503, str(error)) from None
    return set_now(service)


def _check_origin(service: Service, request: Request) -> None:
    """Refuses what a page from elsewhere makes a browser send: it cannot read the answer, and needs not to."""
    origin = request.headers.get("origin")
    if origin is None or origin in service.settings.origins or "*" in service.settings.origins:
        return
    if origin.partition("://")[2] != request.headers.get("host"):
        raise Problem(403, f"Origin: {origin[:80]!r} is not this server; --cors-origins adds pages")

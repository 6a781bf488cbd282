"""The route that changes how the model runs, for all users of the server."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import msgspec
from starlette.requests import Request

from edgemoe.errors import OutOfBudget
from edgemoe.runtime.change import CHANGEABLE
from edgemoe.serve import fields
from edgemoe.serve.problems import Problem, wrong
from edgemoe.serve.service import Service
from edgemoe.serve.watch import set_now

__all__ = ["Change", "change_settings"]


class Change(msgspec.Struct):
    """The body of /settings."""

    bits: int | Literal["auto"] | msgspec.UnsetType | None = msgspec.UNSET
    experts: int | msgspec.UnsetType | None = msgspec.UNSET
    scheduler: str | msgspec.UnsetType = msgspec.UNSET
    options: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


async def change_settings(service: Service, request: Request, body: bytes) -> dict[str, Any]:
    """Changes bits, experts per token, the scheduler or its options, from the next pass on.

    Returns:
        The settings that hold now; see `set_now`.

    Raises:
        Problem: the request comes from another web page, or a value is not possible; then nothing has changed.
    """
    _check_origin(service, request)
    said, unknown = fields.read(body, Change)
    if unknown:
        raise wrong(
            unknown[0], f"cannot be changed while the model runs; expected {', '.join(CHANGEABLE)}"
        )
    wanted = {k: v for k, v in msgspec.structs.asdict(said).items() if v is not msgspec.UNSET}
    try:
        await asyncio.wrap_future(service.batcher.change(**wanted))
    except ValueError as error:
        name, _, rest = str(error).partition(": ")
        if name not in CHANGEABLE:  # it names an option of the scheduler, or the model as a whole
            name, rest = "options", str(error)
        raise wrong(name, rest) from None
    except (OutOfBudget, RuntimeError) as error:
        raise Problem(503, str(error)) from None
    return set_now(service)


def _check_origin(service: Service, request: Request) -> None:
    """Refuses requests that a browser sends for another web page.

    Such a page could not read the answer, but the change would take effect all the same.

    Raises:
        Problem: the Origin header is neither this server's nor one of `Settings.origins`.
    """
    origin = request.headers.get("origin")
    if origin is None or origin in service.settings.origins or "*" in service.settings.origins:
        return
    if origin.partition("://")[2] != request.headers.get("host"):
        raise Problem(403, f"Origin: {origin[:80]!r} is not this server; --cors-origins adds pages")

"""What every request passes before its route: checks of the host name, of its room and of the key."""

from __future__ import annotations

import hmac
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from edgemoe.serve.http_responses import problem_response
from edgemoe.serve.log import Asked, asked_now
from edgemoe.serve.problems import Problem
from edgemoe.serve.service import Service

__all__ = ["Door", "Key"]

_FREE = ("/health", "/v1/health", "/")


class Door:
    """The outermost middleware: refuses requests for another host name and those without room, and counts all.

    It also adds security headers to every response.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Asked(scope["path"])

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                found = getattr(scope.get("route"), "path", "other")
                self._service.figures.request(str(found), message["status"])
                if message["status"] >= 400:
                    self._service.log.failed(asked, str(found), message["status"])
                message["headers"] = [*message["headers"], *_HEADERS]
            elif message.get("body") and not message.get("more_body"):
                # Its end waits until the client has taken nearly all of it: until then, it has its memory.
                await send({**message, "more_body": True})
                message = {"type": "http.response.body"}
            await send(message)

        try:
            try:
                await self._enter(scope, asked)
            except Problem as problem:
                await problem_response(problem, asked.route)(scope, receive, counted)
            else:
                asked_now.set(asked)
                await self._app(scope, receive, counted)
        finally:
            self._service.desk.release(asked.held)

    async def _enter(self, scope: Scope, asked: Asked) -> None:
        """Raises `Problem` if the request is for another host name, or there is no room for it."""
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if not self._service.settings.takes_host(host):
            text = f"Host: this server is not {host[:80]!r}; --allowed-hosts adds names"
            raise Problem(403, text)
        if scope["path"] not in _FREE:
            await self._service.desk.admit(asked)


_HEADERS = (
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    ),
)  # fmt: skip


class Key:
    """The middleware that refuses requests without a valid key."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._keys = app, [k.encode() for k in service.settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and not _is_free(scope["path"]):
            headers = dict(scope["headers"])
            given = headers.get(b"x-api-key", b"")
            bearer = headers.get(b"authorization", b"")
            if bearer[:7].lower() == b"bearer ":
                given = bearer[7:].strip() or given
            # All keys are compared, each in constant time, so that timing tells nothing about them.
            if not sum(hmac.compare_digest(given, key) for key in self._keys):
                problem = Problem(
                    401,
                    "a key is needed: Authorization: Bearer KEY, or x-api-key",
                    code="invalid_api_key",
                )
                await problem_response(problem, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_free(path: str) -> bool:
    """Returns whether a path needs no key, as it reveals nothing about the model or its users."""
    return path in _FREE or path.startswith("/page/")

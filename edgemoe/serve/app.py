"""The routes, and what every request passes before them: checks of the host name and of the key."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from edgemoe.errors import shortened, size_text
from edgemoe.serve import about, connections, messages, openai, responses
from edgemoe.serve.actions import act
from edgemoe.serve.answers import Answer
from edgemoe.serve.completions import ChatAnswer, TextAnswer
from edgemoe.serve.files import page_file
from edgemoe.serve.log import Asked, asked_now
from edgemoe.serve.openapi import description
from edgemoe.serve.problems import Problem
from edgemoe.serve.service import Service
from edgemoe.serve.shelf import Shelf
from edgemoe.serve.steering import change_settings
from edgemoe.serve.watch import Watch

__all__ = ["make_app"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_LARGEST_BODY = 16 << 20
_LARGEST_ORDER = 64 << 10  # of a body that is read on the event loop
_FREE = ("/health", "/v1/health", "/")


def make_app(service: Service) -> Starlette:
    """Returns the application."""

    def post(path: str, handle: Callable[[Service, Request], Awaitable[Response]]) -> Route:
        async def handler(request: Request) -> Response:
            return await handle(service, request)

        return Route(path, handler, methods=["POST"])

    def get(path: str, tell: Callable[[Service], Response]) -> Route:
        async def handler(request: Request) -> Response:
            return tell(service)

        return Route(path, handler, methods=["GET"])

    watch, shelf = Watch(service), Shelf(service.model)

    async def root(request: Request) -> Response:
        return about.root(service, request)

    async def page(request: Request) -> Response:
        return page_file(request, request.path_params["name"])

    async def settings(request: Request) -> Response:
        return _json(
            await change_settings(service, request, await body_of(request, most=_LARGEST_ORDER))
        )

    async def events(request: Request) -> Response:
        return watch.response()

    async def shelved(request: Request) -> Response:
        return _json(await shelf.told())

    routes = [
        Route("/", root, methods=["GET"]), get("/health", about.health), get("/v1/health", about.health),
        get("/v1/models", about.models), get("/models", about.models), get("/props", about.props),
        get("/slots", about.slots), get("/metrics", about.metrics),
        get("/openapi.json", _description),
        post("/v1/chat/completions", _chat), post("/chat/completions", _chat),
        post("/v1/completions", _completion), post("/completions", _completion),
        post("/v1/messages", _messages), post("/v1/messages/count_tokens", _count),
        post("/v1/responses", _responses), post("/responses", _responses),
        post("/v1/embeddings", _no_embeddings), post("/embeddings", _no_embeddings),
        post("/tokenize", _tokenize), post("/detokenize", _detokenize),
        post("/apply-template", _apply_template), post("/slots/{slot:int}", _act),
    ]  # fmt: skip
    if service.settings.has_page:
        routes += [
            Route("/page/{name:path}", page, methods=["GET"]), Route("/events", events, methods=["GET"]),
            Route("/settings", settings, methods=["POST"]), Route("/shelf", shelved, methods=["GET"]),
        ]  # fmt: skip
    middleware = [Middleware(_Door, service=service)]
    if origins := list(service.settings.origins):
        methods, headers = ["GET", "POST"], ["*"]
        middleware.append(
            Middleware(
                CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=headers
            )
        )
    middleware.append(Middleware(_Key, service=service))
    handlers: dict[Any, Any] = {
        Problem: _problem, HTTPException: _http_problem, Exception: _server_problem,
        ClientDisconnect: _gone, RecursionError: _too_deep,
    }  # fmt: skip
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.state.service = service
    return app


class _Door:
    """The outermost middleware: refuses requests for another host name than this server's, and counts all requests.

    It also adds security headers to every response.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        asked = Asked(scope["path"])

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                found = getattr(scope.get("route"), "path", "other")
                self._service.figures.request(str(found), message["status"])
                if message["status"] >= 400:
                    self._service.log.failed(asked, str(found), message["status"])
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        if not self._service.settings.takes_host(host):
            problem = Problem(
                403, f"Host: this server is not {host[:80]!r}; --allowed-hosts adds names"
            )
            await _said(problem, asked.route)(scope, receive, counted)
            return
        asked_now.set(asked)
        try:
            await self._app(scope, receive, counted)
        finally:
            self._service.desk.release(asked.held)


_HEADERS = (
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    ),
)  # fmt: skip


class _Key:
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
                await _said(problem, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_free(path: str) -> bool:
    """Returns whether a path needs no key, as it reveals nothing about the model or its users."""
    return path in _FREE or path.startswith("/page/")


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _said(problem: Problem, path: str) -> Response:
    response = _json(problem.body(is_messages=path.startswith("/v1/messages")), problem.status)
    if problem.retry_after is not None:
        response.headers["Retry-After"] = str(problem.retry_after)
    return response


def _problem(request: Request, error: Problem) -> Response:
    return _said(error, request.url.path)


def _http_problem(request: Request, error: HTTPException) -> Response:
    path = shortened(request.url.path)
    what = {404: f"there is no {path}", 405: f"{request.method} is not for {path}"}
    problem = Problem(error.status_code, what.get(error.status_code, str(error.detail)))
    response = _said(problem, request.url.path)
    response.headers.update(error.headers or {})
    return response


def _server_problem(request: Request, error: Exception) -> Response:
    logger.error("%s: %s: %s", request.url.path, type(error).__name__, error, exc_info=error)
    return _said(Problem(500, "the server failed at this request"), request.url.path)


def _too_deep(request: Request, error: RecursionError) -> Response:
    return _said(Problem(400, "body: nested too deeply"), request.url.path)


def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)  # nobody reads it


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


async def answered(
    service: Service, request: Request, answer: Answer, *, streams: bool
) -> Response:
    """Returns an answer as a response. It is cancelled if the client leaves, or after `Settings.timeout` seconds.

    Raises:
        Problem: a reply failed.
        ClientDisconnect: the client has left.
    """
    limit = asyncio.get_running_loop().call_later(service.settings.timeout, answer.cancel)
    if streams:
        return _streamed(service, answer, limit)
    work = asyncio.ensure_future(answer.whole())
    gone = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return _json(work.result())
    finally:
        limit.cancel()
        answer.cancel()
        work.cancel()
        gone.cancel()


async def _left(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _streamed(service: Service, answer: Answer, limit: asyncio.TimerHandle) -> Response:
    settings = service.settings

    async def gone(_: object) -> None:
        answer.cancel()  # `body` does that too, but only if the stream has begun

    async def body() -> AsyncIterator[bytes]:
        events = answer.events()
        try:
            yield answer.comment()
            async for event in events:
                yield event
        except Problem as problem:
            yield answer.failure(problem)
        finally:
            limit.cancel()
            answer.cancel()

    return EventSourceResponse(
        body(), ping=settings.ping, ping_message_factory=lambda: answer.ping(), sep="\n",  # type: ignore[arg-type,return-value]
        headers={"Cache-Control": "no-cache"}, shutdown_grace_period=settings.grace,
        client_close_handler_callable=gone,
    )  # fmt: skip


async def _read(service: Service, request: Request, read: Callable[[Service, bytes], _T]) -> _T:
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


async def _chat(service: Service, request: Request) -> Response:
    said, ask = await _read(service, request, openai.read_chat)
    service.note(ask.ignored)
    answer = ChatAnswer(service, said, [ask])
    return await answered(service, request, answer, streams=bool(said.stream))


async def _completion(service: Service, request: Request) -> Response:
    said, asks = await _read(service, request, openai.read_completion)
    service.note(asks[0].ignored)
    answer = TextAnswer(service, said, asks)
    return await answered(service, request, answer, streams=bool(said.stream))


async def _messages(service: Service, request: Request) -> Response:
    said, ask = await _read(service, request, messages.read_messages)
    if "anthropic-beta" in request.headers:
        ask.ignored.append("anthropic-beta")
    service.note(ask.ignored)
    answer = messages.MessagesAnswer(service, said, ask)
    return await answered(service, request, answer, streams=bool(said.stream))


async def _count(service: Service, request: Request) -> Response:
    if "anthropic-beta" in request.headers:
        service.note(["anthropic-beta"])
    return _json(await _read(service, request, messages.count))


async def _responses(service: Service, request: Request) -> Response:
    said, ask = await _read(service, request, responses.read_responses)
    service.note(ask.ignored)
    answer = responses.ResponsesAnswer(service, said, ask)
    return await answered(service, request, answer, streams=bool(said.stream))


async def _no_embeddings(service: Service, request: Request) -> Response:
    raise Problem(501, "this model makes no embeddings")


async def _act(service: Service, request: Request) -> Response:
    slot, action = request.path_params["slot"], request.query_params.get("action", "")
    return _json(await act(service, slot, action, await body_of(request, most=_LARGEST_ORDER)))


def _description(service: Service) -> Response:
    settings = service.settings
    lacks: tuple[str, ...] = () if settings.has_page else ("/events", "/shelf", "/settings")
    lacks += () if settings.has_metrics else ("/metrics",)
    lacks += () if settings.prefixes is not None else ("/slots/{slot}",)
    return Response(description(*lacks), media_type="application/json")


async def _tokenize(service: Service, request: Request) -> Response:
    return _json(await _read(service, request, about.tokenize))


async def _detokenize(service: Service, request: Request) -> Response:
    return _json(await _read(service, request, about.detokenize))


async def _apply_template(service: Service, request: Request) -> Response:
    return _json(await _read(service, request, about.apply_template))

"""HTTP responses: of values, of problems, and of answers, whole or as a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from sse_starlette.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from edgemoe.errors import shortened
from edgemoe.serve.answers import Answer
from edgemoe.serve.problems import Problem
from edgemoe.serve.service import Service

__all__ = ["HANDLERS", "answered", "json_response", "problem_response"]

logger = logging.getLogger(__name__)


def json_response(value: object, status: int = 200) -> Response:
    """Returns a value as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def problem_response(problem: Problem, path: str) -> Response:
    """Returns a problem in the format of the dialect that a path belongs to."""
    response = json_response(
        problem.body(is_messages=path.startswith("/v1/messages")), problem.status
    )
    if problem.retry_after is not None:
        response.headers["Retry-After"] = str(problem.retry_after)
    return response


def _problem(request: Request, error: Problem) -> Response:
    return problem_response(error, request.url.path)


def _http_problem(request: Request, error: HTTPException) -> Response:
    path = shortened(request.url.path)
    what = {404: f"there is no {path}", 405: f"{request.method} is not for {path}"}
    problem = Problem(error.status_code, what.get(error.status_code, str(error.detail)))
    response = problem_response(problem, request.url.path)
    response.headers.update(error.headers or {})
    return response


def _server_problem(request: Request, error: Exception) -> Response:
    logger.error("%s: %s: %s", request.url.path, type(error).__name__, error, exc_info=error)
    return problem_response(Problem(500, "the server failed at this request"), request.url.path)


def _too_deep(request: Request, error: RecursionError) -> Response:
    return problem_response(Problem(400, "body: nested too deeply"), request.url.path)


def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)  # nobody reads it


HANDLERS: dict[Any, Any] = {
    Problem: _problem, HTTPException: _http_problem, Exception: _server_problem,
    ClientDisconnect: _gone, RecursionError: _too_deep,
}  # fmt: skip
"""Makes the response to an exception, by its type."""


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
        return json_response(work.result())
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

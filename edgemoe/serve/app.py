"""The routes: which path has which handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgemoe.serve import about, messages, openai, responses
from edgemoe.serve.actions import act
from edgemoe.serve.bodies import body_of, read_body
from edgemoe.serve.completions import ChatAnswer, TextAnswer
from edgemoe.serve.files import page_file
from edgemoe.serve.http_responses import HANDLERS, answered, json_response
from edgemoe.serve.middleware import Door, Key
from edgemoe.serve.openapi import description
from edgemoe.serve.problems import Problem
from edgemoe.serve.service import Service
from edgemoe.serve.shelf import Shelf
from edgemoe.serve.steering import change_settings
from edgemoe.serve.watch import Watch

__all__ = ["make_app"]

_LARGEST_ORDER = 64 << 10  # of a body that is read on the event loop


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
        return json_response(
            await change_settings(service, request, await body_of(request, most=_LARGEST_ORDER))
        )

    async def events(request: Request) -> Response:
        return watch.response()

    async def shelved(request: Request) -> Response:
        return json_response(await shelf.told())

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
    middleware = [Middleware(Door, service=service)]
    if origins := list(service.settings.origins):
        methods, headers = ["GET", "POST"], ["*"]
        middleware.append(
            Middleware(
                CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=headers
            )
        )
    middleware.append(Middleware(Key, service=service))
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=HANDLERS)
    app.state.service = service
    return app


async def _chat(service: Service, request: Request) -> Response:
    said, ask = await read_body(service, request, openai.read_chat)
    service.note(ask.ignored)
    answer = ChatAnswer(service, said, [ask])
    return await answered(service, request, answer, streams=bool(said.stream))


async def _completion(service: Service, request: Request) -> Response:
    said, asks = await read_body(service, request, openai.read_completion)
    service.note(asks[0].ignored)
    answer = TextAnswer(service, said, asks)
    return await answered(service, request, answer, streams=bool(said.stream))


async def _messages(service: Service, request: Request) -> Response:
    said, ask = await read_body(service, request, messages.read_messages)
    if "anthropic-beta" in request.headers:
        ask.ignored.append("anthropic-beta")
    service.note(ask.ignored)
    answer = messages.MessagesAnswer(service, said, ask)
    return await answered(service, request, answer, streams=bool(said.stream))


async def _count(service: Service, request: Request) -> Response:
    if "anthropic-beta" in request.headers:
        service.note(["anthropic-beta"])
    return json_response(await read_body(service, request, messages.count))


async def _responses(service: Service, request: Request) -> Response:
    said, ask = await read_body(service, request, responses.read_responses)
    service.note(ask.ignored)
    answer = responses.ResponsesAnswer(service, said, ask)
    return await answered(service, request, answer, streams=bool(said.stream))


async def _no_embeddings(service: Service, request: Request) -> Response:
    raise Problem(501, "this model makes no embeddings")


async def _act(service: Service, request: Request) -> Response:
    slot, action = request.path_params["slot"], request.query_params.get("action", "")
    return json_response(
        await act(service, slot, action, await body_of(request, most=_LARGEST_ORDER))
    )


def _description(service: Service) -> Response:
    settings = service.settings
    lacks: tuple[str, ...] = () if settings.has_page else ("/events", "/shelf", "/settings")
    lacks += () if settings.has_metrics else ("/metrics",)
    lacks += () if settings.prefixes is not None else ("/slots/{slot}",)
    return Response(description(*lacks), media_type="application/json")


async def _tokenize(service: Service, request: Request) -> Response:
    return json_response(await read_body(service, request, about.tokenize))


async def _detokenize(service: Service, request: Request) -> Response:
    return json_response(await read_body(service, request, about.detokenize))


async def _apply_template(service: Service, request: Request) -> Response:
    return json_response(await read_body(service, request, about.apply_template))

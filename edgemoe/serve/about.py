"""Routes that describe the server and its model, and those of its tokenizer and chat template."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

import edgemoe
from edgemoe import hardware
from edgemoe.serve import fields
from edgemoe.serve.files import page_file
from edgemoe.serve.http_responses import json_response
from edgemoe.serve.preparing import encoded, rendered
from edgemoe.serve.problems import Problem
from edgemoe.serve.prompts import Conversation
from edgemoe.serve.service import Service

__all__ = [
    "Detokenize", "Template", "Tokenize", "apply_template", "detokenize", "health", "metrics", "models",
    "props", "root", "slots", "tokenize",
]  # fmt: skip

_TOKEN_BYTES = 256  # that decoding may take for each token
_PIECE_BYTES = 512  # that a token with its text takes, as an object and as JSON


def root(service: Service, request: Request) -> Response:
    """Returns the page to a browser, and name and version to other clients, some of which ask for / first."""
    if service.settings.has_page and "text/html" in request.headers.get("accept", ""):
        return page_file(request, "index.html")
    return PlainTextResponse(f"edgemoe {edgemoe.__version__}\n")


def health(service: Service) -> Response:
    """Returns whether the server can answer requests."""
    if service.worker.error is not None:
        return json_response({"status": "error"}, 500)
    if service.is_stopping:
        return json_response({"status": "stopping"}, 503)
    return json_response({"status": "ok"})


def models(service: Service) -> Response:
    """Lists the model under each of its names, and with each of its adapters."""
    model, config = service.model, service.model.config
    capabilities = ["completion", "chat", "tools"] + ["reasoning"] * service.can_reason
    capabilities += ["grammar"] * (service.grammars is not None)
    meta = {
        "n_ctx": service.context, "n_ctx_train": config.context_length, "n_vocab": config.vocab_size,
        "n_params": _parameters(service), "family": config.family, "bits": model.bits,
        "size": model.moe.file_bytes,
        "capabilities": capabilities,
    }  # fmt: skip
    data = [
        {
            "id": name, "object": "model", "created": service.started, "owned_by": "edgemoe",
            "context_length": service.context, "max_model_len": service.context, "meta": meta,
        }
        for name in service.names
    ]  # fmt: skip
    every = range(1, len(model.adapters.names) + 1)
    data += [
        {**data[0], "id": service.shown(adapter), "parent": service.names[0]} for adapter in every
    ]
    return json_response({"object": "list", "data": data})


def _parameters(service: Service) -> int:
    """Returns the number of parameters of the model."""
    moe = service.model.moe
    each = sum(rows * columns for rows, columns in moe.config.expert_shapes)
    dense = [t.spec.shape for name, t in moe.tensors.items() if not name.startswith("rope")]
    return len(moe.config.moe_layers) * moe.config.num_experts * each + sum(map(math.prod, dense))


def props(service: Service) -> Response:
    """Returns how the model runs: what llama.cpp's /props has, and more under "edgemoe"."""
    model, budget = service.model, service.model.budget
    source = service.tokenizer.chat_template
    return json_response({
        "default_generation_settings": {"n_ctx": service.context, "params": dataclasses.asdict(service.sampling)},
        "total_slots": len(service.batcher.views), "model_path": service.names[0],
        "model_alias": service.names[0], "chat_template": source,
        "chat_template_caps": {
            "supports_tools": service.speaks_of_tools, "supports_tool_calls": service.speaks_of_tools,
            "supports_parallel_tool_calls": service.speaks_of_tools,
        },
        "build_info": f"edgemoe {edgemoe.__version__}", "is_sleeping": model.room.is_resting,
        "modalities": {"vision": False, "audio": False},
        "edgemoe": {
            "bits": model.bits, "scheduler": model.options.scheduler, "notes": model.notes,
            "isa": hardware.isa(), "threads": model.threads, "tool_format": service.reading.name,
            "system_fingerprint": service.fingerprint,
            "budget": {
                **dataclasses.asdict(budget), "fixed": budget.fixed, "slots": budget.slots,
                "most_slots": budget.most_slots, "slots_now": model.room.size,
            },
            "prefixes": {
                place: {"count": count, "bytes": size, "most": most}
                for place, (count, size, most) in _kept(service).items()
            },
        },
    })  # fmt: skip


def _kept(service: Service) -> dict[str, tuple[int, int, int]]:
    """Returns what is kept of prefixes, by place: their number, their bytes, and the most bytes allowed."""
    settings = service.settings
    places = {
        "memory": (service.pool, settings.pool_bytes),
        "disk": (service.store, settings.prefix_bytes),
    }
    return {
        place: (len(where), where.size, most) if where is not None else (0, 0, 0)
        for place, (where, most) in places.items()
    }


def slots(service: Service) -> Response:
    """Returns what each sequence is doing."""
    return json_response([
        {
            "id": i, "n_ctx": service.context, "is_processing": view.is_busy, "n_held": view.length,
            "n_prompt": view.prompt, "n_decoded": view.made, "waiting": service.batcher.waiting,
        }
        for i, view in enumerate(service.batcher.views)
    ])  # fmt: skip


def metrics(service: Service) -> Response:
    """Returns all figures in the format of Prometheus.

    Raises:
        Problem: the server runs without --metrics.
    """
    if not service.settings.has_metrics:
        raise Problem(404, "there is no /metrics without --metrics")
    return PlainTextResponse(
        service.figures.text(service.model, service.batcher, _kept(service)),
        media_type="text/plain; version=0.0.4",
    )


class Tokenize(msgspec.Struct):
    """The body of /tokenize."""

    content: str
    add_special: bool = False
    with_pieces: bool = False


class Detokenize(msgspec.Struct):
    """The body of /detokenize."""

    tokens: list[int]


class Template(msgspec.Struct):
    """The body of /apply-template."""

    tool_form: ClassVar = fields.CHAT_TOOLS
    message_fields: ClassVar = fields.CHAT_MESSAGES

    messages: list[dict[str, Any]]
    tools: list[fields.Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def tokenize(service: Service, body: bytes) -> dict[str, Any]:
    """Returns the tokens of a text."""
    said, ignored = fields.read(body, Tokenize)
    service.note(ignored)
    special = said.add_special
    ids = encoded(service, said.content, "content", add_special=special, may_be_empty=True)
    if not said.with_pieces:
        return {"tokens": ids}
    service.desk.need(_PIECE_BYTES * len(ids))
    return {"tokens": [{"id": i, "piece": service.tokenizer.token_text(i)} for i in ids]}


def detokenize(service: Service, body: bytes) -> dict[str, Any]:
    """Returns the text of tokens."""
    said, ignored = fields.read(body, Detokenize)
    service.note(ignored)
    size = service.model.config.vocab_size
    if not all(0 <= i < size for i in said.tokens):
        raise Problem(400, f"tokens: expected 0 to {size - 1}", param="tokens")
    service.desk.need(_TOKEN_BYTES * len(said.tokens))
    return {"content": service.tokenizer.decode(said.tokens, skip_special=False)}


def apply_template(service: Service, body: bytes) -> dict[str, Any]:
    """Returns the prompt of a conversation."""
    said, ignored = fields.read(body, Template)
    talk = Conversation(said.messages, fields.functions(said.tools, ignored))
    service.note(ignored)
    return {"prompt": rendered(service, talk, said.chat_template_kwargs or {}, [])}

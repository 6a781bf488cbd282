"""What programs without a client here send, replayed whole: everything in it is honoured or reported."""

from __future__ import annotations

import json

import httpx2 as httpx
import pytest
from bodies import CLAUDE, CODEX, GUIDELLM, LM_EVAL, OPENCODE, TITLE
from served import running
from tiny import tiny_checkpoint

from edgemoe.convert.convert import convert


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    checkpoint = tiny_checkpoint()
    checkpoint.config["max_position_embeddings"] = 4096
    path = tmp_path_factory.mktemp("roomy") / "roomy.moe"
    convert(checkpoint, path)
    with running(path) as found:
        yield found


def sent(server, path, body, **headers):
    """Returns the events of a stream, or the whole answer."""
    url = f"{server.url}{path}"
    with httpx.stream("POST", url, json=body, timeout=60, headers=headers) as done:
        text = "".join(done.iter_text())
    assert done.status_code == 200, text
    if not body.get("stream"):
        return json.loads(text)
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_an_agent_of_chats(server):
    body = {**OPENCODE, "max_tokens": 12}
    sent(server, "/v1/chat/completions", TITLE)
    first = sent(server, "/v1/chat/completions", body)
    sent(server, "/v1/chat/completions", TITLE)
    again = sent(server, "/v1/chat/completions", body)
    usage = again[-1]["usage"]
    # The title's prompt between the two does not cost the conversation its place.
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
    texts = [
        "".join(c["choices"][0]["delta"].get("content") or "" for c in x if c["choices"])
        for x in (first, again)
    ]
    assert texts[0] == texts[1]


def test_an_agent_of_responses(server):
    events = sent(server, "/v1/responses", {**CODEX, "max_output_tokens": 16})
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    ignored = events[-1]["response"]["edgemoe"]["ignored"]
    assert {
        "include",
        "prompt_cache_key",
        "client_metadata",
        "store",
        "tools[1]: namespace",
    } <= set(ignored)


def test_an_agent_of_messages(server):
    body = {**CLAUDE, "max_tokens": 12}
    events = sent(
        server,
        "/v1/messages?beta=true",
        body,
        **{"anthropic-beta": "x", "anthropic-version": "2023-06-01"},
    )
    assert events[0]["type"] == "message_start"
    assert events[-1]["type"] == "message_stop"
    assert {"context_management", "output_config", "metadata"} <= set(
        events[-2]["edgemoe"]["ignored"]
    )
    # What changes with each request in front of the prompt is left out, or nothing would be kept.
    body["system"] = [
        {"type": "text", "text": "x-anthropic-billing-header: cch=def"},
        body["system"][1],
    ]
    usage = sent(server, "/v1/messages?beta=true", body)[-2]["usage"]
    assert usage["input_tokens"] == 1
    assert usage["cache_read_input_tokens"] > 100


def test_a_harness_with_an_empty_key(server):
    done = sent(server, "/v1/completions", LM_EVAL, Authorization="Bearer")
    assert [len(c["logprobs"]["tokens"]) for c in done["choices"]] == [4, 3]


def test_a_load_generator(server):
    chunks = sent(server, "/v1/chat/completions", GUIDELLM)
    assert [c["usage"]["completion_tokens"] for c in chunks][-1] == 4
    assert all(c["usage"] for c in chunks)

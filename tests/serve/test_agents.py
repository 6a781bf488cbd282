"""Recorded requests of real agents are replayed whole: every field in them is honoured or reported.

The bodies in `requests` are of codex 0.171.0, claude 2.1.197 and opencode 1.18.33. The agents were asked what is in a
file, called a tool that reads it, and ended (`scripts/agents`). Texts were shortened, all but four tools removed, and
names replaced.
"""

from __future__ import annotations

import json
from pathlib import Path

import httpx2 as httpx
import pytest
from bodies import GUIDELLM, LM_EVAL
from served import running
from tiny import tiny_checkpoint

from edgemoe.convert.convert import convert

RECORDED = Path(__file__).parent / "requests"
REPORTED = {
    "codex": {
        "store", "include", "prompt_cache_key", "client_metadata", "reasoning.summary", "tools[2]: namespace",
        "tools[3]: web_search",
    },
    "claude": {"metadata", "context_management", "output_config", "cache_control", "anthropic-beta"},
    "opencode": set(),
}  # fmt: skip
"""By agent, the fields that have no effect here and are reported."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    checkpoint = tiny_checkpoint()
    checkpoint.config["max_position_embeddings"] = 16384
    path = tmp_path_factory.mktemp("roomy") / "roomy.moe"
    convert(checkpoint, path)
    with running(path, options={"context": 16384}) as found:
        yield found


def sent(server, path, body, headers=None):
    """Returns the events of a stream, or the whole answer."""
    url = f"{server.url}{path}"
    with httpx.stream("POST", url, json=body, timeout=60, headers=headers) as done:
        text = "".join(done.iter_text())
    assert done.status_code == 200, text
    if not body.get("stream"):
        return json.loads(text)
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def recorded(server, name):
    """Sends the recorded requests of an agent, with short replies, and yields the events of each."""
    for request in json.loads((RECORDED / f"{name}.json").read_text()):
        body = dict(request["body"])
        body["max_output_tokens" if name == "codex" else "max_tokens"] = 16
        yield sent(server, request["path"], body, request["headers"])


def test_codex(server):
    first, second = ([*events][-1] for events in recorded(server, "codex"))
    for last in (first, second):
        assert last["type"] in ("response.completed", "response.incomplete")
        assert set(last["response"]["edgemoe"]["ignored"]) == REPORTED["codex"]
    before, after = (e["response"]["usage"] for e in (first, second))
    # The second prompt reuses the first one, up to where the template opens the reply.
    assert after["input_tokens_details"]["cached_tokens"] >= before["input_tokens"] - 32


def test_claude(server):
    usages = []
    for events in recorded(server, "claude"):
        assert events[0]["type"] == "message_start"
        assert events[-1]["type"] == "message_stop"
        assert set(events[-2]["edgemoe"]["ignored"]) == REPORTED["claude"]
        usages.append(events[-2]["usage"])
    first, second = usages
    whole = first["input_tokens"] + first["cache_read_input_tokens"]
    assert second["cache_read_input_tokens"] >= whole - 32
    # The header that changes with each request is left out of the prompt, or nothing could be reused.
    request = json.loads((RECORDED / "claude.json").read_text())[1]
    body = {**request["body"], "max_tokens": 2}
    assert body["system"][0]["text"].startswith("x-anthropic-billing-header:")
    body["system"][0] = {"type": "text", "text": "x-anthropic-billing-header: cch=other"}
    last = sent(server, request["path"], body)[-2]
    assert last["usage"]["input_tokens"] == 1


def test_opencode(server):
    title, first, second = recorded(server, "opencode")
    for events in (title, first, second):
        assert events[-2]["choices"][0]["finish_reason"] in ("stop", "length")
        assert events[-2]["edgemoe"]["ignored"] == []
    before, after = (events[-1]["usage"] for events in (first, second))
    assert after["prompt_tokens_details"]["cached_tokens"] >= before["prompt_tokens"] - 32
    # The request for a title in between does not evict the conversation.
    requests = json.loads((RECORDED / "opencode.json").read_text())
    for request in (requests[0], requests[2]):
        usage = sent(server, request["path"], {**request["body"], "max_tokens": 2})[-1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_a_harness_with_an_empty_key(server):
    done = sent(server, "/v1/completions", LM_EVAL, {"Authorization": "Bearer"})
    assert [len(c["logprobs"]["tokens"]) for c in done["choices"]] == [4, 3]


def test_a_load_generator(server):
    chunks = sent(server, "/v1/chat/completions", GUIDELLM)
    assert [c["usage"]["completion_tokens"] for c in chunks][-1] == 4
    assert all(c["usage"] for c in chunks)

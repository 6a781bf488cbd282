"""Bodies of the shape that programs without a client here send: everything in them is honoured or reported."""

from __future__ import annotations

import json

import httpx2 as httpx
import pytest
from served import running
from tiny import tiny_checkpoint

from edgemoe.convert.convert import convert

TOOL = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    checkpoint = tiny_checkpoint()
    checkpoint.config["max_position_embeddings"] = 4096
    path = tmp_path_factory.mktemp("roomy") / "roomy.moe"
    convert(checkpoint, path)
    with running(path) as found:
        yield found


def function(name):
    return {
        "type": "function",
        "function": {"name": name, "description": f"Does {name}.", "parameters": TOOL},
    }


OPENCODE = {
    "model": "x", "max_tokens": 32000, "stream": True, "stream_options": {"include_usage": True},
    "messages": [
        {"role": "system", "content": "You are a coding agent."}, {"role": "system", "content": "Environment: Linux."},
        {"role": "user", "content": "Fix it."},
    ],
    "tools": [function(n) for n in ("read", "write", "bash", "grep")], "tool_choice": "auto", "temperature": 0,
}  # fmt: skip
CODEX = {
    "model": "x", "stream": True, "store": False, "include": ["reasoning.encrypted_content"], "tool_choice": "auto",
    "prompt_cache_key": "0199", "client_metadata": {"a": "b"}, "parallel_tool_calls": False, "max_output_tokens": 16,
    "reasoning": {"effort": "medium", "summary": "auto"}, "instructions": "You are a coding agent.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>"}]},
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<environment>"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix it."}]},
        {"type": "function_call", "name": "shell", "call_id": "c1", "arguments": "{\"path\": \".\"}"},
        {"type": "function_call_output", "call_id": "c1", "output": "a.py"},
    ],
    "tools": [
        {"type": "function", "name": "shell", "description": "", "strict": False, "parameters": TOOL},
        {"type": "namespace", "name": "agents", "tools": []}, {"type": "web_search"},
    ],
}  # fmt: skip
CLAUDE = {
    "model": "claude-x", "max_tokens": 32000, "stream": True, "thinking": {"type": "adaptive"},
    "context_management": {"edits": []}, "output_config": {"effort": "high"}, "metadata": {"user_id": "u"},
    "temperature": 1,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=abc"},
        {"type": "text", "text": "You are a coding agent.", "cache_control": {"type": "ephemeral"}},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "<reminder>"}, {"type": "text", "text": "Fix it."}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "Read", "input": {"path": "a"}}]},
        {"role": "system", "content": "The user opened a file."},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "x = 1", "is_error": False,
                                      "cache_control": {"type": "ephemeral"}}]},
    ],
    "tools": [{"name": n, "description": "", "input_schema": TOOL} for n in ("Read", "Write", "Bash")],
}  # fmt: skip
LM_EVAL = {
    "model": "x", "prompt": [[10, 20, 30], [40, 50]], "echo": True, "logprobs": 1, "max_tokens": 1,
    "temperature": 0, "seed": 1234,
}  # fmt: skip
GUIDELLM = {
    "model": "x", "messages": [{"role": "user", "content": [{"type": "text", "text": "Go."}]}], "stream": True,
    "ignore_eos": True, "max_completion_tokens": 4, "max_tokens": 4, "stop": None,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}  # fmt: skip


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
    title = {**OPENCODE, "tools": None, "tool_choice": None, "max_tokens": 8,
             "messages": [{"role": "system", "content": "A title, please."}, OPENCODE["messages"][-1]]}  # fmt: skip
    body = {**OPENCODE, "max_tokens": 12}
    sent(server, "/v1/chat/completions", title)
    first = sent(server, "/v1/chat/completions", body)
    sent(server, "/v1/chat/completions", title)
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
    events = sent(server, "/v1/responses", CODEX)
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

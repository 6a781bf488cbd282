"""Request bodies with one wrong value are answered, or refused with an error that names the field; nothing fails."""

from __future__ import annotations

import copy
import json

import httpx2 as httpx
import pytest
from bodies import CHAT, CLAUDE, CODEX, COMPLETION, FORMS, OPENCODE

from edgemoe.serve import about, messages, openai, responses
from edgemoe.serve.problems import Problem

WRONG = [
    None, True, -1, 10**30, 1.5, -1e308, "", "\x00", [], [None], ["x"], [1, [2]], {}, {"type": "x"},
    {"x": {"y": [1]}}, {"type": "object", "properties": {"a": {"$ref": "#"}}},
]  # fmt: skip


def places(value, at=()):
    """Yields the path of keys to every part of a body."""
    yield at
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*at, key))


def changed(body, at, value):
    """Returns a body with another value in one place."""
    if not at:
        return value
    out = inner = copy.deepcopy(body)
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return out


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (openai.read_chat, CHAT), (openai.read_chat, OPENCODE), *((openai.read_chat, f) for f in FORMS),
        (openai.read_completion, COMPLETION), (responses.read_responses, CODEX),
        (messages.read_messages, CLAUDE), (about.tokenize, {"content": "x", "with_pieces": True}),
        (about.detokenize, {"tokens": [1, 2]}), (about.apply_template, {"messages": CHAT["messages"]}),
    ],
)  # fmt: skip
def test_whatever_is_wrong_is_refused_by_name(server, read, body):
    refused = 0
    for i, at in enumerate(places(body)):
        for value in WRONG[i % 4 :: 4]:  # a quarter of the values at each place
            wrong = changed(body, at, value)
            try:
                read(server.service, json.dumps(wrong).encode())
            except Problem as problem:
                refused += 1
                assert problem.status == 400, (at, value, problem)
                assert problem.param or not at, (at, value, problem)
                assert len(problem.message) < 1000
    assert refused


@pytest.mark.parametrize("depth", [100, 400, 900, 5000])
def test_what_is_nested_deeply_is_no_failure(server, depth):
    schema = '{"type":"object","properties":{"a":' * depth + '{"type":"string"}' + "}}" * depth
    ask = '{"max_tokens":1,"messages":[{"role":"user","content":"a"}],'
    tool = f'{{"type":"function","function":{{"name":"f","parameters":{schema}}}}}'
    for more in (
        f'"tools":[{tool}],"tool_choice":"required"', f'"json_schema":{schema}', f'"chat_template_kwargs":{schema}',
        f'"logit_bias":{schema}', f'"unknown":{schema}',
    ):  # fmt: skip
        done = httpx.post(f"{server.url}/v1/chat/completions", content=f"{ask}{more}}}", timeout=60)
        assert done.status_code in (200, 400), done.text[:200]

"""Reasoning and tool calls of a model that has tokens of its own for them."""

from __future__ import annotations

import json

import anthropic
import openai
import pytest
from served import running
from tiny import thinking_checkpoint

from edgemoe.convert.convert import convert

ASK = [{"role": "user", "content": "Go."}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"at": {"enum": ["sky", "sea"]}}, "required": ["at"],
    "additionalProperties": False}}}]  # fmt: skip
OPEN, CLOSE, CALL, CALLED = 259, 260, 261, 262
NEVER = {str(OPEN): -1000, str(CLOSE): -1000, str(CALL): -1000}  # these never come by chance


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    checkpoint = thinking_checkpoint()
    path = tmp_path_factory.mktemp("thinking") / "thinking.moe"
    convert(checkpoint, path)
    with running(path, reasoning_budget=20) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


def chat(client, **more):
    more = {"temperature": 1, "max_tokens": 60, "logit_bias": NEVER, **more}
    return client.chat.completions.create(model="m", messages=ASK, **more)


def test_reasoning_is_apart_and_bounded(client):
    for seed in range(3):
        done = chat(client, seed=seed)
        message = done.choices[0].message
        thought = done.usage.completion_tokens_details.reasoning_tokens
        assert thought == 21  # and the word that ends it
        assert message.reasoning_content
        assert "</think>" not in message.reasoning_content + message.content


def test_a_request_bounds_it(client):
    more = {"thinking": {"type": "enabled", "budget_tokens": 5}}
    done = chat(client, seed=1, extra_body=more)
    assert done.usage.completion_tokens_details.reasoning_tokens == 6
    assert done.edgemoe["ignored"] == []


def test_a_bound_that_nothing_keeps_is_named(server):
    body = {"messages": ASK, "max_tokens": 1, "thinking": {"type": "enabled", "budget_tokens": 5}}
    with running(server.opened.model.moe.path, has_grammar=False) as other:
        for path in ("/v1/chat/completions", "/v1/messages"):
            said = other.post(path, body).json()["edgemoe"]["ignored"]
            assert said == ["thinking.budget_tokens"]


def test_a_stream_has_it_apart_too(client):
    whole = chat(client, seed=1).choices[0].message
    with client.chat.completions.create(
        model="m",
        messages=ASK,
        temperature=1,
        max_tokens=60,
        seed=1,
        stream=True,
        logit_bias=NEVER,
    ) as stream:
        deltas = [c.choices[0].delta for c in stream]
    assert (
        "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
        == whole.reasoning_content
    )
    assert "".join(d.content or "" for d in deltas) == whole.content


@pytest.mark.parametrize(
    "said",
    [
        {"reasoning_effort": "none"}, {"think": False}, {"enable_thinking": False},
        {"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)  # fmt: skip
def test_every_spelling_switches_it_off(client, said):
    done = chat(client, seed=1, extra_body=said)
    assert done.usage.completion_tokens_details.reasoning_tokens == 0
    assert not hasattr(done.choices[0].message, "reasoning_content")


def test_a_form_begins_after_the_reasoning(client):
    for seed in range(3):
        done = chat(
            client,
            seed=seed,
            max_tokens=200,
            temperature=2,
            extra_body={"json_schema": {"enum": [1, "a"]}},
        )
        assert json.loads(done.choices[0].message.content) in (1, "a")
        assert done.choices[0].message.reasoning_content


def test_the_other_dialects_have_it_apart(client, server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as other:
        ask = {"model": "m", "messages": ASK, "max_tokens": 60, "extra_body": {"temperature": 0}}
        done = other.messages.create(**ask)
        assert done.content[0].type == "thinking"
        with other.messages.stream(**ask) as stream:
            streamed = stream.get_final_message().content
        assert [block.type for block in streamed] == [block.type for block in done.content]
        assert streamed[0].thinking == done.content[0].thinking
        assert streamed[1].text == done.content[1].text
        off = other.messages.create(**ask, thinking={"type": "disabled"})
        assert {block.type for block in off.content} <= {"text"}
    response = client.responses.create(model="m", input="Go.", temperature=0, max_output_tokens=60)
    assert response.output[0].type == "reasoning"
    assert response.output[0].content[0].text == done.content[0].thinking
    assert response.usage.output_tokens_details.reasoning_tokens > 0


def test_a_call_that_the_model_begins_by_itself_is_whole(client):
    """The token that opens a call comes by chance here; from then on a grammar constrains the reply."""
    bias = {**NEVER, str(CALL): 30}
    for seed in range(3):
        done = chat(
            client, seed=seed, tools=TOOLS, logit_bias=bias, reasoning_effort="none", parallel_tool_calls=False,
            temperature=2, max_tokens=300,
        )  # fmt: skip
        choice = done.choices[0]
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        assert call.function.name == "look"
        assert json.loads(call.function.arguments)["at"] in ("sky", "sea")


def test_a_schema_that_cannot_be_kept_to_harms_no_free_call(server):
    tools = [{"type": "function", "function": {"name": "odd", "parameters": {"type": "nothing"}}}]
    done = server.post("/v1/chat/completions", {"messages": ASK, "tools": tools, "max_tokens": 2})
    assert done.status_code == 200
    done = server.post(
        "/v1/chat/completions",
        {"messages": ASK, "tools": tools, "max_tokens": 2, "tool_choice": "required"},
    )
    assert done.status_code == 400
    tools[0]["function"]["name"] = 'a "name"'
    done = server.post("/v1/chat/completions", {"messages": ASK, "tools": tools, "max_tokens": 2})
    assert done.json()["error"]["param"] == "tools[0]"

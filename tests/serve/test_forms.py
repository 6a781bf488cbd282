"""Replies of a prescribed form, tool calls, and reasoning, from a random model that knows nothing of them."""

from __future__ import annotations

import json
import random
import re
import sys
from array import array
from contextlib import nullcontext

import anthropic
import jsonschema
import openai
import pytest
from served import running
from tiny import tiny_checkpoint

import edgemoe
from edgemoe.cli.form import keep_to
from edgemoe.convert.convert import convert
from edgemoe.serve.ask import Ask
from edgemoe.serve.completions import ChatAnswer
from edgemoe.serve.grammar import Grammars, schema_bytes
from edgemoe.serve.problems import Problem
from edgemoe.text.sampler import SamplingParams

ASK = [{"role": "user", "content": "Go."}]
SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"type": "array", "items": {"enum": ["x", "yy", 3, None]}, "minItems": 1, "maxItems": 3},
    {"type": "string", "pattern": "^[ab]{2,4}$"},
    {"type": "string", "format": "date"},
    {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    {"type": "integer", "minimum": 5, "maximum": 8},
    {"const": {"k": [1, 2]}},
    {
        "$defs": {"n": {"type": "object", "properties": {"v": {"type": "boolean"}, "w": {"enum": ["p", "q"]}},
                        "required": ["v", "w"], "additionalProperties": False}},
        "type": "object", "properties": {"l": {"$ref": "#/$defs/n"}, "r": {"$ref": "#/$defs/n"}},
        "required": ["l", "r"], "additionalProperties": False,
    },
]  # fmt: skip
TOOLS = [
    {"name": "look", "description": "Looks.", "parameters": {
        "type": "object", "properties": {"at": {"enum": ["sky", "sea"]}}, "required": ["at"],
        "additionalProperties": False}},
    {"name": "wait", "parameters": {
        "type": "object", "properties": {"s": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["s"],
        "additionalProperties": False}},
]  # fmt: skip
CHAT_TOOLS = [{"type": "function", "function": tool} for tool in TOOLS]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose context is long enough for tools that are written byte by byte."""
    checkpoint = tiny_checkpoint()
    checkpoint.config["max_position_embeddings"] = 4096
    path = tmp_path_factory.mktemp("roomy") / "roomy.moe"
    convert(checkpoint, path)
    with running(path) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_every_reply_is_of_the_schema(client, schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(3):
        done = client.chat.completions.create(
            model="m", messages=ASK, response_format=form, temperature=2, seed=seed, max_tokens=200
        )
        assert done.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(done.choices[0].message.content), schema)


def test_any_object_will_do(client):
    done = client.chat.completions.create(
        model="m", messages=ASK, response_format={"type": "json_object"}, seed=3, max_tokens=400
    )
    text = done.choices[0].message.content
    assert text.startswith("{")
    if done.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("more", "pattern"),
    [
        ({"grammar": 'root ::= "yes" | "no" [!?]'}, r"yes|no[!?]"),
        ({"guided_regex": "[a-c]{3}"}, r"[a-c]{3}"), ({"guided_choice": ["up", 'do"wn']}, r"up|do\"wn"),
        ({"structured_outputs": {"choice": ["1"]}}, "1"), ({"json_schema": {"const": 5}}, "5"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
        ({"guided_choice": [f"w{i}" for i in range(5000)]}, r"w\d{1,4}"),
        ({"guided_choice": ["up"] * 5000}, "up"), ({"guided_choice": ["", "up"]}, "|up"),
    ],
)  # fmt: skip
def test_other_spellings_are_honoured(client, more, pattern):
    for seed in range(2):
        chat = client.chat.completions.create(
            model="m", messages=ASK, temperature=2, seed=seed, max_tokens=50, extra_body=more
        )
        assert re.fullmatch(pattern, chat.choices[0].message.content)
        text = client.completions.create(
            model="m", prompt="x", temperature=2, seed=seed, max_tokens=50, extra_body=more
        )
        assert re.fullmatch(pattern, text.choices[0].text)


def test_a_response_is_of_its_schema(client):
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMAS[0]}}
    with client.responses.stream(
        model="m", input="Go.", text=form, temperature=2, max_output_tokens=200
    ) as stream:
        stream.until_done()
        done = stream.get_final_response()
    jsonschema.validate(json.loads(done.output_text), SCHEMAS[0])
    assert done.status == "completed"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
         "response_format.json_schema.schema"),
        ({"grammar": "root = what"}, "grammar"), ({"guided_regex": "["}, "guided_regex"),
        ({"grammar": 'root ::= "x"', "json_schema": {"const": 1}}, "grammar"),
        ({"grammar": "root ::= root root"}, "grammar"), ({"json_schema": {"$ref": "#"}}, "json_schema"),
        ({"guided_choice": []}, "guided_choice"), ({"tools": [*CHAT_TOOLS, CHAT_TOOLS[0]]}, f"tools[{len(TOOLS)}]"),
        ({"structured_outputs": {"tags": 1}}, "structured_outputs.tags"),
        ({"json_schema": {"description": "x" * 300_000}}, "json_schema"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}],
          "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"tools": CHAT_TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ({"tools": CHAT_TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_to_is_refused(server, more, param):
    done = server.post("/v1/chat/completions", {"messages": ASK, **more})
    assert done.status_code == 400, done.text
    error = done.json()["error"]
    assert error["param"] == param
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400


def test_an_empty_schema_is_of_all_values(server):
    asked = {"messages": ASK, "seed": 1, "max_tokens": 300, "temperature": 2}
    done = server.post("/v1/chat/completions", {**asked, "json_schema": {}}).json()["choices"][0]
    if done["finish_reason"] == "stop":
        json.loads(done["message"]["content"])
    free = server.post("/v1/chat/completions", {**asked, "grammar": ""}).json()["choices"][0]
    assert free["message"]["content"] != done["message"]["content"]


def test_a_grammar_that_fails_on_the_way_fails_the_request(server):
    large = "root ::= " + " | ".join(
        f'"w{i}"' for i in range(3000)
    )  # 3000 items in a row of a parser
    done = server.post("/v1/chat/completions", {"messages": ASK, "grammar": large})
    assert done.status_code == 400
    message = done.json()["error"]["message"]
    assert message.startswith(
        "grammar: cannot be kept to: Parser Error: Current row has 3001 items"
    )
    assert "<state>" not in message


def test_without_grammars_they_are_refused(tiny_moe):
    with running(tiny_moe, has_grammar=False) as server:
        done = server.post("/v1/chat/completions", {"messages": ASK, "json_schema": {"const": 1}})
        assert done.status_code == 400
        assert "was started with --no-grammar" in done.json()["error"]["message"]


def checked(name, arguments):
    tool = next(t for t in TOOLS if t["name"] == name)
    jsonschema.validate(json.loads(arguments), tool["parameters"])
    assert json.loads(arguments).keys() <= tool["parameters"]["properties"].keys()


def test_a_tool_that_must_be_called_is_called(client):
    for seed in range(4):
        done = client.chat.completions.create(
            model="m", messages=ASK, tools=CHAT_TOOLS, tool_choice="required", temperature=2, seed=seed,
            parallel_tool_calls=False,
        )  # fmt: skip
        choice = done.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        checked(call.function.name, call.function.arguments)
        assert call.id
    one = client.chat.completions.create(
        model="m", messages=ASK, tools=CHAT_TOOLS, parallel_tool_calls=False,
        tool_choice={"type": "function", "function": {"name": "wait"}},
    )  # fmt: skip
    assert one.choices[0].message.tool_calls[0].function.name == "wait"


def test_no_two_calls_of_an_answer_have_one_id():
    answer = ChatAnswer.__new__(ChatAnswer)
    answer.id, answer.asks = (
        "chatcmpl-" + "0" * 32,
        [Ask(ids=array("i", [1]), params=SamplingParams(), choices=8)],
    )
    names = [answer.call_name(choice, number) for choice in range(8) for number in range(40)]
    assert len(set(names)) == 8 * 40


def test_a_call_streams_as_clients_put_it_together(client):
    with client.chat.completions.create(
        model="m", messages=ASK, tools=CHAT_TOOLS, tool_choice="required", stream=True, seed=1
    ) as stream:
        chunks = list(stream)
    deltas = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    assert [bool(d.id) for d in deltas] == [True, False] * (len(deltas) // 2)
    assert deltas[0].function.arguments == ""
    checked(deltas[0].function.name, deltas[1].function.arguments)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_calls_in_the_other_dialects(client, server):
    tools = [{"name": t["name"], "input_schema": t["parameters"]} for t in TOOLS]
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as other:
        choice = {"type": "any", "disable_parallel_tool_use": True}
        ask = {
            "model": "m",
            "messages": ASK,
            "tools": tools,
            "tool_choice": choice,
            "max_tokens": 200,
        }
        done = other.messages.create(**ask)
        with other.messages.stream(**ask) as stream:
            streamed = stream.get_final_message()
    for message in (done, streamed):
        assert message.stop_reason == "tool_use"
        (block,) = message.content
        checked(block.name, json.dumps(block.input))
    tools = [{"type": "function", "strict": True, **t} for t in TOOLS]
    with client.responses.stream(
        model="m", input="Go.", tools=tools, tool_choice="required", parallel_tool_calls=False
    ) as stream:
        final = stream.get_final_response()
    (item,) = final.output
    checked(item.name, item.arguments)


def test_a_conversation_with_calls_goes_on(server):
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{\"at\": \"sky\"}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "blue"},
    ]  # fmt: skip
    done = server.post("/apply-template", {"messages": messages, "tools": CHAT_TOOLS})
    prompt = done.json()["prompt"]
    assert '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>' in prompt
    assert "<tool_response>\nblue\n</tool_response>" in prompt
    assert prompt.startswith("<|im_start|>system\nYou may call tools.")
    assert '"name": "wait"' in prompt


def test_compiled_grammars_stay_within_their_memory(server):
    tokenizer, told = server.service.tokenizer, []
    grammars = Grammars(tokenizer, 264, [258], need=told.append, made=told.append)
    large = [grammars.choice("x", [str(i) * 30000]) for i in range(4)]
    assert told == [(1 << 19) + 112 * len(large[0]), 600 * 264] + [told[0]] * 3
    assert sum(map(sys.getsizeof, grammars._last)) < 8 << 20
    assert [one.grammar for one in grammars._last] == large[:1:-1]
    kept = grammars.compiled(large[0])
    for i in range(4):
        grammars.choice("x", [str(i) * 30000 + "x"])
    assert grammars.compiled(large[0]) is kept  # a request has it
    grammars.choice("x", [str(0) * 30000])
    assert len(told) == 9  # its memory too


def test_a_lexer_takes_no_more_than_there_is(server):
    tokenizer, draw = server.service.tokenizer, random.Random(0)
    both = [tokenizer.token_id(letter) for letter in "ab"]
    for spare, states in ((0, 4096), (1 << 40, 250_000)):
        grammars = Grammars(tokenizer, 264, [258], spare=spare)
        assert grammars._states == states
        matcher = grammars.matcher(grammars.regex("x", "[ab]*a[ab]{14}"))
        is_refused = pytest.raises(Problem, match="too many states: 4096")
        with nullcontext() if spare else is_refused:
            for _ in range(5000):  # nearly every letter leads to another state
                matcher.consume_token(draw.choice(both))
                grammars.mask(matcher)


def test_a_schema_on_the_command_line_has_the_memory_of_its_grammar_and_errors_of_one_line(
    tiny_moe,
):
    schema = {
        "type": "object",
        "properties": {f"p{i}": {"pattern": f"^a{i}$"} for i in range(5000)},
    }
    with edgemoe.load(tiny_moe) as engine:
        grammars = Grammars(engine.tokenizer, 264, [258])
        assert schema_bytes({"type": "object"}) == 0
        least = 112 * len(grammars.json_schema("x", schema))
        assert schema_bytes(schema) + (8 << 20) == pytest.approx(least, rel=0.3)
        chat = engine.chat(params=SamplingParams(max_tokens=9))
        keep_to(engine, chat, {"type": "object"})
        constraint = chat.constraint([1])
        constraint.allowed()
        with pytest.raises(ValueError, match="--json-schema: grammar: cannot be kept to"):
            constraint.take(5)

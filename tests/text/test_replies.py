"""Replies of each family are parsed correctly, however they are split into pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.text.calls import ToolCall
from edgemoe.text.replies import FORMATS, Piece, parser, reply_format

TEMPLATES = Path(__file__).parent / "templates"
SCHEMAS = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
    "noop": {},
}
BY_NAME = {form.name: form for form in FORMATS}
PARIS = {"city": "Paris", "days": 3}
CALL = json.dumps({"name": "get_weather", "arguments": PARIS})

# Replies of each family, after its documentation and templates.
REPLIES = [
    ("tagged", f"<think>\nLet me see.\n</think>\n\nI look.\n<tool_call>\n{CALL}\n</tool_call>",
     "Let me see.", "I look.", [PARIS]),
    ("tagged", f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>", "", "", [PARIS, PARIS]),
    ("tagged", "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n"
     "</parameter>\n</function>\n</tool_call>", "", "", [PARIS]),
    ("tagged", "Well.<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
     "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>", "", "Well.", [PARIS]),
    ("granite3", f"<|tool_call|>[{CALL}]", "", "", [PARIS]),
    ("lfm2", '<|tool_call_start|>[get_weather(city="Paris", days=3)]<|tool_call_end|>I look.', "", "I look.", [PARIS]),
    ("lfm2", f"<|tool_call_start|>[{CALL}, {CALL}]<|tool_call_end|>", "", "", [PARIS, PARIS]),
    ("mistral", f"[TOOL_CALLS][{CALL}, {CALL}]", "", "", [PARIS, PARIS]),
    ("mistral", '[THINK]Hm.[/THINK]So:[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 3}'
     '[TOOL_CALLS]get_weather[CALL_ID]abc[ARGS]{"city": "Paris", "days": 3}', "Hm.", "So:", [PARIS, PARIS]),
    ("deepseek", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
     '{"city": "Paris", "days": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>', "", "", [PARIS]),
    ("deepseek", '<think>a</think>b<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": '
     '"Paris", "days": 3}<｜tool▁call▁end｜><｜tool▁calls▁end｜>', "a", "b", [PARIS]),
    ("kimi", "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
     '{"city": "Paris", "days": 3}<|tool_call_end|><|tool_calls_section_end|>', "", "", [PARIS]),
    ("harmony", "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary "
     'to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris", "days": 3}', "Think.", "", [PARIS]),
    ("harmony", "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant to=functions.get_weather<|channel|>"
     'commentary json<|message|>{"city": "Paris", "days": 3}<|call|>', "Think.", "", [PARIS]),
    ("harmony", ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris", "days": 3}<|call|>',
     "", "", [PARIS]),
    ("harmony", " to whom?", "", " to whom?", []), ("harmony", " to=", "", " to=", []),
    ("harmony", "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
     "Hm", "Yes.", []),
    ("gemma4", '<|channel>thought\nHm.\n<channel|>I look.<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}'
     "<tool_call|>", "Hm.", "I look.", [PARIS]),
    ("gemma4", f"<|tool_call>call:get_weather{json.dumps(PARIS)}<tool_call|>", "", "", [PARIS]),
    *[(name, "Plain  text, {with} <marks> [and] all. \n", "", "Plain  text, {with} <marks> [and] all. \n", [])
      for name in BY_NAME],
]  # fmt: skip


def taken(form, pieces, schemas=SCHEMAS, *, is_reasoning=False):
    """Returns the reasoning, content and calls of a reply."""
    return taken_by(parser(form, schemas, is_reasoning=is_reasoning), pieces)


def taken_by(machine, pieces):
    """Returns what a parser gives for the pieces of a reply."""
    events = [event for piece in pieces for event in machine.push(piece)] + machine.flush()
    texts = {
        kind: "".join(e.text for e in events if isinstance(e, Piece) and e.kind == kind)
        for kind in ("reasoning", "content")
    }
    return texts["reasoning"], texts["content"], [e for e in events if isinstance(e, ToolCall)]


@pytest.mark.parametrize(("name", "text", "reasoning", "content", "calls"), REPLIES)
def test_replies_are_taken_apart(name, text, reasoning, content, calls):
    whole = taken(BY_NAME[name], [text])
    assert whole[:2] == (reasoning, content)
    assert [c.name for c in whole[2]] == ["get_weather"] * len(calls)
    assert [json.loads(c.arguments) for c in whole[2]] == calls
    assert taken(BY_NAME[name], list(text)) == whole
    assert taken(BY_NAME[name], [text[i : i + 7] for i in range(0, len(text), 7)]) == whole


BROKEN = [
    ("tagged", "<tool_call>\n{not json}\n</tool_call>"), ("tagged", '<tool_call>{"name": "x"'),
    ("tagged", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'), ("granite3", "<|tool_call|>[5]"),
    ("lfm2", "<|tool_call_start|>[get_weather('Paris')]<|tool_call_end|>"), ("lfm2", "<|tool_call_start|>[]"),
    ("mistral", "[TOOL_CALLS]what is this"), ("mistral", "[TOOL_CALLS]name{"),
    ("deepseek", "<｜tool▁calls▁begin｜>x<｜tool▁calls▁end｜>"), ("kimi", "<|tool_calls_section_begin|>x"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), BROKEN)
def test_what_is_no_call_is_text(name, text):
    assert taken(BY_NAME[name], list(text)) == ("", text, [])


@pytest.mark.parametrize("text", [REPLIES[0][1], "a<tool_call>b"])
def test_without_tools_nothing_is_a_call(text):
    reasoning, content, calls = taken(BY_NAME["tagged"], list(text), schemas=None)
    assert calls == []
    assert content == text.rpartition("</think>\n\n")[2]
    assert reasoning.strip() == ("Let me see." if "think" in text else "")


def test_a_prompt_may_open_the_reasoning():
    for pieces in (["so</think>\n\nyes"], list("so</think>\n\nyes")):
        assert taken(BY_NAME["tagged"], pieces, None, is_reasoning=True) == ("so", "yes", [])
    assert taken(BY_NAME["tagged"], ["never ends"], None, is_reasoning=True)[0] == "never ends"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("qwen3", "tagged"),
        ("gpt-oss", "harmony"),
        ("glm-4.6", "tagged"),
        ("mistral-nemo", "mistral"),
    ],
)
def test_published_templates_say_how_their_models_write(file, name):
    form, speaks = reply_format((TEMPLATES / f"{file}.jinja").read_text())
    assert form.name == name
    assert speaks
    assert reply_format("{{ messages }}") == (BY_NAME["tagged"], False)


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_what_a_grammar_makes_a_model_write_is_read(form):
    text = form.before.replace("{name}", "get_weather") + json.dumps(PARIS) + form.after
    (call,) = taken(form, list(text))[2]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", PARIS)


words = sorted(
    {m for f in FORMATS for m in f.markers(tools=True)}
    | {"{", "}", '"', "name", " ", "\n", "é", "to=x"}
)


@given(
    st.sampled_from(FORMATS),
    st.lists(st.sampled_from(words), max_size=12),
    st.booleans(),
    st.integers(1, 9),
)
def test_no_text_is_too_much(form, parts, is_reasoning, size):
    text = "".join(parts)
    whole = taken(form, [text], is_reasoning=is_reasoning)
    assert (
        taken(
            form, [text[i : i + size] for i in range(0, len(text), size)], is_reasoning=is_reasoning
        )
        == whole
    )


ODD = {"city": 'A "b": {c: 1}, <d>', "days": -2}
THEIRS = [
    ("qwen3_moe", "tagged", [
        REPLIES[0][1], REPLIES[1][1], "No call.", f"<think>\na\n</think>\n\n<tool_call>\n{CALL}\n</tool_call>\n",
        f"<tool_call>{json.dumps({'name': 'get_weather', 'arguments': ODD})}</tool_call>",
    ]),
    ("qwen3_5_moe", "tagged", [
        REPLIES[2][1], f"<think>\nb\n</think>\n\nSo.\n\n{REPLIES[2][1]}\n{REPLIES[2][1]}",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nNew\nYork\n</parameter>\n</function>\n</tool_call>",
    ]),
    ("gemma4", "gemma4", [
        '<|channel>thought\nHm.\n<channel|>I look.<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}'
        "<tool_call|>",
        '<|tool_call>call:noop{a:{b:[1,<|"|>x, y: "z"<|"|>],c:null},d:true}<tool_call|>',
        "<|tool_call>call:noop{}<tool_call|><|tool_call>call:get_weather{days:1}<tool_call|>", "No call.",
    ]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "text"), [(kind, name, text) for kind, name, texts in THEIRS for text in texts]
)
def test_a_reply_is_what_transformers_reads(kind, name, text):
    from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS as TEMPLATES_OF
    from transformers.utils.chat_parsing import parse_response

    template = next(t for kinds, t in TEMPLATES_OF.items() if kind in kinds)
    start = template["start_anchor"]
    tools = [
        {"type": "function", "function": {"name": n, "parameters": p}} for n, p in SCHEMAS.items()
    ]
    theirs = parse_response(
        text, template, prefix=start if isinstance(start, str) else start[0], tools=tools
    )
    reasoning, content, calls = taken(BY_NAME[name], [text])
    assert reasoning == theirs.get("reasoning_content", "").strip()
    assert content == theirs.get("content", "").strip()
    expected = [call["function"] for call in theirs.get("tool_calls", [])]
    assert [c.name for c in calls] == [f["name"] for f in expected]
    assert [json.loads(c.arguments) for c in calls] == [f["arguments"] for f in expected]

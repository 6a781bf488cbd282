"""A model's own template parses its replies as transformers does, however they are split, and never fails."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_replies import PARIS, REPLIES, SCHEMAS, THEIRS, taken_by
from tiny import thinking_checkpoint
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS
from transformers.utils.chat_parsing import parse_response
from transformers.utils.chat_parsing.content_parsers import parse_content

from edgemoe.errors import FormatError
from edgemoe.text.python_calls import python_calls
from edgemoe.text.reading import Reading
from edgemoe.text.response_template import ResponseTemplate, TemplateParser
from edgemoe.text.tokenizer import Tokenizer

TEMPLATES = {kind: t for kinds, t in _RESPONSE_TEMPLATE_FALLBACKS.items() for kind in kinds}
STARTS = {
    "qwen3_moe": "<|im_start|>assistant\n",
    "qwen3_5_moe": "<|im_start|>assistant\n",
    "gemma4": "<|turn>model\n",
}
OWN = {
    "start_anchor": "<bot>",
    "fields": {
        "thinking": {"open": ["<t>", "<th>"], "close": "</t>", "repeats": True},
        "tool_calls": {
            "open": "<c>", "close": "</c>", "content": "kv-lines", "repeats": True,
            "transform": {"function": {"name": "{content.name}", "arguments": {"city": "{content.city}"}}},
        },
        "content": {"close_pattern": r"\s*<end>$"},
    },
}  # fmt: skip
CASES = [(kind, text) for kind, _, texts in THEIRS for text in texts]


def read(template, text, prefix, size=0, schemas=SCHEMAS):
    parser = TemplateParser(ResponseTemplate(template), schemas, prefix)
    step = size or max(len(text), 1)
    return taken_by(parser, [text[i : i + step] for i in range(0, len(text), step)])


@pytest.mark.parametrize(("kind", "text"), CASES)
@pytest.mark.parametrize("opened", [False, True])
def test_a_reply_is_what_transformers_reads(kind, text, opened):
    prefix = "a" + STARTS[kind]
    word = TEMPLATES[kind]["fields"]["reasoning_content"]["open"]
    if opened and text.startswith(word):
        prefix, text = prefix + word, text.removeprefix(word)
    tools = [
        {"type": "function", "function": {"name": n, "parameters": p}} for n, p in SCHEMAS.items()
    ]
    theirs = parse_response(text, TEMPLATES[kind], prefix=prefix, tools=tools)
    for size in (0, 1, 3):
        reasoning, content, calls = read(TEMPLATES[kind], text, prefix, size)
        assert reasoning == theirs.get("reasoning_content", "")
        assert content == theirs.get("content", "")
        expected = [call["function"] for call in theirs.get("tool_calls", [])]
        assert [c.name for c in calls] == [f["name"] for f in expected]
        assert [json.loads(c.arguments) for c in calls] == [f["arguments"] for f in expected]


CALLS = [
    """[get_weather(city='Paris', days=3)]""", "[]", " [ a . b ( ) ] ", "[a.b-c(), f(x=[1, {'y': None}], z={})]\n",
    "[f(a=1,)]", "[f(1)]", "[f(a=1, a=2)]", "[f(a={'b': 1, 'b': 2})]", "[f()] g", "[f(),]", "[f() g()]", "f()", "",
    "[f(a=-0, b=1.5e3, c=-2E-1)]", "[f(a=01)]", "[f(a=1.)]", "[f(a=1e999)]", "[f(a=+1)]", "[f(a=.5)]", "[f(a=1b=2)]",
    f"[f(a={2**53 - 1}, b={1 - 2**53})]", f"[f(a={2**53})]", "[f(a=00000000000000000001)]", "[f(a=-)]",
    "[f(a=true, b=False, c=null)]", "[f(a=nil)]", "[f(a=True.x)]", "[f(True=1)]", "[f(a b=1)]", "[2f()]", "[f({})]",
    r"""[f(a='it\'s "so"', b="a\tb\u00e9\/\"")]""", r"[f(a='\ud83d\ude00')]", r"[f(a='\ud83d')]", r"[f(a='\x41')]",
    "[f(a='a\tb')]", "[f(a='a\nb')]", "[f(a='\\\n')]", "[f(a='open)]", "[f(a='\ud800')]", "[f(a='é', é=1)]",
    "[f(a=" + "[" * 100 + "]" * 100 + ")]", "[f(a=" + "[" * 101 + "]" * 101 + ")]", "[f(a={'k':" * 3,
]  # fmt: skip


def read_by(reader, text):
    """Returns the value that a reader gives for a text, or None if it refuses the text."""
    try:
        return reader(text)
    except ValueError:
        return None


def theirs(text):
    return parse_content(text, "python-call-list", {})


@pytest.mark.parametrize("text", CALLS)
def test_calls_of_python_are_what_transformers_reads(text):
    assert repr(read_by(python_calls, text)) == repr(read_by(theirs, text))


signs = [
    *"[](){},:='\"-. \n\\1u",
    "f",
    "a",
    "True",
    "[f(",
    "a=",
    "'x'",
    '"y"',
    ")]",
    "12",
    "1.5",
    "\\n",
    "null",
]


@given(st.lists(st.sampled_from(signs), max_size=14))
def test_any_text_is_calls_where_transformers_reads_some(parts):
    for text in ("".join(parts), f"[f(a={''.join(parts)})]", f"[f(a='{''.join(parts)}')]"):
        assert repr(read_by(python_calls, text)) == repr(read_by(theirs, text))


def test_a_template_with_calls_of_python():
    call = {"function": {"name": "{name}", "arguments": "{arguments}"}}
    field = {
        "open": "<c>", "close": "</c>", "content": "python-call-list", "transform": call, "transform_each": True
    }  # fmt: skip
    template = {"start_anchor": "<bot>", "fields": {"tool_calls": field, "content": {}}}
    text = "So.<c>[get_weather(city='Paris', days=3), noop()]</c>"
    message = parse_response(text, template, prefix="<bot>")
    for size in (0, 1, 5):
        _, content, calls = read(template, text, "<bot>", size)
        assert content == message["content"]
        assert [{"name": c.name, "arguments": json.loads(c.arguments)} for c in calls] == [
            c["function"] for c in message["tool_calls"]
        ]
    assert read(template, "<c>[noop(1)]</c>", "<bot>")[1:] == ("<c>[noop(1)]</c>", [])


def test_a_template_of_ones_own():
    text = "<th>so</t> It is. <c>name: get_weather\ncity: Paris</c> <end>"
    for size in range(1, 9):
        reasoning, content, (call,) = read(OWN, text, "<bot>", size)
        assert (reasoning, content.strip()) == ("so", "It is.")
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})


def test_what_cannot_be_read_is_text():
    assert read(OWN, "<c>name: get_weather</c>", "<bot>")[1:] == ("<c>name: get_weather</c>", [])
    text = '<tool_call>{"name": 3}</tool_call>'
    assert read(TEMPLATES["qwen3_moe"], text, "")[1:] == (text, [])
    assert read(TEMPLATES["qwen3_moe"], REPLIES[1][1], "", schemas=None)[2] == []


@pytest.mark.parametrize(
    "args", [{}, {"tag_pattern": "("}, {"tag_pattern": "x"}, {"tag_pattern": 1}]
)
def test_a_field_whose_pattern_is_wrong_is_text(args):
    fields = {
        "tool_calls": {
            "open": "<c>",
            "close": "</c>",
            "content": "xml-inline",
            "content_args": args,
        }
    }
    template = {"start_anchor": "<bot>", "fields": {**fields, "content": {}}}
    assert read(template, "<c>x</c>", "<bot>") == ("", "<c>x</c>", [])


words = ["<t>", "<th>", "</t>", "<c>", "</c>", "<end>", "name: noop", "\n", " ", "x", "<"]


@given(st.lists(st.sampled_from(words), max_size=12), st.integers(1, 9))
def test_it_does_not_matter_how_a_reply_is_cut(parts, size):
    text = "".join(parts)
    assert read(OWN, text, "<bot>", size) == read(OWN, text, "<bot>")


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ([], "expected an object"), ({**OWN, "more": 1}, "unknown 'more'"), ({**OWN, "version": 2}, "version 2"),
        ({"fields": OWN["fields"]}, "start_anchor"), ({"start_anchor": "x", "fields": {}}, "fields"),
        ({**OWN, "fields": {"a": {}, "b": {}}}, "more than one"),
        ({**OWN, "fields": {"a": {"open_pattern": "("}}}, "open_pattern"),
        ({**OWN, "fields": {"a": {"open": "x", "open_pattern": "x"}}}, "open and open_pattern"),
        ({**OWN, "fields": {"a": {"content": "python-list"}}}, "is unknown"),
        ({**OWN, "fields": {"a": {"open": ""}}}, "expected text"),
        ({**OWN, "fields": {"a": {"open": [{}]}}}, "expected text"),
        ({**OWN, "fields": {"a": 1}}, "a: expected an object"),
        ({**OWN, "fields": {"a": {"open": "x" * 70_000}}}, "64 Ki"),
    ],
)  # fmt: skip
def test_a_broken_template_is_refused(spec, why):
    with pytest.raises(FormatError, match=why):
        ResponseTemplate(spec)


def test_a_pattern_without_end_ends(monkeypatch):
    monkeypatch.setattr("edgemoe.text.response_template._SEARCH_S", 0.01)
    fields = {"a": {"open_pattern": "(x+x+)+y", "close": "z"}, "content": {}}
    template = {"start_anchor": "<bot>", "fields": fields}
    text = "x" * 200
    assert read(template, text, "<bot>")[1] == text


def test_the_file_of_a_model_says_it():
    files = thinking_checkpoint().files
    plain = Reading(Tokenizer.from_files(files))
    assert (plain.name, plain.template, plain.note) == ("tagged", None, "")
    config = json.loads(files["tokenizer_config.json"])

    def reading(template):
        changed = json.dumps({**config, "response_template": template}).encode()
        return Reading(Tokenizer.from_files({**files, "tokenizer_config.json": changed}))

    own = reading(TEMPLATES["qwen3_moe"])
    assert own.name == "response_template"
    assert own.reasons
    reader = own.reader({"get_weather": {}}, "<|im_start|>assistant\n<think>\n")
    assert reader.state == "reasoning"
    call = json.dumps({"name": "get_weather", "arguments": PARIS})
    events = reader.push(f"So.</think>Yes.<tool_call>{call}</tool_call>") + reader.flush()
    assert [getattr(e, "kind", "call") for e in events] == ["reasoning", "content", "call"]
    broken = reading({"fields": 1})
    assert broken.template is None
    assert "fields: expected an object" in broken.note

"""Chat templates render as in transformers, and can exhaust neither the machine's time nor its memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import _compile_jinja_template

from edgemoe.errors import FormatError
from edgemoe.text.jinja.meter import LimitExceeded, Meter
from edgemoe.text.template import ChatTemplate

PUBLISHED = sorted(Path(__file__).parent.glob("templates/*.jinja"))
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Says how the weather is.\nToday's only.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "where", "enum": ["Rome", "Köln"]},
                    "days": {"type": "integer", "default": 3},
                    "options": {
                        "type": "object",
                        "properties": {"units": {"type": "array", "items": {"type": "string"}}},
                    },
                    "time": {"type": ["string", "null"]},
                    "any": {"oneOf": [{"type": "string"}, {"type": "number", "default": 1}]},
                },
                "required": ["place"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "nothing", "description": "", "parameters": {"type": "object"}},
    },
]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": "abcdef123", "type": "function", "function": function}


SYSTEM = {"role": "system", "content": "Be brief, s'il vous plaît."}
RESULT = {
    "role": "tool",
    "name": "get_weather",
    "tool_call_id": "abcdef123",
    "content": '{"t": 20}',
}
CHATS: list[list[dict[str, Any]]] = [
    [user("Hello <b>&amp; 'quotes' 日本")],
    [SYSTEM, user("One"), assistant("<think>\nhm\n</think>\n\nTwo"), user("Three")],
    [SYSTEM, user("Rain?"), assistant("", tool_calls=[call({"place": "Rome", "days": 2})]), RESULT,
     assistant("20 degrees"), user("Thanks")],
    [user("Rain?"), assistant(None, tool_calls=[call({"place": "Köln"})], thinking="Ask."), RESULT],
    [user("Rain?"), assistant("", tool_calls=[call(json.dumps({"place": "Rome"}))] * 2), RESULT, RESULT],
    [{"role": "developer", "content": "Be kind."}, user("a"), assistant("b", reasoning_content="c"), user("d")],
    [user([{"type": "text", "text": "in"}, {"type": "text", "text": "parts"}]), assistant("x"), user("y")],
    [user("a"), user("b"), assistant("c"), assistant("d")],
    [SYSTEM] + [user(f"question {i}") if i % 2 == 0 else assistant(f"answer {i}") for i in range(21)],
]  # fmt: skip


def outcome(render: Any) -> tuple[str, str]:
    """Returns the rendered text, or the message with which rendering is refused."""
    try:
        return "text", render()
    except Exception as error:
        words = " ".join(str(getattr(error, "message", None) or error).split())
        return "error", words.removeprefix("chat template: ")


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_templates_render_as_in_transformers(path: Path) -> None:
    source = path.read_text()
    mine, theirs = ChatTemplate({"default": source}, VARIABLES), _compile_jinja_template(source)
    rendered = 0
    for chat in CHATS:
        for tools in (None, TOOLS):
            for extra in ({}, {"enable_thinking": False}, {"reasoning_effort": "high"}):
                options = {"add_generation_prompt": "high" not in extra.values(), **extra}
                if tools is not None:
                    options["tools"] = tools
                plain = [{k: v for k, v in m.items() if v is not None} for m in chat]
                values = {"tools": None, "documents": None, **VARIABLES, **options}
                expected = outcome(lambda: theirs.render(messages=plain, **values))  # noqa: B023
                assert outcome(lambda: mine.render(chat, **options)) == expected  # noqa: B023
                rendered += expected[0] == "text"
    assert rendered >= 30


# --- any template, against Jinja's own compiler

NAMES = st.sampled_from(
    ["a", "b", "messages", "ns.x", "ns", "loop.index", "loop.last", "m", "unknown"]
)
CONSTANTS = st.sampled_from(
    [
        "0",
        "1",
        "2",
        "-1",
        "1.5",
        "'x'",
        "'A b'",
        "''",
        "true",
        "none",
        "[]",
        "[1, 'x']",
        "(1, 2)",
        "{'k': 1}",
    ]
)
FILTERS = st.sampled_from(
    ["trim", "upper", "length", "list", "first", "last", "join('-')", "default('d')", "tojson", "string", "int",
     "sort", "unique|list", "map('upper')|list", "map(attribute='role')|list", "selectattr('role')|list",
     "reject('odd')|list", "replace('x', 'yy')", "items|list", "dictsort", "sum", "reverse|list", "safe", "abs",
     "indent(2)", "title", "e", "round(1)", "max", "min", "tojson(indent=1)", "format(1)", "center(5)", "count"]
)  # fmt: skip
TESTS = st.sampled_from(
    [
        "defined",
        "none",
        "string",
        "mapping",
        "iterable",
        "number",
        "odd",
        "sameas none",
        "in [1, 'x']",
        "eq(1)",
    ]
)
CALLS = st.sampled_from(
    [".strip()", ".split('x')", ".items()", ".get('k', 2)", ".upper()", "[0]", "[-1]", "[1:]", "[::-1]", ".k",
     "['role']", ".startswith('x')", ".format(1)", ".append(1)", ".__class__", ".join(['a', 'b'])"]
)  # fmt: skip


def expressions(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    operators = st.sampled_from(
        ["+", "-", "*", "/", "//", "%", "~", "==", "!=", "<", ">=", "in", "not in", "and", "or"]
    )
    return st.one_of(
        st.tuples(inner, operators, inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, FILTERS).map(lambda t: f"({t[0]})|{t[1]}"),
        st.tuples(inner, TESTS).map(lambda t: f"(({t[0]}) is {t[1]})"),
        st.tuples(inner, CALLS).map(lambda t: f"({t[0]}){t[1]}"),
        st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} if {t[1]} else {t[2]})"),
        st.tuples(inner, inner).map(lambda t: f"({t[0]} if {t[1]})"),
        st.tuples(inner, inner).map(lambda t: f"m({t[0]}, q={t[1]})"),
        st.tuples(inner, inner).map(lambda t: f"[{t[0]}, {t[1]}]"),
        inner.map(lambda t: f"(not {t})"),
        inner.map(lambda t: f"range({t})"),
    )


EXPRESSION = st.recursive(st.one_of(NAMES, CONSTANTS), expressions, max_leaves=5)


def statements(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    name = st.sampled_from(["a", "b", "c", "ns.x", "loop"])
    target = st.sampled_from(["a", "b", "c", "a, b"])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(name, EXPRESSION).map(lambda t: f"{{% set {t[0]} = {t[1]} %}}"),
        st.tuples(name, inner).map(lambda t: f"{{% set {t[0]} %}}{t[1]}{{% endset %}}"),
        st.tuples(EXPRESSION, inner, inner).map(
            lambda t: f"{{% if {t[0]} %}}{t[1]}{{% elif a %}}y{{% else %}}{t[2]}{{% endif %}}"
        ),
        st.tuples(target, EXPRESSION, inner, inner).map(
            lambda t: f"{{% for {t[0]} in {t[1]} %}}{t[2]}{{% else %}}{t[3]}{{% endfor %}}"
        ),
        st.tuples(EXPRESSION, EXPRESSION, inner).map(
            lambda t: f"{{% for c in {t[0]} if {t[1]} %}}{t[2]}{{{{ loop.length }}}}{{% endfor %}}"
        ),
        st.tuples(inner, EXPRESSION).map(
            lambda t: f"{{% macro m(p, q={t[1]}) %}}{t[0]}{{{{ p }}}}{{{{ q }}}}{{% endmacro %}}"
        ),
        st.tuples(inner, inner).map(
            lambda t: (
                f"{{% macro n(p) %}}{t[0]}{{{{ caller(p) }}}}{{{{ varargs }}}}{{% endmacro %}}"
                f"{{% call(a) n(1, 2) %}}{t[1]}{{{{ a }}}}{{% endcall %}}"
            )
        ),
        st.tuples(EXPRESSION, inner).map(lambda t: f"{{% with b = {t[0]} %}}{t[1]}{{% endwith %}}"),
        inner.map(lambda t: f"{{% filter upper %}}{t}{{% endfilter %}}"),
        inner.map(lambda t: f"{{% generation %}}{t}{{% endgeneration %}}"),
        st.sampled_from(["{% break %}", "{% continue %}"]).flatmap(
            lambda word: EXPRESSION.map(lambda e: f"{{% if {e} %}}{word}{{% endif %}}")
        ),
        st.tuples(EXPRESSION, inner).map(
            lambda t: (
                f"{{% for a in {t[0]} recursive %}}{t[1]}{{{{ loop(a) if a is iterable and a is not string "
                "and loop.depth < 3 }}{% endfor %}"
            )
        ),
    )


TEMPLATE = st.recursive(
    st.one_of(st.just("text\n "), EXPRESSION.map(lambda e: f"{{{{ {e} }}}}")),
    statements,
    max_leaves=8,
)


@settings(deadline=None, max_examples=150)
@given(body=TEMPLATE)
def test_any_template_renders_as_in_jinja(body: str) -> None:
    source = "{% set ns = namespace(x=1) %}" + body
    chat = [user("x"), assistant("Hello")]
    values = {"a": [1, "x", [2, 3]], "b": "xyx"}
    try:
        theirs = _compile_jinja_template(source)
    except Exception:
        return  # the next test is for templates that do not parse
    expected = outcome(lambda: theirs.render(messages=chat, tools=None, documents=None,
                                             add_generation_prompt=True, **values))  # fmt: skip
    got = outcome(lambda: ChatTemplate({"default": source}, {}).render(chat, **values))
    if expected[0] == "text" and (" at 0x" in expected[1] or "<namespace" in expected[1].lower()):
        return  # has Python's repr of an object
    assert got[0] == expected[0], (got, expected)
    if got[0] == "text":
        assert got == expected


def _scopes(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    name = st.sampled_from(["a", "b"])
    put = name.map(lambda n: f"{{% set {n} = 'new' %}}")
    part = st.one_of(inner, put, st.tuples(inner, put, inner).map("".join))
    shapes = [
        "{{% set {n} %}}{p}{{% endset %}}{p2}",
        "{{% if a %}}{p}{{% elif b %}}{{% set b = 1 %}}{{% else %}}{p2}{{% endif %}}",
        "{{% for i in [1, 2] %}}{p}{{% endfor %}}{p2}", "{{% for {n} in [] %}}{p}{{% else %}}{p2}{{% endfor %}}",
        "{{% macro {n}(x={n}) %}}{p}{{% endmacro %}}{p2}{{{{ {n}() if {n} is callable }}}}",
        "{{% with {n} = b %}}{p}{{% endwith %}}{p2}", "{{% filter upper %}}{p}{{% endfilter %}}{p2}",
        "{{% generation %}}{p}{{% endgeneration %}}{p2}",
        "{{% macro m() %}}{{{{ caller() }}}}{{% endmacro %}}{{% call m() %}}{p}{{% endcall %}}{p2}",
    ]  # fmt: skip
    return st.tuples(st.sampled_from(shapes), name, part, part).map(
        lambda t: t[0].format(n=t[1], p=t[2], p2=t[3])
    )


SCOPES = st.recursive(st.sampled_from(["[{{ a }}]", "[{{ b }}]"]), _scopes, max_leaves=8)


@settings(deadline=None, max_examples=200)
@given(body=SCOPES)
@example("{% set a %}{{ a + a }}{% endset %}{{ a }}")  # is the name's first word, so that it hides
@example("{% macro m() %}{{ a }}{% endmacro %}{{ m() }}{% set a = 1 %}{{ m() }}")
@example("{% for i in [1] %}{{ a }}{% endfor %}{% if b %}{% set a = 1 %}{% endif %}{{ a }}")
def test_names_mean_what_they_do_in_jinja(body: str) -> None:
    values = {"a": "A", "b": "B"}
    theirs = _compile_jinja_template(body)
    expected = outcome(lambda: theirs.render(messages=[user("x")], **values))
    got = outcome(lambda: ChatTemplate({"default": body}, {}).render([user("x")], **values))
    if " at 0x" not in expected[1]:
        assert got[0] == expected[0], (got, expected)
        assert got[0] != "text" or got == expected


# --- limits

FOR, SOME, END = "{% for i in range(99999) %}", "{% for i in range(99) %}", "{% endfor %}"
LARGE = {
    # Single values that would be large, refused before they are made.
    "a format": "{% set x = '{:500000000}'.format(1) %}",
    "a format by name": "{{ '{a:500000000}'.format_map({'a': 1}) }}",
    "a nested format": "{{ '{:{}}'.format(1, 500000000) }}",
    "a repeated format": "{% set a = 'a' * 1000000 %}{{ ('{0}' * 300).format(a) }}",
    "a product": "{{ 'a' * 3000000000 }}",
    "a product of a list": "{{ [1] * 1000000000 }}",
    "a product of two lists": "{% set a = [[1] * 1000] * 10 %}{{ a * 100 }}",
    "a percent": "{{ '%2000000000d' % 1 }}",
    "a precision": "{{ '%.2000000000f' % 1 }}",
    "a percent by name": "{{ '%(a)2000000000d' % {'a': 1} }}",
    "a percent by a name with brackets": "{{ '%(a(b))2000000000d' % {'a(b)': 1} }}",
    "a percent of an argument": "{{ '%*d' % (2000000000, 1) }}",
    "a repeated percent": "{% set a = 'a' * 1000000 %}{{ '%s%s%s%s' % (a, a, a, a) }}",
    "the filter format": "{{ '%2000000000s'|format('a') }}",
    "a power": "{{ 10 ** 1000000000 }}",
    "a tower of powers": "{{ 99 ** 99 ** 99 }}",
    "a sum of texts": "{% set ns = namespace(a='a') %}" + SOME + "{% set ns.a = ns.a + ns.a %}" + END,
    "a sum of lists": "{% set ns = namespace(a=[1]) %}" + SOME + "{% set ns.a = ns.a + ns.a %}" + END,
    "a join of texts": "{% set ns = namespace(a='a') %}" + SOME + "{% set ns.a = ns.a ~ ns.a %}" + END,
    "center": "{{ 'a'.center(1000000000) }}",
    "the filter center": "{{ 'a'|center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "rjust": "{{ 'a'.rjust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "replace": "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
    "replace of nothing": "{% set a = 'a' * 1000000 %}{{ a.replace('', a) }}",
    "the filter replace": "{% set a = 'a' * 1000000 %}{{ a|replace('a', a) }}",
    "replace by keywords": "{% set a = 'a' * 1000000 %}{{ a|replace(new=a, old='a') }}",
    "join": "{% set a = 'a' * 1000000 %}{{ a.join(['b', 'c', 'd']) }}",
    "join of a text": "{% set a = 'a' * 1000000 %}{{ a.join('bcd') }}",
    "join of what is run through once": "{% set a = 'a' * 1000000 %}{{ a.join(range(9)|map('string')) }}",
    "the filter join": "{% set a = 'a' * 1000000 %}{{ range(1000)|join(a) }}",
    "split": "{{ ('a ' * 500000).split() }}",
    "split at": "{{ ('a,' * 500000).split(',') }}",
    "splitlines": "{{ ('a\n' * 500000).splitlines() }}",
    "characters": "{{ ('é€' * 100000)|list }}",
    "words": "{{ ('a ' * 500000)|title }}",
    "indent": "{{ 'a\nb'|indent(1000000000) }}",
    "indent by a text": "{% set a = 'a' * 1000000 %}{{ 'b\nc\nd'|indent(a) }}",
    "tojson": "{{ [1]|tojson(indent=1000000000) }}",
    "tojson with separators": "{{ [1, 2, 3]|tojson(separators=('a' * 1000000, 'b')) }}",
    "round": "{{ 1.5|round(1000000000, 'ceil') }}",
    "int": "{{ ('f' * 1000000)|int(0, 16) }}",
    "a date": "{{ strftime_now('%1000000000Y') }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "encode": "{{ ('a' * 1000000).encode('utf-32') }}",
    "shared parts, written": "{% set ns = namespace(a=[1]) %}" + SOME + "{% set ns.a = [ns.a, ns.a] %}"
    + END + "{{ ns.a }}",
    "shared parts, as a key": "{% set ns = namespace(a=(1,)) %}" + SOME + "{% set ns.a = (ns.a, ns.a) %}"
    + END + "{{ {ns.a: 1} }}",
    "a namespace in itself": "{% set ns = namespace() %}{% set ns.a = [ns] * 1000 %}{{ [ns] * 3000 }}",
    "a range of more": "{% for i in range(10 ** 9) %}" + END,
    "lipsum": "{{ lipsum(n=100000) }}",
    # Many values, each of them small enough.
    "many texts": "{% set ns = namespace(a=[]) %}" + SOME + "{% set ns.a = [ns.a, 'a' * 100000 ~ i] %}" + END,
    "many namespaces": "{% set ns = namespace() %}" + FOR + "{% set ns.a = namespace(b=ns.a) %}" + END,
    "many pieces of text": FOR + "a" * 1000 + END,
    "a captured text": "{% set x %}" + FOR + "a" * 1000 + END + "{% endset %}",
    "a filtered text": "{% filter upper %}" + FOR + "a" * 1000 + END + "{% endfilter %}",
    "a macro's text": "{% macro m() %}" + "a" * 1000 + "{% endmacro %}" + FOR + "{% set x = m() %}" + END,
    "slices": "{% set a = 'a' * 1000000 %}" + SOME + "{% set b = a[1:] %}" + END,
}  # fmt: skip

LONG = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}" + END + END,
    "a loop that takes nothing": ("{% for a in range(99999) if false %}" + END) * 12,
    "a loop in itself": "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}" + END,
    "a macro twice in itself": "{% macro m(n) %}{% if n %}{% set a = m(n - 1), m(n - 1) %}{% endif %}{% endmacro %}"
    "{{ m(40) }}",
    "a macro in itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "filters upon filters": "{% set a = range(9000) %}{{ (a" + "|map('string')" * 300 + ")|list|length }}",
    "long comparisons": "{% set a = ['a' * 1000] * 900 %}" + FOR + "{% if 'b' in a %}{% endif %}" + END,
}  # fmt: skip


@pytest.mark.parametrize("source", LARGE.values(), ids=LARGE.keys())
def test_a_template_that_makes_too_much_is_refused(source: str) -> None:
    template = ChatTemplate({"default": source}, {})
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^chat template: [^\n]{1,300}$"):
            template.render([user("Hi")])
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", LONG.values(), ids=LONG.keys())
def test_a_template_that_takes_too_many_steps_is_refused(source: str) -> None:
    template = ChatTemplate({"default": source}, {})
    limits = r"it takes more than [\d,]+ steps|it makes more than 8 MiB of values|maximum recursion depth .*"
    with pytest.raises(ValueError, match=f"^chat template: ({limits})$"):
        template.render([user("Hi")])


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "9" * 100_000 + " }}",
        "{{a}}" * 20_000,
        "{{ [" + "1," * 60_000 + "] }}",
        "a" * 200_000,
        "{{ " + "(" * 9_999,
        "{% autoescape 'a' * 3000000000 %}{% endautoescape %}",
        "{% include 'other' %}",
        "{% block a %}{% endblock %}",
    ],
)
def test_a_template_that_is_too_long_or_for_something_else_is_a_format_error(source: str) -> None:
    with pytest.raises(FormatError, match=r"^chat template 'default'[^\n]{1,300}$"):
        ChatTemplate({"default": source}, {})


def test_constants_are_not_evaluated_before_they_are_needed() -> None:
    source = (
        "{% if messages|length > 1 %}{{ 'a' * 3000000000 }}{{ '%2000000000d' % 1 }}{% endif %}ok"
    )
    assert ChatTemplate({"default": source}, {}).render([user("Hi")]) == "ok"


def test_a_prompt_of_more_characters_than_fit_is_refused() -> None:
    template = ChatTemplate({"default": "{{ messages[0].content }}{{ 'a' * 1000 }}"}, {})
    assert len(template.render([user("Hi")], most_characters=1002)) == 1002
    with pytest.raises(ValueError, match="it makes a prompt of more than 1001 characters"):
        template.render([user("Hi")], most_characters=1001)


def test_limits_grow_with_what_the_user_gives() -> None:
    long = "word " * 600_000
    source = "{% for m in messages %}{% set c = m.content.strip() %}{{ '<' ~ c + '>' }}{% endfor %}"
    chat = [user(long), assistant(long)]
    assert ChatTemplate({"default": source}, {}).render(chat) == f"<{long.strip()}>" * 2
    many = [user("x"), assistant("y")] * 2000
    source = "{% for m in messages %}{{ m.content ~ messages[loop.index - 1].role ~ messages|length }}{% endfor %}"
    assert ChatTemplate({"default": source}, {}).render(many) == "xuser4000yassistant4000" * 2000


def test_a_long_refusal_is_cut() -> None:
    template = ChatTemplate({"default": "{{ raise_exception('no ' * 100000) }}"}, {})
    with pytest.raises(ValueError, match=r"^chat template: (no ){50,}.{0,3}…$") as refused:
        template.render([user("Hi")])
    assert len(str(refused.value)) < 400


def test_a_meter_counts_shared_parts_as_often_as_they_occur() -> None:
    value: Any = [1]
    meter = Meter(0)
    for _ in range(10):
        value = [value, value]
    assert meter.size(value) > 1024 * 32
    for _ in range(10):
        value = [value, value]
    with pytest.raises(LimitExceeded, match="more than 1 MiB"):
        meter.size(value)

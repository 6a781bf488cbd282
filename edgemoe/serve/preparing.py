"""Turns what a request wants into what is asked of the engine: tokens, and the constraint on the reply."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgemoe.serve.ask import Ask, Wanted
from edgemoe.serve.guide import Guide
from edgemoe.serve.problems import Problem, too_long, wrong
from edgemoe.serve.prompts import Conversation, render
from edgemoe.serve.reply_grammar import reply_grammar
from edgemoe.serve.service import Service
from edgemoe.text.jinja.meter import Meter
from edgemoe.text.lengths import beginning, beginning_length, most_characters
from edgemoe.text.sampler import SamplingParams
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["continue_text", "converse", "encoded", "rendered", "sampled", "will_say"]

_LOOKED_AT = 4096  # characters at the end of a prompt that may be the beginning of the reply
_NO_GRAMMAR = "cannot be kept to: this server was started with --no-grammar"
_SAID = 120  # bytes of a token's log-probability as it comes
_CHOICE = 1 << 10  # bytes of a choice in an answer, beside its text: figures and JSON


def converse(service: Service, talk: Conversation, wanted: Wanted) -> Ask:
    """Returns what is asked of the engine for a conversation. Rendering and tokenizing may take a while.

    Raises:
        Problem: something in the conversation or in `wanted` is wrong, or the prompt is too long.
    """
    params = sampled(service, wanted.sampling)
    tools = [] if wanted.tool_choice == "none" else talk.tools
    if wanted.tool_choice.startswith("="):
        tools = [t for t in tools if t["name"] == wanted.tool_choice[1:]]
        if not tools:
            raise wrong("tool_choice", f"no tool is named {wanted.tool_choice[1:]!r}")
    if wanted.tool_choice == "required" and not tools:
        raise wrong("tool_choice", "expected tools with it")
    variables: dict[str, Any] = dict(wanted.variables)
    thinks = wanted.thinks
    if thinks is None and variables.get("enable_thinking") is False:
        thinks = False
    if thinks is not None:
        variables.setdefault("enable_thinking", thinks)
    if wanted.effort and wanted.effort != "none":
        variables.setdefault("reasoning_effort", wanted.effort)
    text = rendered(service, talk, variables, wanted.notes)
    ids = encoded(service, text, "messages", add_special=not service.tokenizer.has_chat_template)
    is_reasoning = service.reading.is_opened(text)
    ask = Ask(
        ids=array("i", ids), params=params, choices=wanted.choices, top=wanted.top, ignored=wanted.ignored,
        schemas={t["name"]: t.get("parameters") or {} for t in tools} if tools else None,
        prompt=text[-_LOOKED_AT:], must_call=wanted.must_call, several_calls=wanted.several_calls, slot=wanted.slot,
        reuses=wanted.reuses, keep_alive=wanted.keep_alive, adapter=wanted.adapter, notes=wanted.notes,
    )  # fmt: skip
    most = (
        service.settings.reasoning_budget
        if wanted.most_reasoning is None
        else wanted.most_reasoning
    )
    _constrain(service, ask, wanted, tools, is_reasoning, 0 if thinks is False else most)
    return ask


def continue_text(
    service: Service, ids: list[int], params: SamplingParams, wanted: Wanted, *, echo: bool
) -> Ask:
    """Returns what is asked of the engine to continue a text.

    Args:
        service: the server's model.
        ids: the tokens of the text.
        params: how to sample.
        wanted: what the request wants.
        echo: the reply repeats the text.

    Raises:
        Problem: the form cannot be enforced.
    """
    grammar = _grammar(service, wanted.form)
    grammars = service.grammars
    ask = Ask(
        ids=array("i", ids), params=params, choices=wanted.choices, top=wanted.top, echo=echo, is_raw=True,
        ignored=wanted.ignored, slot=wanted.slot, reuses=wanted.reuses, keep_alive=wanted.keep_alive,
        adapter=wanted.adapter,
    )  # fmt: skip
    if grammar is not None and grammars is not None:
        ask.grammars = (grammars.compiled(grammar),)
        ask.constraint = lambda: Guide(grammars, grammar)
    return ask


def sampled(service: Service, said: Mapping[str, Any]) -> SamplingParams:
    """Returns how a reply is sampled: as the request says, else as the server's `sampling` says.

    Args:
        service: the server's model.
        said: fields of `SamplingParams`; None for those that the request does not set.

    Raises:
        Problem: a value is out of range.
    """
    given = {name: value for name, value in said.items() if value is not None}
    try:
        return replace(service.sampling, **given)
    except ValueError as error:
        name, _, rest = str(error).removeprefix("sampling: ").partition(": ")
        raise wrong(name, rest) from None


def rendered(
    service: Service, talk: Conversation, variables: Mapping[str, Any], notes: list[str]
) -> str:
    """Returns the prompt of a conversation, as text; `notes` gets a line if messages are reworded.

    Raises:
        Problem: the template refuses it, or it takes too much memory.
    """
    # One after another, as it takes their memory twice.
    given = sum(len(json.dumps(part)) for part in (*talk.messages, *talk.tools, variables))
    few = Tokenizer.most_bytes(
        " " * min(given, beginning_length(service.context))
    )  # tokenizing comes next
    service.desk.need(max(Meter.most_bytes(given), few))
    return render(
        service.tokenizer, talk, service.form, variables=variables, notes=notes,
        most_characters=most_characters(given, service.context),
    )  # fmt: skip


def encoded(
    service: Service, text: str, param: str, *, add_special: bool, may_be_empty: bool = False,
    beside: int = 0,
) -> list[int]:  # fmt: skip
    """Returns the tokens of a prompt.

    Args:
        service: the server's model.
        text: the prompt.
        param: the field that it comes from, for errors.
        add_special: add the tokens that the model expects around a text.
        may_be_empty: a text without tokens is no error.
        beside: bytes that the request's earlier prompts take.

    Raises:
        Problem: the text is not valid Unicode, has no tokens and must have some, is too long for the context, or
            takes too much memory.
    """
    few = beginning(text, service.context)
    try:
        service.desk.need(beside + Tokenizer.most_bytes(few))
        if (
            len(few) < len(text)
            and (count := len(service.tokenizer.encode(few))) >= service.context
        ):
            raise too_long(param, len(text) * count // len(few), service.context, is_estimate=True)
        service.desk.need(beside + Tokenizer.most_bytes(text))
        ids = service.tokenizer.encode(text, add_special=add_special)
    except ValueError as error:
        raise wrong(param, str(error)) from None
    if not ids and not may_be_empty:
        raise wrong(param, "expected some text, got none")
    return ids


def will_say(
    service: Service, asks: Sequence[Ask], *, streams: bool, at_once: int, built: int, written: int
) -> None:
    """Sets how many bytes an answer takes beside its texts until it is sent; see `Ask.said_bytes`.

    Args:
        service: the server's model.
        asks: those of one request.
        streams: the answer is a stream. Of its reply, it holds those that the client has not taken yet.
        at_once: how many replies run at a time.
        built: bytes of a log-probability in the answer, which is made for one reply at a time.
        written: its bytes as JSON, until the answer is sent.
    """

    def counts(ask: Ask) -> tuple[int, int]:
        most, left = ask.params.max_tokens, max(service.context - len(ask.ids), 0)
        return len(ask.ids) * ask.echo, left if most < 0 else min(most, left)

    for i, ask in enumerate(sorted(asks, key=lambda ask: sum(counts(ask)), reverse=True)):
        ask.said_bytes = _CHOICE * ask.choices
        if ask.top is None:
            continue
        prompt, reply = counts(ask)
        said = _SAID * (i < at_once)
        each = said + built * (i == 0) + (not streams) * written * ask.choices
        ask.said_bytes += (prompt * each + reply * (said if streams else each)) * (ask.top + 1)


def _constrain(
    service: Service,
    ask: Ask,
    wanted: Wanted,
    tools: Sequence[Mapping[str, Any]],
    is_reasoning: bool,
    most: int,
) -> None:
    """Sets what makes the constraint of each choice, if anything is constrained.

    Args:
        service: the server's model.
        ask: the request.
        wanted: what the request wants.
        tools: those that may be called.
        is_reasoning: the prompt has opened the reasoning already.
        most: the most tokens of reasoning; -1 for no limit.
    """
    form, grammars, several = service.form, service.grammars, wanted.several_calls
    lazy: dict[int, str] = {}
    why = ""
    grammar = _grammar(service, wanted.form)
    must = wanted.must_call
    if wanted.form is not None and tools:
        raise wrong(wanted.form[1], "not together with tools; tool_choice none leaves them out")
    if must and grammars is None:
        raise wrong("tool_choice", _NO_GRAMMAR)
    # If only the model's own response template knows its calls, and none has to come, they are not constrained.
    knows = service.speaks_of_tools or service.reading.template is None or must
    if grammars is not None and (tools or form.is_channelled) and knows:
        try:
            grammar, lazy = reply_grammar(
                grammars, form, tools, grammar, must=must, several=several, most_reasoning=most
            )
        except Problem as problem:
            if must or not tools or problem.status != 400:  # a reply is the same at every budget
                raise
            why = f": {problem.message}"
    if tools and grammar is None and not lazy:
        wanted.ignored += wanted.strict
        wanted.notes.append(f"calls are not kept to the schemas of their tools{why}")
    marks: tuple[int | None, int | None] = (None, None)
    if form.reasoning is not None and not form.is_channelled and service.can_reason:
        first, last = (service.tokenizer.token_id(w) for w in form.reasoning)
        marks = (first, last)
    has_limit = most >= 0 and marks[1] is not None and grammars is not None
    is_limited = has_limit or (form.is_channelled and grammar is not None)
    if service.can_reason and not is_limited:
        if wanted.most_reasoning is not None:
            wanted.ignored.append("thinking.budget_tokens")
        elif most >= 0 and (form.is_channelled or service.settings.reasoning_budget >= 0):
            wanted.notes.append("the tokens of reasoning are not limited")
    if grammar is None and not lazy and not has_limit:
        return
    if grammars is not None:
        needed = [*lazy.values(), *([] if grammar is None else [grammar])]
        ask.grammars = tuple(map(grammars.compiled, needed))
    ask.constraint = lambda: Guide(
        grammars, grammar, is_reasoning=is_reasoning, reasoning=marks, most_reasoning=most,
        lazy=lazy, several=several,
    )  # fmt: skip


def _grammar(service: Service, form: tuple[str, str, Any] | None) -> str | None:
    """Returns the grammar of a form of answers, see `Wanted.form`; None for free text.

    Raises:
        Problem: the form cannot be enforced, or the server runs without grammars.
    """
    if form is None:
        return None
    kind, param, value = form
    if service.grammars is None:
        raise wrong(param, _NO_GRAMMAR)
    make: Callable[[str, Any], str] = {
        "json": service.grammars.json_schema, "regex": service.grammars.regex,
        "choice": service.grammars.choice, "gbnf": service.grammars.gbnf, "lark": service.grammars.lark,
    }[kind]  # fmt: skip
    return make(param, value)

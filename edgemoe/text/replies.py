"""Parsers that split a reply, while it is generated, into reasoning, answer and tool calls.

Each family of models marks these parts with its own words, which `reply_format` finds by the chat template. A parser
never fails: text that begins like a call and is none becomes part of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from edgemoe.text import calls
from edgemoe.text.calls import ToolCall
from edgemoe.text.stops import overlap

__all__ = [
    "FORMATS", "Event", "Piece", "ReplyFormat", "ReplyParser", "joined", "parser", "reply_format",
]  # fmt: skip

Schemas = Mapping[str, Any]
"""The parameters of each tool, by its name: a JSON schema."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of text of a reply."""

    kind: Literal["content", "reasoning"]
    text: str


Event = Piece | ToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyFormat:
    """The format in which a family of models writes replies."""

    name: str
    signs: tuple[str, ...]
    """Words of which at least one occurs in the family's chat template."""
    opener: str
    """The word that begins tool calls."""
    closer: str
    """The word that ends them; "" if they end with the reply."""
    read: Callable[[str, Schemas], list[ToolCall] | None]
    """Reads the text between `opener` and `closer`; returns None if it is no call."""
    before: str
    """The text of one whole call before its arguments, from which a grammar is made; {name} is the tool's name."""
    after: str
    """The text of one whole call after its arguments."""
    reasoning: tuple[str, str] | None = None
    """The words before and after reasoning."""
    is_channelled: bool = False
    """Whether the whole reply is in channels, as gpt-oss writes it; `read` then gets a channel's head and text."""
    inner: tuple[str, ...] = ()
    """Further words that occur inside calls."""

    def markers(self, *, tools: bool) -> tuple[str, ...]:
        """Returns the words that a parser must get as text, even if they are special tokens."""
        if self.is_channelled:
            return calls.CHANNEL_MARKS
        words = [*(self.reasoning or ())]
        words += [mark for word in words for mark in calls.markers(word)]
        if tools:
            words += [
                *calls.markers(self.before),
                *calls.markers(self.after),
                self.opener,
                self.closer,
                *self.inner,
            ]
        return tuple(dict.fromkeys(w for w in words if w))


_THINK = ("<think>", "</think>")

FORMATS = (
    ReplyFormat(
        name="harmony", signs=("<|channel|>",), opener="<|channel|>", closer="<|call|>",
        read=calls.in_channel, reasoning=("<|channel|>analysis<|message|>", "<|end|>"), is_channelled=True,
        before="<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>", after="<|call|>",
    ),
    ReplyFormat(
        name="kimi", signs=("<|tool_calls_section_begin|>",), opener="<|tool_calls_section_begin|>",
        closer="<|tool_calls_section_end|>", read=calls.kimi, reasoning=_THINK,
        before="<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>",
        after="<|tool_call_end|><|tool_calls_section_end|>",
    ),
    ReplyFormat(
        name="deepseek", signs=("<｜tool▁calls▁begin｜>",), opener="<｜tool▁calls▁begin｜>",
        closer="<｜tool▁calls▁end｜>", read=calls.deepseek, reasoning=_THINK,
        before="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
        after="<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    ReplyFormat(
        name="gemma4", signs=("<|tool_call>",), opener="<|tool_call>", closer="<tool_call|>",
        read=calls.gemma, reasoning=("<|channel>thought\n", "<channel|>"), inner=(calls.GEMMA_QUOTE,),
        before="<|tool_call>call:{name}", after="<tool_call|>",
    ),
    ReplyFormat(
        name="lfm2", signs=("<|tool_call_start|>", "<|tool_list_start|>"), opener="<|tool_call_start|>",
        closer="<|tool_call_end|>", read=calls.pythonic, reasoning=_THINK,
        before='<|tool_call_start|>[{"name": "{name}", "arguments": ', after="}]<|tool_call_end|>",
    ),
    ReplyFormat(
        name="granite3", signs=("<|tool_call|>",), opener="<|tool_call|>", closer="",
        read=calls.json_calls, before='<|tool_call|>[{"name": "{name}", "arguments": ', after="}]",
    ),
    ReplyFormat(
        name="mistral", signs=("[TOOL_CALLS]",), opener="[TOOL_CALLS]", closer="",
        read=calls.mistral, before='[TOOL_CALLS][{"name": "{name}", "arguments": ', after="}]",
        reasoning=("[THINK]", "[/THINK]"),
    ),
    ReplyFormat(
        name="tagged", signs=("<tool_call>",), opener="<tool_call>", closer="</tool_call>",
        read=calls.tagged, reasoning=_THINK,
        before='<tool_call>\n{"name": "{name}", "arguments": ', after="}\n</tool_call>",
    ),
)  # fmt: skip
"""All formats, in the order in which their signs are looked for; the last is also the fallback."""


def reply_format(template: str) -> tuple[ReplyFormat, bool]:
    """Returns the format of a model with a chat template, and whether the template contains that format's signs.

    Where it contains none, the format is the one that most models have seen, `tagged`.
    """
    for form in FORMATS:
        if any(sign in template for sign in form.signs):
            return form, True
    return FORMATS[-1], False


class _Text:
    """Text that arrives in pieces and is searched for words; a possible beginning of a word is held back."""

    def __init__(self) -> None:
        self.held = ""

    def until(self, words: Collection[str]) -> tuple[str, str]:
        """Takes the text before the first of `words`, and that word; if there is none, the text that is surely no part
        of one, and ""."""
        found = [(at, -len(w), w) for w in words if (at := self.held.find(w)) >= 0]
        if found:
            at, _, word = min(found)
            before, self.held = self.held[:at], self.held[at + len(word) :]
            return before, word
        keep = max((overlap(self.held, w) for w in words), default=0)
        cut = len(self.held) - keep
        before, self.held = self.held[:cut], self.held[cut:]
        return before, ""

    def rest(self) -> str:
        """Takes all text."""
        text, self.held = self.held, ""
        return text


class ReplyParser:
    """A parser that splits a reply into pieces of text and tool calls. One thread at a time."""

    def __init__(self, form: ReplyFormat, schemas: Schemas | None, *, is_reasoning: bool) -> None:
        """Starts a reply.

        Args:
            form: the model's format.
            schemas: the schemas of the tools that may be called; None for no tools: what looks like a call is text.
            is_reasoning: the prompt has opened the reasoning already.
        """
        self._form, self._schemas, self._text = form, schemas, _Text()
        self._state: Literal["content", "reasoning", "call"] = "content"
        if is_reasoning and form.reasoning is not None:
            self._state = "reasoning"
        self._call = self._spaces = ""
        self._is_fresh = (
            self._state == "reasoning"
        )  # spaces after a marker do not belong to the text
        self.calls = 0

    @property
    def state(self) -> str:
        """What the next text will belong to: "content", "reasoning" or "call"."""
        return self._state

    def push(self, text: str) -> list[Event]:
        """Takes more text and returns the events that are certain by now."""
        self._text.held += text
        out: list[Event] = []
        while self._step(out):
            pass
        return joined(out)

    def flush(self) -> list[Event]:
        """Ends the reply and returns the last events."""
        out: list[Event] = []
        rest = self._text.rest()
        if self._state == "call":
            self._call += rest
            self._read(out, closer="")
        elif self._state == "content":
            self._say(out, rest)
            if self._spaces:
                out.append(Piece("content", self._spaces))
                self._spaces = ""
        elif rest:
            self._say(out, rest)
        return joined(out)

    def _step(self, out: list[Event]) -> bool:
        """Handles the held text up to the next marker; returns whether there was a marker."""
        form = self._form
        if self._state == "reasoning":
            assert form.reasoning is not None
            text, word = self._text.until([form.reasoning[1]])
            self._say(out, text)
            if word:
                self._state, self._is_fresh, self._spaces = "content", True, ""
        elif self._state == "call":
            text, word = self._text.until([form.closer] if form.closer else [])
            self._call += text
            if word:
                self._read(out, closer=word)
        else:
            words = [] if form.reasoning is None else [form.reasoning[0]]
            if self._schemas is not None:
                words.append(form.opener)
            text, word = self._text.until(words)
            self._say(out, text)
            if word:
                self._spaces = ""
                is_call = word == form.opener and self._schemas is not None
                self._state, self._is_fresh = ("call", False) if is_call else ("reasoning", True)
        return bool(word)

    def _say(self, out: list[Event], text: str) -> None:
        """Passes text on, without the spaces after a marker and before one."""
        if self._is_fresh:
            text = text.lstrip()
            self._is_fresh = not text
        if not text:
            return
        text = self._spaces + text
        self._spaces = ""
        if self._state == "reasoning" or self._schemas is not None:
            kept = text.rstrip()
            self._spaces, text = text[len(kept) :], kept
        if text:
            out.append(Piece("reasoning" if self._state == "reasoning" else "content", text))

    def _read(self, out: list[Event], *, closer: str) -> None:
        """Reads a whole call; what cannot be read is text."""
        found = self._form.read(self._call, self._schemas or {})
        if found is None:
            out.append(Piece("content", self._form.opener + self._call + closer))
        else:
            out.extend(found)
            self.calls += len(found)
        self._call, self._state, self._is_fresh = "", "content", True


_TO = " to="


class _Channels:
    """A parser of replies in channels, as gpt-oss writes them. One thread at a time."""

    def __init__(self, form: ReplyFormat, schemas: Schemas | None) -> None:
        self._form, self._schemas, self._text = form, schemas, _Text()
        self._head: str | None = None
        """The head of the present channel; None outside all channels, as before the first mark."""
        self._lead: str | None = ""
        """The beginning of the reply, as long as it may be the recipient of the first message; None afterwards."""
        self._body = ""
        self._is_headed = False
        self.calls = 0

    @property
    def state(self) -> str:
        """What the next text will belong to: "content", "reasoning" or "call"."""
        if self._head is not None and self._is_headed:
            if calls.recipient(self._head):
                return "call"
            if calls.channel(self._head) == "analysis":
                return "reasoning"
        return "content"

    def push(self, text: str) -> list[Event]:
        """Takes more text and returns the events that are certain by now."""
        self._text.held += text
        out: list[Event] = []
        while True:
            text, word = self._text.until(calls.CHANNEL_MARKS)
            self._take(out, text)
            if not word:
                return joined(out)
            self._mark(out, word)

    def flush(self) -> list[Event]:
        """Ends the reply and returns the last events."""
        out: list[Event] = []
        self._take(out, self._text.rest())
        self._mark(out, "<|end|>")
        return joined(out)

    def _take(self, out: list[Event], text: str) -> None:
        if not text:
            return
        if self._lead is not None:
            self._lead += text
            if _TO.startswith(self._lead[: len(_TO)]):
                return
            text, self._lead = self._lead, None
        if self._head is not None and not self._is_headed:
            self._head += text
        elif self.state == "call":
            self._body += text
        else:
            out.append(Piece("reasoning" if self.state == "reasoning" else "content", text))

    def _mark(self, out: list[Event], word: str) -> None:
        lead, self._lead = self._lead, None
        if lead and word == "<|channel|>":
            self._head = lead
        elif lead:
            out.append(Piece("content", lead))
        if word == "<|constrain|>":
            self._head = (self._head or "") + " "
        elif word == "<|message|>":
            self._head, self._is_headed, self._body = self._head or "", True, ""
        else:
            if self.state == "call":
                found = self._form.read(f"{self._head}<|message|>{self._body}", self._schemas or {})
                if found is None or self._schemas is None:
                    out.append(Piece("content", self._body))
                else:
                    out.extend(found)
                    self.calls += len(found)
            is_head = word in ("<|channel|>", "<|start|>")
            head = f"{self._head or ''}<|channel|>" if word == "<|channel|>" else ""
            self._head, self._is_headed, self._body = (head if is_head else None), False, ""


def parser(
    form: ReplyFormat, schemas: Schemas | None, *, is_reasoning: bool
) -> ReplyParser | _Channels:
    """Returns a parser for one reply in a format; see `ReplyParser` for the arguments."""
    if form.is_channelled:
        return _Channels(form, schemas)
    return ReplyParser(form, schemas, is_reasoning=is_reasoning)


def joined(events: Sequence[Event]) -> list[Event]:
    """Returns the events, with neighbouring pieces of the same kind joined."""
    out: list[Event] = []
    for kind, run in groupby(
        events, lambda event: event.kind if isinstance(event, Piece) else None
    ):
        if kind is None:
            out += run
        else:
            out.append(
                Piece(kind, "".join(piece.text for piece in run if isinstance(piece, Piece)))
            )
    return out

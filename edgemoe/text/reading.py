"""How a model's replies are parsed: by its own `response_template`, else by the format that its chat template shows."""

from __future__ import annotations

import functools
from typing import Protocol

from edgemoe.errors import FormatError
from edgemoe.text.replies import Event, Schemas, parser, reply_format
from edgemoe.text.response_template import ResponseTemplate, TemplateParser
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["Reader", "Reading"]


class Reader(Protocol):
    """A parser of one reply."""

    @property
    def state(self) -> str:
        """What the next text will belong to: "content", "reasoning" or "call"."""

    def push(self, text: str) -> list[Event]:
        """Takes more text and returns the events that are certain by now."""

    def flush(self) -> list[Event]:
        """Ends the reply and returns the last events."""


class Reading:
    """The way in which a model's replies are parsed. Immutable."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Reads a model's templates."""
        self._tokenizer, self._source = tokenizer, tokenizer.chat_template
        self.form, self.speaks_of_tools = reply_format(self._source)
        """The format of calls that are forced, and whether the chat template itself shows that format."""
        self.template: ResponseTemplate | None = None
        self.note = ""
        """Why the model's own response template is not followed; "" if it is, or there is none."""
        if tokenizer.response_template is not None:
            try:
                self.template = ResponseTemplate(tokenizer.response_template)
            except (FormatError, ImportError) as error:
                self.note = f"replies are read as {self.form.name}: {error}"

    @property
    def name(self) -> str:
        """The name of the format."""
        return self.form.name if self.template is None else "response_template"

    @property
    def reasons(self) -> bool:
        """Whether the model may reason before it answers."""
        if self.template is not None and self.template.reasons:
            return True
        words = self.form.reasoning or ()
        return "enable_thinking" in self._source or any(w in self._source for w in words)

    def is_opened(self, prompt: str) -> bool:
        """Returns whether a prompt ends with the words that open the reply's reasoning."""
        form = self.form
        opener = "" if form.is_channelled or form.reasoning is None else form.reasoning[0]
        return bool(opener) and prompt.rstrip().endswith(opener.rstrip())

    def shown(self, *, tools: bool) -> frozenset[int]:
        """Returns the special tokens that a reader must get as text, though users do not see them."""
        words = self.form.markers(tools=tools)
        found = {i for w in words if (i := self._tokenizer.token_id(w)) is not None}
        return self._named | found

    @functools.cached_property
    def _named(self) -> frozenset[int]:
        """The special tokens that occur in the model's own response template."""
        template, text = self.template, self._tokenizer.token_text
        if template is None:
            return frozenset()
        return frozenset(i for i in self._tokenizer.special_ids if template.speaks_of(text(i)))

    def reader(self, schemas: Schemas | None, prompt: str, *, must_call: bool = False) -> Reader:
        """Returns a parser for one reply.

        Args:
            schemas: the schemas of the tools that may be called; None for no tools: what looks like a call is text.
            prompt: the prompt that the reply follows.
            must_call: a grammar forces the reply to be a call, in the format `form`.
        """
        if self.template is not None and not must_call:
            return TemplateParser(self.template, schemas, prompt)
        return parser(self.form, schemas, is_reasoning=self.is_opened(prompt))

"""How the replies of a model are read: by its own `response_template`, else by what its chat template shows."""

from __future__ import annotations

import functools
from typing import Protocol

from edgemoe.errors import FormatError
from edgemoe.text.replies import Event, Schemas, parser, reply_format
from edgemoe.text.response_template import ResponseTemplate, TemplateParser
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["Reader", "Reading"]


class Reader(Protocol):
    """Takes one reply apart."""

    @property
    def state(self) -> str:
        """In what the next text will be: content, reasoning or call."""

    def push(self, text: str) -> list[Event]:
        """Takes more text and returns what is certain by now."""

    def flush(self) -> list[Event]:
        """Ends the reply."""


class Reading:
    """Knows how a model writes. Immutable."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Looks at a model's templates."""
        self._tokenizer, self._source = tokenizer, tokenizer.chat_template
        self.form, self.speaks_of_tools = reply_format(self._source)
        """How calls are written that must come, and whether the chat template itself says so."""
        self.template: ResponseTemplate | None = None
        self.note = ""
        """Why the model's own template is not followed."""
        if tokenizer.response_template is not None:
            try:
                self.template = ResponseTemplate(tokenizer.response_template)
            except (FormatError, ImportError) as error:
                self.note = f"replies are read as {self.form.name}: {error}"

    @property
    def name(self) -> str:
        """What the format is called."""
        return self.form.name if self.template is None else "response_template"

    @property
    def reasons(self) -> bool:
        """Whether the model may reason before it answers."""
        if self.template is not None and self.template.reasons:
            return True
        words = self.form.reasoning or ()
        return "enable_thinking" in self._source or any(w in self._source for w in words)

    def is_opened(self, prompt: str) -> bool:
        """Returns whether a prompt has opened the reasoning of the reply."""
        form = self.form
        opener = "" if form.is_channelled or form.reasoning is None else form.reasoning[0]
        return bool(opener) and prompt.rstrip().endswith(opener.rstrip())

    def shown(self, *, tools: bool) -> frozenset[int]:
        """Returns the tokens that a reader has to see, though they are not shown."""
        words = self.form.markers(tools=tools)
        found = {i for w in words if (i := self._tokenizer.token_id(w)) is not None}
        return self._named | found

    @functools.cached_property
    def _named(self) -> frozenset[int]:
        """The special tokens that the model's own template speaks of."""
        template, text = self.template, self._tokenizer.token_text
        if template is None:
            return frozenset()
        return frozenset(i for i in self._tokenizer.special_ids if template.speaks_of(text(i)))

    def reader(self, schemas: Schemas | None, prompt: str, *, must_call: bool = False) -> Reader:
        """Returns what takes a reply apart.

        Args:
            schemas: of the tools that may be called; None for none: what looks like a call is text.
            prompt: that the reply follows.
            must_call: a grammar makes it a call, in the words of `form`.
        """
        if self.template is not None and not must_call:
            return TemplateParser(self.template, schemas, prompt)
        return parser(self.form, schemas, is_reasoning=self.is_opened(prompt))

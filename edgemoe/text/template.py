"""Chat templates, which render messages to a prompt as transformers does, in a sandbox and within limits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from edgemoe.errors import FormatError
from edgemoe.text.jinja.interpreter import Program
from edgemoe.text.jinja.meter import Meter
from edgemoe.text.jinja.sandbox import Sandbox

__all__ = ["ChatTemplate"]

_LARGEST_SOURCE = 128 << 10  # characters; the longest known template has 17,000
_MOST_TOKENS = 32 << 10  # each takes about 120 bytes once parsed
_MOST_DIGITS = 1000  # the lexer takes 270 bytes for each digit of a number
_LONGEST_ERROR = 300


class ChatTemplate:
    """The parsed chat template, or named templates, of one model.

    Templates come with the model file and are not trusted: they see JSON values only, and their
    steps and memory are limited. Immutable.
    """

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, str]) -> None:
        """Parses the templates.

        Args:
            sources: Jinja text by name; "default" is for chats, "tool_use" for those with tools.
            variables: variables that every template sees, such as `bos_token`.

        Raises:
            FormatError: a template is not valid Jinja, with the line, or is far too long.
        """
        self._sandbox = Sandbox()
        self._variables = dict(variables)
        self._templates = {n: _parsed(self._sandbox, n, text) for n, text in sources.items()}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        most_characters: int | None = None,
        **kwargs: Any,
    ) -> str:
        """Returns the prompt for `messages`.

        Args:
            messages: {"role": ..., "content": ...} and other keys that the template uses; JSON values.
            add_generation_prompt: end with the words that open the assistant's reply.
            most_characters: longer prompts are refused; None for the limit of any template.
            kwargs: further variables of the template, such as `tools` or `enable_thinking`.

        Raises:
            ValueError: there are no messages, the template refuses them (its words, in one line), or it
                takes more steps or memory than any honest template.
            FormatError: none of the model's templates is for chats.
        """
        if not messages:
            raise ValueError("chat template: expected at least one message, got none")
        try:
            # After a round trip through JSON there is no object whose methods a template could call.
            # Keys without a value are dropped, as in transformers: many templates print "None".
            plain = json.dumps([{k: v for k, v in m.items() if v is not None} for m in messages])
            variables = json.dumps({"tools": None, "documents": None} | kwargs)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"chat template: messages must be JSON values; {error}") from None
        given = json.loads(variables)
        template = self._choose(with_tools=given["tools"] is not None)
        given = {
            **self._variables,
            **given,
            "messages": json.loads(plain),
            "add_generation_prompt": add_generation_prompt,
        }
        meter = Meter(len(plain) + len(variables))
        meter.know(given)
        pieces, count = [], 0
        try:
            for piece in template.run(self._sandbox, given, meter):
                pieces.append(piece)
                count += len(piece)
                if most_characters is not None and count > most_characters:
                    raise ValueError(f"it makes a prompt of more than {most_characters} characters")
        except Exception as error:  # a template can raise any of Python's errors
            raise ValueError(f"chat template: {_one_line(error)}") from None
        return "".join(pieces)

    def _choose(self, *, with_tools: bool) -> Program:
        for name in ("tool_use",) * with_tools + ("default",):
            if name in self._templates:
                return self._templates[name]
        raise FormatError(
            f"chat template: none is named default, only {', '.join(sorted(self._templates))}"
        )


def _parsed(sandbox: Sandbox, name: str, source: str) -> Program:
    where = f"chat template {name!r}"
    if len(source) > _LARGEST_SOURCE:
        raise FormatError(
            f"{where}: expected at most {_LARGEST_SOURCE} characters, got {len(source)}"
        )
    if re.search(rf"[\d_]{{{_MOST_DIGITS}}}", source):
        raise FormatError(f"{where}: has a number of more than {_MOST_DIGITS} digits")
    try:
        if sum(1 for _ in sandbox.lexer.tokeniter(source, None)) > _MOST_TOKENS:
            raise FormatError(f"{where}: has more than {_MOST_TOKENS} words")
        return Program(sandbox.parse(source))
    except FormatError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise FormatError(f"{where}, line {error.lineno}: {_one_line(error)}") from None
    except Exception as error:  # deep nesting is a RecursionError
        raise FormatError(f"{where}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    message = getattr(error, "message", None) or str(error)
    text = " ".join(str(message).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_ERROR else text[:_LONGEST_ERROR] + "…"

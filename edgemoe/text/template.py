"""Chat templates: renders messages to a prompt as transformers does, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgemoe.errors import FormatError

__all__ = ["ChatTemplate"]


class ChatTemplate:
    """Is one compiled template, or the named templates of one model.

    Templates come with the model file and are not trusted: they see JSON values only. Immutable.
    """

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, str]) -> None:
        """Compiles the templates.

        Args:
            sources: Jinja text by name; "default" is for chats, "tool_use" for those with tools.
            variables: what every template sees, such as `bos_token`.

        Raises:
            FormatError: a template does not compile; says the line.
        """
        environment = _environment()
        self._variables = dict(variables)
        self._templates = {n: _compile(environment, n, text) for n, text in sources.items()}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Returns the prompt for `messages`.

        Args:
            messages: {"role": ..., "content": ...} and what else the template knows; JSON values.
            add_generation_prompt: end with the words that open the assistant's reply.
            kwargs: further variables of the template, such as `tools` or `enable_thinking`.

        Raises:
            ValueError: there are no messages, or the template refuses them; its words, in one line.
            FormatError: no template of the model is for chats.
        """
        if not messages:
            raise ValueError("chat template: expected at least one message, got none")
        try:
            # A round trip through JSON leaves no object whose methods a template could call.
            # Keys without a value are dropped, as transformers does: many templates print "None".
            plain = json.loads(
                json.dumps([{k: v for k, v in m.items() if v is not None} for m in messages])
            )
            variables = json.loads(json.dumps({"tools": None, "documents": None} | kwargs))
        except (TypeError, AttributeError) as error:
            raise ValueError(f"chat template: messages must be JSON values; {error}") from None
        template = self._choose(with_tools=variables["tools"] is not None)
        variables = self._variables | variables
        try:
            return template.render(
                messages=plain, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as error:  # a template can fail in any way that Python can
            raise ValueError(f"chat template: {_one_line(error)}") from None

    def _choose(self, *, with_tools: bool) -> jinja2.Template:
        for name in ("tool_use",) * with_tools + ("default",):
            if name in self._templates:
                return self._templates[name]
        raise FormatError(
            f"chat template: none is named default, only {', '.join(sorted(self._templates))}"
        )


class _Generation(Extension):
    """Accepts `{% generation %}`, with which templates mark the assistant's words for training."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_words"), [], [], body).set_lineno(line)

    def _words(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """Stands for Jinja's `dict`: Python's own type would be a way out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """Is Jinja's namespace without underscored names, a way to Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _compile(environment: ImmutableSandboxedEnvironment, name: str, source: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        where = f"chat template {name!r}, line {error.lineno}"
        raise FormatError(f"{where}: {_one_line(error)}") from None
    except Exception as error:  # deep nesting and huge constants fail in Python's own compiler
        raise FormatError(f"chat template {name!r}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    message = getattr(error, "message", None) or str(error)
    return " ".join(str(message).split()) or type(error).__name__

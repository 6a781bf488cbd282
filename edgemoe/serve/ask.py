"""What is asked for: `Wanted` by a request of any dialect, and `Ask` of the engine."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgemoe.runtime.requests import Constraint
from edgemoe.serve.grammar import Compiled
from edgemoe.text.replies import Schemas
from edgemoe.text.sampler import SamplingParams

__all__ = ["Ask", "Wanted"]


@dataclass(slots=True, kw_only=True)
class Wanted:
    """What a request wants, independent of the dialect."""

    sampling: dict[str, Any] = field(default_factory=dict)
    """Fields of `SamplingParams`; None for those that the client did not set."""
    choices: int = 1
    """How many replies are wanted."""
    top: int | None = None
    """See `Request`."""
    tool_choice: str = "auto"
    """"auto", "none", "required", or "=" and a tool's name."""
    several_calls: bool = True
    """Whether the reply may have more than one call."""
    thinks: bool | None = None
    """Whether the model reasons; None for its default."""
    effort: str | None = None
    """The effort of reasoning, as the client named it."""
    most_reasoning: int | None = None
    """The most tokens of reasoning, -1 for no limit; None for the server's setting."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the chat template."""
    form: tuple[str, str, Any] | None = None
    """The form that the answer must follow: its kind ("json", "regex", "choice", "gbnf" or "lark"), the field of the
    request that asks for it, and the field's value."""
    slot: int | None = None
    """See `Request`."""
    reuses: bool = True
    """See `Request`."""
    adapter: int = 0
    """See `Request`."""
    keep_alive: float | None = None
    """Seconds without a request after which experts leave memory, from now on for the whole server; None keeps it."""
    strict: list[str] = field(default_factory=list)
    """The fields that ask for calls that follow their tool's schema; without effect where no grammar sees to it."""
    ignored: list[str] = field(default_factory=list)
    """The fields of the request that have no effect."""
    notes: list[str] = field(default_factory=list)
    """See `Ask`."""

    @property
    def must_call(self) -> bool:
        """Whether a tool has to be called."""
        return self.tool_choice == "required" or self.tool_choice.startswith("=")


@dataclass(slots=True, kw_only=True)
class Ask:
    """What a request of any dialect asks of the engine."""

    ids: array[int]
    """The tokens of the prompt."""
    params: SamplingParams
    choices: int = 1
    """How many replies are wanted."""
    top: int | None = None
    """See `Request`."""
    echo: bool = False
    """Whether the reply repeats the prompt."""
    is_raw: bool = False
    """Whether the model continues a text, without reasoning and calls."""
    schemas: Schemas | None = None
    """The schemas of the tools that may be called; None for no tools."""
    prompt: str = ""
    """The end of a chat's prompt, as text."""
    must_call: bool = False
    """Whether a grammar makes the reply a call."""
    constraint: Callable[[], Constraint | None] = lambda: None
    """Makes the constraint of one choice; None for none."""
    grammars: tuple[Compiled, ...] = ()
    """The grammars of the constraint, which stay compiled."""
    said_bytes: int = 0
    """Bytes that its answer may take beside texts: choices, and their log-probabilities."""
    several_calls: bool = True
    """Whether the reply may have more than one call."""
    slot: int | None = None
    """See `Request`."""
    reuses: bool = True
    """See `Request`."""
    adapter: int = 0
    """See `Request`."""
    keep_alive: float | None = None
    """See `Wanted`."""
    ignored: list[str] = field(default_factory=list)
    """The fields of the request that have no effect."""
    notes: list[str] = field(default_factory=list)
    """What was done otherwise than the request may expect, one line each."""

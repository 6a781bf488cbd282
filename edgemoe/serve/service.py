"""What all dialects share: turns a conversation and what is wanted into tokens, and these into replies."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import edgemoe
from edgemoe.errors import FormatError
from edgemoe.runtime.batching import Batcher, QueueFull
from edgemoe.runtime.opening import Opened
from edgemoe.runtime.pool import PrefixPool
from edgemoe.runtime.prefixes import PrefixStore
from edgemoe.runtime.profile import ProfileFile
from edgemoe.runtime.requests import Constraint, Outcome
from edgemoe.serve.desk import Desk
from edgemoe.serve.figures import ServerFigures
from edgemoe.serve.grammar import Grammars
from edgemoe.serve.guide import Guide
from edgemoe.serve.log import Asked, RequestLog, asked_now
from edgemoe.serve.problems import Problem, too_long, wrong
from edgemoe.serve.prompts import Conversation, render
from edgemoe.serve.reply import Ask, Reply
from edgemoe.serve.settings import Settings
from edgemoe.serve.worker import Worker
from edgemoe.text.calls import markers
from edgemoe.text.jinja.meter import Meter
from edgemoe.text.reading import Reading
from edgemoe.text.sampler import SamplingParams
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["Service", "Wanted"]

logger = logging.getLogger(__name__)

_LOOKED_AT = 4096  # characters at the end of a prompt that may be the beginning of the reply
_NO_GRAMMAR = "cannot be kept to: this server was started with --no-grammar"
_SURELY_LONG = 8  # characters per token; text has about four


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

    @property
    def must_call(self) -> bool:
        """Whether a tool has to be called."""
        return self.tool_choice == "required" or self.tool_choice.startswith("=")


class Service:
    """One model that is ready to answer requests.

    The model runs on a thread of its own (`Worker`). The methods here run on the event loop's thread, or on threads
    that it starts.
    """

    def __init__(
        self, opened: Opened, settings: Settings, *, name: str, sampling: SamplingParams,
        on_death: Callable[[BaseException], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Takes an opened model.

        Args:
            opened: the model; `close` saves its profile.
            settings: how the server is run.
            name: the model's name.
            sampling: how replies are sampled by default.
            on_death: is called, on the model's thread, when that thread dies.

        Raises:
            FormatError: the model has no tokenizer, or its chat template is broken.
            OSError: the folder of prefixes cannot be made or read.
            ValueError: prefixes cannot be kept in memory here.
        """
        tokenizer = opened.text.tokenizer
        if tokenizer is None:
            raise FormatError("serve: the model has no tokenizer, so that it takes ids only")
        tokenizer.read_templates()
        self.opened, self.settings, self.sampling = opened, settings, sampling
        self.model, self.tokenizer = opened.model, tokenizer
        self.names = (*settings.aliases, name) if settings.aliases else (name,)
        self.context = self.model.budget.context
        self.reading = Reading(tokenizer)
        self.form, self.speaks_of_tools = self.reading.form, self.reading.speaks_of_tools
        if self.reading.note:
            logger.warning("%s", self.reading.note)
        self.started = int(time.time())
        self.figures, self.log = ServerFigures(), RequestLog()
        eos = opened.text.eos_ids
        self.grammars = (
            Grammars(tokenizer, self.model.config.vocab_size, sorted(eos))
            if settings.has_grammar
            else None
        )
        self.is_stopping = False
        self.store = self.pool = None
        if settings.prefixes is not None:
            self.store = PrefixStore(
                settings.prefixes, self.model, most_bytes=settings.prefix_bytes
            )
        if settings.pool_bytes:
            self.pool = PrefixPool(self.model, most_bytes=settings.pool_bytes, below=self.store)
        batcher = Batcher(
            self.model, eos, most_waiting=settings.queue,
            prefixes=self.store if self.pool is None else self.pool,
        )  # fmt: skip
        self.desk = Desk(batcher)
        self.worker = Worker(batcher, on_death)
        self.worker.keep_alive = settings.keep_alive

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides which text a seed gives now; see `_fingerprint`."""
        return _fingerprint(self.opened)

    @property
    def batcher(self) -> Batcher:
        """The batcher, which runs the requests."""
        return self.worker.batcher

    @property
    def can_reason(self) -> bool:
        """Whether the model may reason before it answers, according to its templates."""
        return self.reading.reasons

    def adapter(self, model: str | None, name: str | None = None) -> int:
        """Returns the number of the adapter that a request asks for; 0 for the model alone.

        As only one model is served, any name of a model stands for it. The names "MODEL:ADAPTER" and "ADAPTER" stand
        for one of its adapters.

        Args:
            model: the request's "model".
            name: the request's "adapter", which takes precedence.

        Raises:
            Problem: there is no such adapter.
        """
        there, param = self.model.adapters, "adapter"
        if name is None and model is not None and model not in self.names:
            base, _, last = model.rpartition(":")
            param = "model"
            if last in there.names or (there.names and base in self.names):
                name = last
        try:
            return there.number(name)
        except ValueError as error:
            said = str(error).removeprefix("adapter: ")
            raise Problem(404, f"{param}: {said}", param=param, code="model_not_found") from None

    def note(self, ignored: Sequence[str]) -> None:
        """Counts fields of a request that have no effect, and logs those that are new; with --strict, refuses them.

        Raises:
            Problem: there is one, and the server is strict.
        """
        if ignored and self.settings.is_strict:
            name = ignored[0].partition(": ")[0]
            raise wrong(name, "has no effect here, and --strict refuses what has none")
        for name in self.figures.ignored(ignored):
            logger.warning("a client sends %s, which has no effect here", name[:80])

    def shown(self, adapter: int) -> str:
        """Returns the name of the model with an adapter, as replies show it."""
        name = self.names[0]
        return f"{name}:{self.model.adapters.names[adapter - 1]}" if adapter else name

    def sampled(self, said: Mapping[str, Any]) -> SamplingParams:
        """Returns how a reply is sampled: as the request says, else as the server's `sampling` says.

        Args:
            said: fields of `SamplingParams`; None for those that the request does not set.

        Raises:
            Problem: a value is out of range.
        """
        given = {name: value for name, value in said.items() if value is not None}
        try:
            return replace(self.sampling, **given)
        except ValueError as error:
            name, _, rest = str(error).removeprefix("sampling: ").partition(": ")
            raise wrong(name, rest) from None

    def converse(self, talk: Conversation, wanted: Wanted) -> Ask:
        """Returns what is asked of the engine for a conversation. Rendering and tokenizing may take a while.

        Raises:
            Problem: something in the conversation or in `wanted` is wrong, or the prompt is too long.
        """
        params = self.sampled(wanted.sampling)
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
        text = self.rendered(talk, variables)
        ids = self.encoded(text, "messages", add_special=not self.tokenizer.has_chat_template)
        is_reasoning = self.reading.is_opened(text)
        ask = Ask(
            ids=ids, params=params, choices=wanted.choices, top=wanted.top, ignored=wanted.ignored,
            schemas={t["name"]: t.get("parameters") or {} for t in tools} if tools else None,
            prompt=text[-_LOOKED_AT:], must_call=wanted.must_call, several_calls=wanted.several_calls, slot=wanted.slot,
            reuses=wanted.reuses, keep_alive=wanted.keep_alive, adapter=wanted.adapter,
        )  # fmt: skip
        most = (
            self.settings.reasoning_budget
            if wanted.most_reasoning is None
            else wanted.most_reasoning
        )
        ask.constraint = self._constraint(
            wanted, tools, is_reasoning, 0 if thinks is False else most
        )
        return ask

    def rendered(self, talk: Conversation, variables: Mapping[str, Any]) -> str:
        """Returns the prompt of a conversation, as text.

        Raises:
            Problem: the template refuses it, or it takes too much memory.
        """
        said = "".join(map(json.dumps, (talk.messages, talk.tools, variables)))
        given = len(said)
        few = Tokenizer.most_bytes(said[: _SURELY_LONG * self.context])  # tokenizing comes next
        self.desk.need(max(Meter.most_bytes(given), few))
        return render(
            self.tokenizer, talk, self.form, variables=variables,
            most_characters=_SURELY_LONG * self.context + 2 * given + 4096,
        )  # fmt: skip

    def _constraint(
        self, wanted: Wanted, tools: Sequence[Mapping[str, Any]], is_reasoning: bool, most: int
    ) -> Callable[[], Constraint | None]:
        """Returns a function that makes the constraint of a choice, or None if nothing is constrained.

        Args:
            wanted: what the request wants.
            tools: those that may be called.
            is_reasoning: the prompt has opened the reasoning already.
            most: the most tokens of reasoning; -1 for no limit.
        """
        form, grammars, several = self.form, self.grammars, wanted.several_calls
        lazy: dict[int, str] = {}
        grammar = self.grammar(wanted.form)
        must = wanted.must_call
        if wanted.form is not None and tools:
            raise wrong(wanted.form[1], "not together with tools; tool_choice none leaves them out")
        if must and grammars is None:
            raise wrong("tool_choice", _NO_GRAMMAR)
        # If only the model's own response template knows its calls, and none has to come, they are not constrained.
        knows = self.speaks_of_tools or self.reading.template is None or must
        if grammars is not None and (tools or form.is_channelled) and knows:
            grammar, lazy = grammars.reply(
                form, tools, grammar, must=must, several=several, most_reasoning=most
            )
        if tools and grammar is None and not lazy:
            wanted.ignored += wanted.strict
        marks: tuple[int | None, int | None] = (None, None)
        if form.reasoning is not None and not form.is_channelled and self.can_reason:
            first, last = (self.tokenizer.token_id(w) for w in form.reasoning)
            marks = (first, last)
        has_limit = most >= 0 and marks[1] is not None and grammars is not None
        is_limited = has_limit or (form.is_channelled and grammar is not None)
        if wanted.most_reasoning is not None and self.can_reason and not is_limited:
            wanted.ignored.append("thinking.budget_tokens")
        if grammar is None and not lazy and not has_limit:
            return lambda: None
        return lambda: Guide(
            grammars, grammar, is_reasoning=is_reasoning, reasoning=marks, most_reasoning=most,
            lazy=lazy, several=several,
        )  # fmt: skip

    def grammar(self, form: tuple[str, str, Any] | None) -> str | None:
        """Returns the grammar of a form of answers, see `Wanted.form`; None for free text.

        Raises:
            Problem: the form cannot be enforced, or the server runs without grammars.
        """
        if form is None:
            return None
        kind, param, value = form
        if self.grammars is None:
            raise wrong(param, _NO_GRAMMAR)
        make: Callable[[str, Any], str] = {
            "json": self.grammars.json_schema, "regex": self.grammars.regex,
            "choice": self.grammars.choice, "gbnf": self.grammars.gbnf, "lark": self.grammars.lark,
        }[kind]  # fmt: skip
        return make(param, value)

    def continue_text(
        self, ids: list[int], params: SamplingParams, wanted: Wanted, *, echo: bool
    ) -> Ask:
        """Returns what is asked of the engine to continue a text.

        Args:
            ids: the tokens of the text.
            params: how to sample.
            wanted: what the request wants.
            echo: the reply repeats the text.

        Raises:
            Problem: the form cannot be enforced.
        """
        grammar = self.grammar(wanted.form)
        grammars = self.grammars
        ask = Ask(
            ids=ids, params=params, choices=wanted.choices, top=wanted.top, echo=echo, is_raw=True,
            ignored=wanted.ignored, slot=wanted.slot, reuses=wanted.reuses, keep_alive=wanted.keep_alive,
            adapter=wanted.adapter,
        )  # fmt: skip
        if grammar is not None:
            ask.constraint = lambda: Guide(grammars, grammar)
        return ask

    def encoded(
        self, text: str, param: str, *, add_special: bool, may_be_empty: bool = False
    ) -> list[int]:
        """Returns the tokens of a prompt.

        Raises:
            Problem: the text is not valid Unicode, has no tokens and must have some, is too long for the context, or
                takes too much memory.
        """
        few = text[: _SURELY_LONG * self.context]
        try:
            self.desk.need(Tokenizer.most_bytes(few))
            if len(few) < len(text) and (count := len(self.tokenizer.encode(few))) >= self.context:
                raise too_long(param, len(text) * count // len(few), self.context, is_estimate=True)
            self.desk.need(Tokenizer.most_bytes(text))
            ids = self.tokenizer.encode(text, add_special=add_special)
        except ValueError as error:
            raise wrong(param, str(error)) from None
        if not ids and not may_be_empty:
            raise wrong(param, "expected some text, got none")
        return ids

    def begin(self, ask: Ask, choice: int = 0, *, streams: bool = True) -> Reply:
        """Submits a choice to the engine.

        Args:
            ask: what is asked.
            choice: the number of the choice.
            streams: its parts are passed on as they come.

        Raises:
            Problem: the prompt is too long, too many requests wait, or the server is stopping.
        """
        asked = asked_now.get() or Asked()
        if self.is_stopping:
            raise Problem(503, "the server is stopping", retry_after=10)
        if self.worker.error is not None:
            raise Problem(500, "the engine has failed; the server ends")
        if len(ask.ids) > self.context - (ask.params.max_tokens != 0):
            raise too_long("prompt" if ask.is_raw else "messages", len(ask.ids), self.context)
        if ask.keep_alive is not None:
            self.worker.keep_alive = ask.keep_alive

        def ended(outcome: Outcome) -> None:
            self.figures.reply(outcome)
            self.log.reply(asked, outcome, ask.ignored)

        reply = Reply(ask, choice, self.tokenizer, self.reading, ended, streams=streams)
        try:
            self.batcher.submit(reply.request)
        except QueueFull as error:
            after = max(1, int(self.figures.pace * self.settings.queue / len(self.batcher.views)))
            raise Problem(429, str(error), retry_after=after) from None
        except ValueError as error:
            raise Problem(400, str(error)) from None
        except RuntimeError as error:
            raise Problem(503, str(error)) from None
        asked.is_logged = True
        return reply

    def close(self) -> None:
        """Ends the model's thread, and saves the prefixes, the trace and the profile.

        Raises:
            OSError: the profile or the trace cannot be written.
        """
        self.is_stopping = True
        self.worker.stop()
        profile, model = self.opened.profile, self.model
        has_died = self.worker.error is not None
        with contextlib.ExitStack() as rest:  # all of it, also where something of it fails
            if profile is not None and not has_died:
                rest.callback(self._learn, profile)
            if model.experts.observer is not None:
                rest.callback(model.experts.observer.close)
            if not has_died:
                self.batcher.save()

    def _learn(self, profile: ProfileFile) -> None:
        """Writes what was learned."""
        learned = profile.learned(self.model.store, self.model.scheduler)
        if learned is not None:
            profile.write(learned)

    def tool_words(self) -> str:
        """Returns the name of the format of calls, for a note at start."""
        return (
            self.reading.name
            if self.speaks_of_tools or self.reading.template is not None
            else f"generic ({' '.join(markers(self.form.opener))})"
        )


def _fingerprint(opened: Opened) -> str:
    """Returns a hash of everything that decides which text a seed gives.

    That is the version of edgemoe, the model and its bits, the scheduler and its options, the types of keys and values,
    and the adapters.
    """
    model, o = opened.model, opened.model.options
    dense: object = o.dense_bits
    if dense == "auto":  # each matrix has its own bits
        dense = [tensor.most for tensor in model.moe.tensors.values()]
    said = json.dumps([
        edgemoe.__version__, str(model.moe.source), model.config.family, model.config.experts_per_token,
        hashlib.sha256(model.top_bits.tobytes()).hexdigest(), dense, o.scheduler,
        str(sorted(o.options.items())), repr(o.kv_types),
        *(file.digest() for file in model.adapters.files),
    ])  # fmt: skip
    return "em_" + hashlib.sha256(said.encode()).hexdigest()[:12]

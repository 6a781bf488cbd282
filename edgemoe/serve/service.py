"""What all dialects share: the model that is served, with its queue, its figures and its log."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable

import edgemoe
from edgemoe.errors import FormatError
from edgemoe.runtime.batching import Batcher, QueueFull
from edgemoe.runtime.opening import Opened
from edgemoe.runtime.pool import PrefixPool
from edgemoe.runtime.prefix_store import PrefixStore
from edgemoe.runtime.profile import ProfileFile
from edgemoe.runtime.requests import Outcome
from edgemoe.serve.ask import Ask
from edgemoe.serve.desk import Desk
from edgemoe.serve.figures import ServerFigures
from edgemoe.serve.grammar import Grammars
from edgemoe.serve.log import Asked, RequestLog, asked_now
from edgemoe.serve.problems import Problem, too_long, wrong
from edgemoe.serve.reply import Reply
from edgemoe.serve.settings import Settings
from edgemoe.serve.worker import Worker
from edgemoe.text.calls import markers
from edgemoe.text.reading import Reading
from edgemoe.text.sampler import SamplingParams

__all__ = ["Service"]

logger = logging.getLogger(__name__)

# Of fields without effect, as an answer and the log name them:
_MOST_IGNORED, _LONGEST_NAME = 32, 80


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
            Grammars(
                tokenizer,
                self.model.config.vocab_size,
                sorted(eos),
                spare=self.model.room.spare // self.model.options.sequences,
                need=lambda size: self.desk.need(size),
                made=self.model.room.take_in,
            )
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

    def note(self, ignored: list[str]) -> None:
        """Counts fields of a request that have no effect, and logs those that are new; with --strict, refuses them.

        Args:
            ignored: their names; shortened to what the answer and the log keep of them.

        Raises:
            Problem: there is one, and the server is strict.
        """
        ignored[:] = dict.fromkeys(name[:_LONGEST_NAME] for name in ignored)
        if len(ignored) > _MOST_IGNORED:
            ignored[_MOST_IGNORED:] = [f"{len(ignored) - _MOST_IGNORED} more fields"]
        if ignored and self.settings.is_strict:
            name = ignored[0].partition(": ")[0]
            raise wrong(name, "has no effect here, and --strict refuses what has none")
        for name in self.figures.ignored(ignored):
            logger.warning("a client sends %s, which has no effect here", name)

    def shown(self, adapter: int) -> str:
        """Returns the name of the model with an adapter, as replies show it."""
        name = self.names[0]
        return f"{name}:{self.model.adapters.names[adapter - 1]}" if adapter else name

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

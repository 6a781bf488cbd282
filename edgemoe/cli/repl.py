"""The interactive chat: replies, commands, and what Ctrl-C and Ctrl-D do."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe.cli.chat_words import COMMANDS, STATS
from edgemoe.cli.console import argument_text, check_output, error_line, note, write_reply
from edgemoe.cli.line import LineReader
from edgemoe.cli.prompt import read_text
from edgemoe.cli.reasoning import KINDS, apart, set_reasoning
from edgemoe.cli.stats import say_stats, stats_table, too_long
from edgemoe.cli.waiting import watched
from edgemoe.errors import FormatError, size_text
from edgemoe.runtime.adapters import NO_ADAPTER
from edgemoe.runtime.chat import TooLong, saved_messages

if TYPE_CHECKING:
    from edgemoe.runtime.chat import Chat
    from edgemoe.runtime.engine import Engine

__all__ = ["interact"]

_AT_START = ("dense_bits", "ram", "ctx_size", "context", "threads")
"""Settings that only a flag can change, when the model is opened."""

_LIVE = ("bits", "experts", "scheduler")
"""Settings that the engine can change while it is open."""

_QUOTES = '"""'
"""A line of these alone begins a message of several lines, and another such line ends it."""

_COMMAND = re.compile(r"/([A-Za-z]+|\?)( [^\n]*)?")

_WORDS = ("exit", "quit", "bye", "clear", "help", "?")
"""Words that people type when they mean a command."""

_WILD = 2.0
"""A temperature above this gets a warning."""

_SHORT = {"temp": "temperature", "n": "max_tokens", "predict": "max_tokens", "s": "seed"}
"""Other names that /set understands: those of the flags, where they differ from those of the fields."""


def interact(
    engine: Engine,
    chat: Chat,
    *,
    name: str,
    stats: str = "short",
    reasoning: str = "dim",
    keep: Callable[[], None] | None = None,
    keeps_history: bool = True,
) -> int:
    """Chats until the user leaves.

    Args:
        engine: makes the replies; the caller closes it.
        chat: the conversation to go on with.
        name: what the model is called in the greeting.
        stats: the line after a reply: "short", "full" or "off".
        reasoning: how reasoning is shown: "dim", "fold" or "off".
        keep: is called whenever the conversation may have changed.
        keeps_history: keep what is typed for later chats.

    Returns:
        The exit code, 0.

    Raises:
        BrokenPipeError: nobody reads the replies any more.
    """
    note(f"# {_greeting(engine, name)}")
    session = _Session(engine, chat, stats, reasoning)
    reader = LineReader(sorted(session.commands), keeps_history=keeps_history)
    interrupts = 0
    while not session.is_over:
        try:
            line = reader.read()
            if is_block := line.strip() == _QUOTES:
                line = reader.read_block(_QUOTES)
        except EOFError:
            return 0
        except KeyboardInterrupt:
            interrupts = interrupts + 1 if reader.was_empty else 0
            if interrupts > 1:
                note("# Ctrl-D or /quit leaves")
            continue
        except ValueError as error:
            note(f"# {error_line(error)}")
            continue
        interrupts = 0
        try:
            (session.say if is_block else session.take)(line)
        except KeyboardInterrupt:
            note("# stopped")
        except BrokenPipeError:
            raise
        except (ValueError, OSError, MemoryError) as error:  # the chat goes on
            note(f"# {error_line(error)}")
        _kept(keep)
    return 0


def _kept(keep: Callable[[], None] | None) -> None:
    try:
        if keep is not None:
            keep()
    except OSError as error:
        note(f"# {error_line(error)}")


def _greeting(engine: Engine, name: str) -> str:
    """Returns the line at the start: what runs, how precisely, in how much memory, and how to leave."""
    budget, bits = engine.budget, engine.expert_bits
    precision = f"{bits.max()}" if bits.min() == bits.max() else f"{bits.mean():.1f}"
    share = budget.slots / budget.experts
    fit = "all experts fit" if share >= 1 else f"{100 * share:.0f}% of the experts fit"
    return (
        f"{name}: {'lossy' if engine.notes else 'exact'}, {precision} bits, {fit} in {size_text(budget.ram)}, "
        f"{engine.context} tokens of context; /help lists the commands, Ctrl-D leaves"
    )


class _Session:
    """The state of a chat, and its commands."""

    def __init__(
        self, engine: Engine, chat: Chat, stats: str = "short", reasoning: str = "dim"
    ) -> None:
        self.is_over = False
        self._reasoning = reasoning
        self._stats = stats
        self._engine = engine
        self._chat = chat
        self.commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/clear": self._reset,
            "/stats": lambda _: note(*stats_table(self._engine.stats).split("\n")),
            "/set": self._set,
            "/bits": self._bits,
            "/adapter": self._adapter,
            "/save": self._save,
            "/load": self._load,
            "/regenerate": lambda _: self.say(self._chat.undo()),
            "/undo": self._undo,
            "/system": self._system,
            "/read": self._read,
            "/reasoning": self._show_reasoning,
            "/sessions": self._sessions,
            "/?": self._help,
            "/help": self._help,
            "/quit": self._quit,
            "/exit": self._quit,
            "/bye": self._quit,
        }

    def take(self, line: str) -> None:
        """Runs a command, or says the line to the model.

        A command is one line that begins with a slash and letters; a path, a comment or pasted code is a message.
        """
        if line.strip() in _WORDS:
            raise ValueError(
                f"/{line.strip()} is the command; a space before it says it to the model"
            )
        if not _COMMAND.fullmatch(line):
            self.say(line.removeprefix(" ") if line.startswith(" /") else line)
            return
        name, _, rest = line.strip().partition(" ")
        command = self.commands.get(name)
        if command is None:
            raise ValueError(
                f"{name}: unknown command; /help lists them, and a space before it says it to the model"
            )
        command(rest.strip())

    def say(self, text: str) -> None:
        """Says a text to the model, and writes the reply."""
        if not text.strip():
            return
        text = argument_text(text, "the text")
        with contextlib.closing(self._chat.pieces(text)) as reply:
            try:
                write_reply(apart(watched(self._engine, reply), self._reasoning))
            except KeyboardInterrupt:
                note("# stopped")
            except TooLong as error:
                raise too_long(self._engine, error) from None
        say_stats(self._engine, self._stats)
        if self._chat.finish == "context":
            note("# the context is full: /reset starts anew, -c makes it larger")

    def _help(self, rest: str) -> None:
        note(*(STATS if rest == "stats" else COMMANDS).split("\n"))

    def _sessions(self, _: str) -> None:
        from edgemoe.cli.sessions import listed

        names = [f"# {name}" for name in listed()]
        end = "goes on with one" if names else "keeps one; there are none yet"
        note(*names, f"# edgemoe-run --session NAME {end}")

    def _reset(self, _: str) -> None:
        self._chat.reset()
        note("# the conversation is empty")

    def _undo(self, _: str) -> None:
        self._chat.undo()
        note(f"# taken back; {len(self._chat.messages)} messages are left")

    def _system(self, rest: str) -> None:
        self._chat.instruct(argument_text(rest, "/system"))
        note("# the model is told this first" if rest else "# the model is told nothing first")

    def _show_reasoning(self, rest: str) -> None:
        if rest:
            if rest not in KINDS:
                raise ValueError(f"/reasoning: expected one of {', '.join(KINDS)}, got {rest!r}")
            set_reasoning(self._chat, rest)
            self._reasoning = rest
            note(f"# reasoning: {rest}")
            return
        replies = [m for m in self._chat.messages if m["role"] == "assistant"]
        text = replies[-1].get("reasoning_content", "") if replies else ""
        note(*text.split("\n")) if text else note("# the last reply has none")

    def _read(self, rest: str) -> None:
        path = _path("/read", rest)
        with open(path, "rb") as file:
            self.say(read_text(file, str(path), lend=self._engine.lend))

    def _set(self, rest: str) -> None:
        params = self._chat.params
        name, _, text = rest.partition(" ")
        name = _SHORT.get(name, name).replace("-", "_")
        if not name:
            plain, own = dataclasses.asdict(type(params)()), self._engine.sampling
            engine = self._engine
            live = {
                "bits": engine.bits, "experts": engine.config.experts_per_token,
                "scheduler": engine.options.scheduler,
            }  # fmt: skip
            note(
                *(f"{n:<24}{v}" for n, v in live.items()),
                *(
                    f"{n:<24}{_shown(v)}{'  (the model asks for it)' * (v == getattr(own, n) != plain[n])}"
                    for n, v in dataclasses.asdict(params).items()
                ),
            )
            return
        if name in _LIVE:
            self._change(name, text.strip())
            return
        if name not in {f.name for f in dataclasses.fields(params)}:
            if name in _AT_START:
                flag = "-c" if name in ("ctx_size", "context") else f"--{name.replace('_', '-')}"
                raise ValueError(f"/set: {name} is set when the model is opened: {flag} VALUE")
            if name == "system":
                raise ValueError("/set: /system TEXT says what the model is told first")
            raise ValueError(f"/set: no setting is called {name!r}; /set alone lists them")
        # The default's type: a model's own settings may say 1 where 1.0 is meant.
        value = _parsed(name, text.strip(), type(getattr(type(params)(), name)))
        self._chat.params = dataclasses.replace(params, **{name: value})
        note(f"# {name} is {_shown(value)}")
        if name == "temperature" and value > _WILD:
            note(f"# above {_WILD} most tokens are as likely as any other")

    def _bits(self, rest: str) -> None:
        if rest:
            self._change("bits", rest)
            return
        engine = self._engine
        levels = ", ".join(
            str(bits) for bits, _, _ in engine.model.moe.ladder if bits <= engine.model.most_bits
        )
        note(f"# experts run at {engine.bits} bits; there are {levels}")

    def _adapter(self, rest: str) -> None:
        engine = self._engine
        if rest:
            engine.adapter = rest
        there = ", ".join((NO_ADAPTER, *engine.adapters))
        note(f"# adapter: {engine.adapter or NO_ADAPTER}; there are {there}")

    def _change(self, name: str, text: str) -> None:
        value: int | str = text
        if not text:
            raise ValueError(f"/set {name}: expected a value")
        if name != "scheduler":
            try:
                value = int(text)
            except ValueError:
                command = "/bits" if name == "bits" else f"/set {name}"
                raise ValueError(f"{command}: expected a whole number, got {text!r}") from None
        self._engine.change(**{name: value})
        note(f"# {name}: {value}", *(f"# {line}" for line in self._engine.notes))

    def _save(self, rest: str) -> None:
        path = _path("/save", rest)
        check_output(path)
        if path.is_file() and path.stat().st_size:
            try:
                saved_messages(path, lend=self._engine.lend)
            except FormatError:
                raise FileExistsError(
                    f"{path}: exists and is not a saved chat; it is left as it is"
                ) from None
        self._chat.save(path)
        note(f"# {path}: {len(self._chat.messages)} messages")

    def _load(self, rest: str) -> None:
        path = _path("/load", rest)
        self._chat.load(path)
        note(f"# {path}: {len(self._chat.messages)} messages")

    def _quit(self, _: str) -> None:
        self.is_over = True


def _path(command: str, rest: str) -> Path:
    if not rest:
        raise ValueError(f"{command}: expected a file's name")
    return Path(rest).expanduser()


def _parsed(name: str, text: str, kind: type) -> Any:
    """Returns the value of a setting, which is of type `kind`, from its text."""
    if name == "stop":
        return (text,) if text else ()
    if kind is tuple:
        raise ValueError(f"/set: {name} is the model's own")
    if kind is bool:
        words = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
        if text.lower() not in words:
            raise ValueError(f"/set: {name} is on or off, got {text!r}")
        return words[text.lower()]
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"/set: {name} must be {what}, got {text!r}") from None


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(map(repr, value)) or "none"
    return str(value)

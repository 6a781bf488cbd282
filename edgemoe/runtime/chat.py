"""A conversation with a model: its messages, and replies that are streamed as text."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

from edgemoe.arguments import kind, path_of
from edgemoe.errors import FormatError, OutOfBudget, quoted
from edgemoe.file.parse import parse_json, parsed_bytes
from edgemoe.file.whole import write_whole
from edgemoe.runtime.requests import Constraint
from edgemoe.text.lengths import beginning, most_characters
from edgemoe.text.reading import Reading
from edgemoe.text.replies import Piece, joined
from edgemoe.text.sampler import SamplingParams
from edgemoe.text.stops import ReplyText
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["Chat", "Message", "TextEngine", "TooLong", "saved_messages"]

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}, and "reasoning_content" where an assistant reasoned."""

_WRITTEN = 24  # bytes that a character takes while it is written as JSON, in two pieces
_LARGEST_CHAT = 64 << 20  # bytes of a saved conversation

_ROLES = ("system", "user", "assistant")
_KEPT = ("role", "content", "reasoning_content")


class TooLong(ValueError):
    """The error of a conversation that does not fit the context."""


class TextEngine(Protocol):
    """What a chat needs of an `Engine`."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if its file has one."""

    @property
    def context(self) -> int:
        """The most tokens that a prompt and its reply may have together."""

    @property
    def sampling(self) -> SamplingParams:
        """How replies are sampled unless said otherwise."""

    def lend(self, size: int) -> None:
        """Frees `size` bytes of the budget for the caller, until the next `generate`; or raises OutOfBudget."""

    def generate(
        self, ids: Sequence[int], params: SamplingParams, *, constraint: Constraint | None = None
    ) -> Iterator[int]:
        """Yields the tokens that follow `ids`, without the one that ends the reply."""


class _Reply:
    """The parser of one reply, which separates text from reasoning while tokens arrive."""

    def __init__(self, chat: Chat, params: SamplingParams, prompt: str) -> None:
        shown = chat._reading.shown(tools=False) if chat._reasons else ()
        tokenizer = chat._tokenizer
        self.made = ReplyText(tokenizer, params.stop, continues=chat._is_raw, shown=shown)
        self._parser = chat._reading.reader(None, prompt) if chat._reasons else None
        self._texts = {"content": "", "reasoning": ""}

    def push(self, token: int) -> list[Piece]:
        """Takes a token, and returns the pieces that later tokens cannot change any more."""
        text = self.made.push(token)
        if self._parser is None:
            return [Piece("content", text)] if text else []
        return [e for e in self._parser.push(text) if isinstance(e, Piece)] if text else []

    def flush(self) -> list[Piece]:
        """Ends the reply, and returns the pieces that were held back."""
        text = self.made.flush()
        if self._parser is None:
            return [Piece("content", text)] if text else []
        events = [*self._parser.push(text), *self._parser.flush()]
        return [e for e in joined(events) if isinstance(e, Piece)]

    def message(self, *pieces: Piece) -> Message:
        """Adds pieces to the reply, and returns the reply so far as a message."""
        for piece in pieces:
            self._texts[piece.kind] += piece.text
        message = {"role": "assistant", "content": self._texts["content"]}
        if self._texts["reasoning"]:
            message["reasoning_content"] = self._texts["reasoning"]
        return message


class Chat:
    """One conversation with a model. One thread at a time, and one reply at a time."""

    def __init__(
        self,
        engine: TextEngine,
        *,
        system: str | None = None,
        params: SamplingParams | None = None,
        raw: bool = False,
    ) -> None:
        """Starts an empty conversation.

        Args:
            engine: generates the tokens. The caller still closes it.
            system: the system message; None for none.
            params: how replies are sampled; None for the model's settings. `Chat.params` may be replaced between
                replies.
            raw: use no chat template: the model continues the text. Always so if the model has no template.

        Raises:
            FormatError: the model has no tokenizer, or its chat template is broken.
            ValueError: an argument is of the wrong type.
        """
        if engine.tokenizer is None:
            raise FormatError("chat: the model has no tokenizer, so that it takes ids only")
        if system is not None:
            kind("chat: system", system, str)
        self.params = (
            engine.sampling if params is None else kind("chat: params", params, SamplingParams)
        )
        self._engine = engine
        self._tokenizer: Tokenizer = engine.tokenizer
        self._is_raw = raw or not engine.tokenizer.has_chat_template
        if not self._is_raw:  # parsing takes memory for a moment: now, before experts fill theirs
            engine.tokenizer.read_templates()
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._system)
        self._finish: Literal["stop", "length", "context"] | None = None
        self._reply: Generator[Piece, None, None] | None = None
        self._reading = Reading(engine.tokenizer)
        self._reasons = not self._is_raw and self._reading.reasons
        self.variables: Mapping[str, Any] = {}
        """Variables for the chat template, such as {"enable_thinking": False}."""
        self.constraint: Callable[[list[int]], Constraint] | None = None
        """Makes the constraint of each reply from the tokens of its prompt; None for none."""

    @property
    def messages(self) -> list[Message]:
        """The conversation so far: a copy, oldest first, the system message included."""
        return [dict(m) for m in self._messages]

    @property
    def is_raw(self) -> bool:
        """Whether the model continues the text, without a chat template, instead of answering turns."""
        return self._is_raw

    @property
    def must_reason(self) -> bool:
        """Whether the model reasons and its template has no variable `enable_thinking` to switch that off."""
        return self._reasons and "enable_thinking" not in self._tokenizer.chat_template

    @property
    def note(self) -> str:
        """Why the model's own `response_template` is not followed; "" if it is, or if there is none."""
        return "" if self._is_raw else self._reading.note

    @property
    def finish(self) -> Literal["stop", "length", "context"] | None:
        """Why the last reply ended; None while it runs, or if it was interrupted.

        "stop": the model or a stop text ended it; "length": it has `max_tokens`; "context": the context is full.
        """
        return self._finish

    def say(self, text: str) -> Generator[str, None, None]:
        """Yields the reply to `text`, without its reasoning, in pieces as they are made.

        What has been yielded is in `messages`, however the reply ends: closed half-way, by an error, by Ctrl-C. A reply
        that is interrupted before its first piece leaves the conversation as it was. A new `say` closes the reply
        before it.

        Raises:
            ValueError: `text` is not a string, the conversation does not fit the context (`TooLong`), or the template
                refuses it. Apart from the type of `text`, errors are raised by the first step and not by the call.
            OutOfBudget: there is no memory to tokenize the conversation.
        """
        return self._answer(self.pieces(text))

    @staticmethod
    def _answer(pieces: Generator[Piece, None, None]) -> Generator[str, None, None]:
        with contextlib.closing(pieces):
            for piece in pieces:
                if piece.kind == "content":
                    yield piece.text

    def pieces(self, text: str) -> Generator[Piece, None, None]:
        """Yields the reply as `say` does, with its reasoning where the model marks it; see `Piece.kind`."""
        kind("say", text, str)
        self._close_reply()
        self._reply = self._say(text)
        return self._reply

    def reset(self) -> None:
        """Forgets the conversation, but not the system message."""
        self._close_reply()
        self._messages = list(self._system)

    def undo(self) -> str:
        """Takes back the last question and its reply, and returns the question.

        Raises:
            ValueError: nothing was asked yet.
        """
        self._close_reply()
        asked = [i for i, m in enumerate(self._messages) if m["role"] == "user"]
        if not asked:
            raise ValueError("nothing was asked yet")
        question = self._messages[asked[-1]]["content"]
        self._messages = self._messages[: asked[-1]]
        return question

    def instruct(self, system: str) -> None:
        """Replaces the system message; "" removes it.

        Raises:
            ValueError: `system` is not a string.
        """
        kind("system", system, str)
        self._close_reply()
        rest = self._messages[len(self._system) :]
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages = [*self._system, *rest]

    def save(self, path: str | os.PathLike[str], *, is_private: bool = False) -> None:
        """Writes the conversation to a JSON file: {"messages": [...]}.

        An existing file is replaced as a whole or not at all, and keeps its mode. A symbolic link is followed. Anything
        but a regular file, such as a device, is written to directly.

        Args:
            is_private: a new file can be read by its owner alone.

        Raises:
            OSError: the file cannot be written; its name is in the error.
        """
        target = path_of("path", path)
        text = json.dumps({"messages": self._messages}, ensure_ascii=False, indent=1) + "\n"
        write_whole(target, text.encode(errors="surrogatepass"), is_private=is_private)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replaces the conversation, system message included, with a saved one.

        Raises:
            OSError: the file cannot be read.
            FormatError: the file is not a saved conversation; this one stays as it was.
            OutOfBudget: there is no memory to read it; likewise.
        """
        messages = saved_messages(path, lend=self._engine.lend)
        self._close_reply()
        self._messages = messages
        self._system = [m for m in messages[:1] if m["role"] == "system"]

    def _say(self, text: str) -> Generator[Piece, None, None]:
        self._finish = None
        params = self.params
        turn = [*self._messages, {"role": "user", "content": text}]
        ids, prompt = self._prompt(turn)
        said = _Reply(self, params, prompt)
        count = 0
        # A file may name only the base model's end token, while turns end with another.
        ends = () if params.ignore_eos or self._is_raw else self._tokenizer.eos_ids
        # `_Reply` looks for stop texts, in the text as it is shown.
        more = {} if self.constraint is None else {"constraint": self.constraint(ids)}
        generator = self._engine.generate(ids, replace(params, stop=()), **more)
        with contextlib.closing(generator):  # type: ignore[type-var]
            for token in generator:
                if token in ends:
                    break
                count += 1
                for piece in said.push(token):
                    self._messages = [*turn, said.message(piece)]
                    yield piece
                if said.made.is_stopped:
                    break
        rest = said.flush()
        self._messages = [*turn, said.message(*rest)]
        if said.made.is_stopped:
            self._finish = "stop"
        elif count == params.max_tokens:
            self._finish = "length"
        elif len(ids) + count >= self._engine.context:
            self._finish = "context"
        else:
            self._finish = "stop"
        yield from rest

    def _prompt(self, messages: Sequence[Message]) -> tuple[list[int], str]:
        """Returns a conversation as the tokens and the text of a prompt.

        Raises:
            ValueError: the conversation is empty, or the template refuses it.
            TooLong: it does not fit the context.
            OutOfBudget: there is no memory for it.
        """
        own = 2 * sum(sys.getsizeof(m["content"]) for m in messages)  # and joined
        self._engine.lend(own)
        text = "".join(m["content"] for m in messages)
        self._check_length(text, own)
        if not self._is_raw:
            from edgemoe.text.jinja.meter import Meter  # with Jinja, which raw chats need not load

            # All that the template sees, reasoning too; what is no JSON is the template's to refuse.
            self._engine.lend(own + _WRITTEN * len(text))
            given = len(json.dumps([messages, self.variables], default=str))
            most = most_characters(given, self._engine.context)
            self._engine.lend(own + Meter.most_bytes(given))
            text = self._tokenizer.render_chat(messages, most_characters=most, **self.variables)
            self._check_length(text, own)
        self._engine.lend(own + Tokenizer.most_bytes(text))
        ids = self._tokenizer.encode(text, add_special=self._is_raw)
        if not ids:
            raise ValueError("say: expected some text, got none")
        if len(ids) >= self._engine.context:
            raise TooLong(
                f"say: the conversation is too long for the context; expected less than "
                f"{self._engine.context} tokens, got {len(ids)}"
            )
        return ids, text

    def _check_length(self, text: str, beside: int) -> None:
        """Refuses a text that is far too long before it is tokenized, as that takes many times the text's memory.

        Args:
            text: the text.
            beside: bytes of what is in memory of the conversation.
        """
        context = self._engine.context
        few = beginning(text, context)
        if len(few) == len(text):
            return
        self._engine.lend(beside + Tokenizer.most_bytes(few))
        if len(self._tokenizer.encode(few)) >= context:
            raise TooLong(
                f"say: the conversation is too long for the context; expected less than "
                f"{context} tokens, got {len(text)} characters"
            )

    def _close_reply(self) -> None:
        if self._reply is not None:
            self._reply.close()
            self._reply = None


def saved_messages(path: str | os.PathLike[str], *, lend: Callable[[int], None]) -> list[Message]:
    """Returns the messages of a saved conversation.

    Args:
        path: the file.
        lend: makes room for so many bytes until it is called again; or raises OutOfBudget.

    Raises:
        OSError: the file cannot be read.
        FormatError: it is not a saved conversation.
        OutOfBudget: there is no memory to read it.
    """
    source = path_of("path", path)
    is_file = source.is_file()
    size = source.stat().st_size if is_file else 0
    if (source.exists() and not (is_file or source.is_dir())) or size > _LARGEST_CHAT:
        raise FormatError(f"{path}: not a saved chat; expected a file of at most 64 MiB")
    try:
        lend(size)
        content = source.read_bytes()
        lend(len(content) + parsed_bytes(content))
    except OutOfBudget as error:
        raise OutOfBudget(f"{path}: {error}") from None
    try:
        messages = parse_json(content, "chat", most=_LARGEST_CHAT)["messages"]
        if not all(m["role"] in _ROLES and isinstance(m["content"], str) for m in messages):
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise FormatError(
            f'{path}: not a saved chat; expected {{"messages": [{{"role", "content"}}, ...]}}'
        ) from None
    for i, message in enumerate(messages):
        for name, value in message.items():
            if value is not None and (name not in _KEPT or not isinstance(value, str)):
                raise FormatError(  # the conversation would lose it
                    f"{path}: not a saved chat: messages[{i}] has {quoted(name)}; "
                    f"expected text in {', '.join(_KEPT)} alone"
                )
    return [{name: text for name, text in m.items() if text is not None} for m in messages]

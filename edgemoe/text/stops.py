"""The text of a reply while its tokens are generated, up to the first stop text, however that is split into tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from edgemoe.text.stream import TextStream

__all__ = ["ReplyText", "StopFilter", "overlap"]


class _Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def stream(
        self, *, skip_special: bool = ..., continues: bool = ..., shown: Collection[int] = ...
    ) -> TextStream: ...

    def special_text(self, token: int) -> str: ...


class ReplyText:
    """The text of a reply, from its tokens. Special tokens are not shown, but may stop it. One thread at a time."""

    def __init__(
        self,
        tokenizer: _Decoder,
        stops: Sequence[str],
        *,
        continues: bool,
        shown: Collection[int] = (),
    ) -> None:
        """Starts a reply.

        Args:
            tokenizer: the model's tokenizer.
            stops: texts that end the reply.
            continues: the reply goes on in the middle of a text, so that a leading space counts.
            shown: special tokens whose text is returned all the same.
        """
        self._tokenizer = tokenizer
        self._shown = frozenset(shown)
        self._stream = tokenizer.stream(continues=continues, shown=self._shown)
        self._filter = StopFilter(stops)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop text was met."""
        return self._filter.is_stopped

    @property
    def stopped_by(self) -> str | None:
        """Which stop text was met."""
        return self._filter.stopped_by

    def push(self, token: int) -> str:
        """Takes the next token and returns the text that is surely before any stop text, often empty."""
        hidden = self._tokenizer.special_text(token)
        if hidden and token not in self._shown:
            return self._filter.push(hidden, is_hidden=True)
        return self._filter.push(self._stream.push(token))

    def flush(self) -> str:
        """Ends the reply and returns what was held back: nothing after a stop text."""
        text = self._filter.push(self._stream.flush())
        return text if self.is_stopped else text + self._filter.flush()


class StopFilter:
    """A filter that passes text on up to the first stop text, and never a part of one. One thread at a time."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Watches for any of `stops`; an empty sequence lets all text through."""
        self._stops = tuple(stops)
        self._held = ""
        self._is_shown = b""  # one byte for every character of what is held
        self.is_stopped = False
        """Whether a stop text was met."""
        self.stopped_by: str | None = None
        """Which stop text was met."""

    def push(self, text: str, *, is_hidden: bool = False) -> str:
        """Takes more text and returns what is surely before any stop text.

        Args:
            text: the next text.
            is_hidden: search the text for stop texts, but do not pass it on.
        """
        if self.is_stopped or not text:
            return ""
        if not self._stops:
            return "" if is_hidden else text
        self._held += text
        self._is_shown += bytes([not is_hidden]) * len(text)
        found = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if (
            found
        ):  # of several, the one that ends first: then it does not matter how the text is cut
            self.is_stopped = True
            end, at = min(found)
            self.stopped_by = self._held[at:end]
            out = self._take(at)
            self._held, self._is_shown = "", b""
            return out
        keep = max((overlap(self._held, s) for s in self._stops), default=0)
        return self._take(len(self._held) - keep)

    def flush(self) -> str:
        """Ends the text and returns what was held back as the possible start of a stop text."""
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        text, is_shown = self._held[:count], self._is_shown[:count]
        self._held, self._is_shown = self._held[count:], self._is_shown[count:]
        return "".join(char for char, shown in zip(text, is_shown, strict=True) if shown)


def overlap(text: str, word: str) -> int:
    """Returns how many characters at the end of `text` may be the start of `word`."""
    if word[0] not in text:
        return 0
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)

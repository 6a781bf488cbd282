"""Decoding of token ids to text while they are generated: one step per token, and never a broken character."""

from __future__ import annotations

import codecs
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from edgemoe.errors import FormatError
from edgemoe.file.parse import parse_json

if TYPE_CHECKING:
    import tokenizers

__all__ = ["TextStream", "TokenBytes", "panics_blamed", "token_bytes"]

TokenBytes = Callable[[str, bool], bytes]
"""Maps a token's text to the bytes that it stands for; the flag says whether it is the first of a text."""

_WINDOW = 4  # tokens of context for a decoder whose rules are not known here


class TextStream:
    """A decoder that takes ids one at a time; the pieces joined are the text of all ids.

    A character that spans tokens is held back until it is whole. Where a model emits bytes that
    are not UTF-8, they become U+FFFD one by one, while `decode` of a byte-fallback tokenizer
    replaces the whole run of bytes, including characters that were already shown.
    One thread at a time.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        to_bytes: TokenBytes | None,
        *,
        skip: frozenset[int],
        continues: bool,
    ) -> None:
        """Starts a text.

        Args:
            backend: maps ids to tokens.
            to_bytes: the result of `token_bytes(backend)`.
            skip: ids that are left out.
            continues: the text continues another one, so that its first space counts.
        """
        self._backend = backend
        self._to_bytes = to_bytes
        self._skip = skip
        self._is_first = not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []

    def push(self, token: int) -> str:
        """Takes the next id and returns the text that it completes, often empty."""
        if token in self._skip or (name := self._backend.id_to_token(token)) is None:
            return ""
        if self._to_bytes is None:
            return self._push_windowed(token)
        piece = self._to_bytes(name, self._is_first)
        self._is_first = False
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """Ends the text and returns what was held back: U+FFFD for half a character."""
        return self._utf8.decode(b"", final=True)

    def _push_windowed(self, token: int) -> str:
        # Such decoders (WordPiece, CTC) emit no single bytes, and look at one neighbour at most.
        def text(ids: list[int]) -> str:
            with panics_blamed():
                return self._backend.decode(ids, skip_special_tokens=False)

        before = text(self._window) if self._window else ""
        after = text([*self._window, token])
        self._window = [*self._window, token][-_WINDOW:]
        return after[len(before) :]


@contextlib.contextmanager
def panics_blamed() -> Iterator[None]:
    """Turns a panic of the tokenizers library, which is no Exception, into an error about the file behind it.

    Raises:
        FormatError: names tokenizer.json: for example, one of its regular expressions may exceed its limit of steps.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise FormatError(f"tokenizer.json: fails: {' '.join(str(error).split())}") from None


def token_bytes(backend: tokenizers.Tokenizer) -> TokenBytes | None:
    """Returns the function from a tokenizer's tokens to bytes; None where its decoder is not known here.

    Known are byte-level BPE (GPT-2 and most since), sentencepiece's metaspace with and without
    byte fallback (Llama 2, Mixtral, Gemma), and the absence of a decoder.
    """
    if backend.decoder is None:
        return lambda token, first: (token if first else " " + token).encode()
    spec: Mapping[str, Any] = parse_json(backend.decoder.__getstate__(), "tokenizer.json")
    while spec["type"] == "Sequence" and len(spec["decoders"]) == 1:
        spec = spec["decoders"][0]
    if spec["type"] == "ByteLevel":
        return _byte_level
    if spec["type"] == "Metaspace":
        prefixed = spec.get("prepend_scheme", "always") != "never"
        return functools.partial(_metaspace, spec["replacement"], prefixed)
    if spec["type"] == "Sequence":
        return _sentencepiece(list(spec["decoders"]))
    return None


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """Returns GPT-2's table: printable bytes stand for themselves, and U+0100 onwards for the other bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level(token: str, first: bool) -> bytes:
    table = _byte_of_char()
    try:
        return bytes([table[char] for char in token])
    except KeyError:  # an added token, whose text is not encoded
        return token.encode()


def _metaspace(mark: str, prefixed: bool, token: str, first: bool) -> bytes:
    return token.replace(mark, "" if first and prefixed else " ").encode()


def _sentencepiece(steps: list[Mapping[str, Any]]) -> TokenBytes | None:
    """Returns the decoder Replace*, ByteFallback?, Fuse?, Strip?, the usual form of sentencepiece models; None if it
    has any other steps."""
    replaces: list[tuple[str, str]] = []
    while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
        step = steps.pop(0)
        replaces.append((step["pattern"]["String"], step["content"]))
    has_fallback = bool(steps) and steps[0]["type"] == "ByteFallback"
    del steps[: int(has_fallback)]
    is_fused = bool(steps) and steps[0]["type"] == "Fuse"
    del steps[: int(is_fused)]
    strip = b""
    if is_fused and steps and steps[0]["type"] == "Strip" and steps[0]["stop"] == 0:
        step = steps.pop(0)
        if step["start"] > 1:
            return None  # it could strip from the second token too
        strip = (step["content"] * step["start"]).encode()
    if steps:
        return None

    def convert(token: str, first: bool) -> bytes:
        for old, new in replaces:
            token = token.replace(old, new)
        text = token.encode()
        if has_fallback and len(token) == 6 and token.startswith("<0x") and token[5] == ">":
            with contextlib.suppress(ValueError):
                text = bytes([int(token[3:5], 16)])
        return text.removeprefix(strip) if first else text

    return convert

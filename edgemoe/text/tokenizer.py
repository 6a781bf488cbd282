"""Text to token ids and back, and chat messages to a prompt, from the files inside a model."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgemoe.arguments import wholes
from edgemoe.errors import FormatError, quoted
from edgemoe.file.parse import parse_object
from edgemoe.space import expect_space
from edgemoe.text.stream import TextStream, TokenBytes, panics_blamed, token_bytes

if TYPE_CHECKING:
    import tokenizers

    from edgemoe.text.template import ChatTemplate

__all__ = ["Tokenizer"]

# Some files name only the end token of the base model, while a chat's turn ends with one of these.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
_SPACE, _SPACE_PER_BYTE = (
    32 << 20,
    24,
)  # bytes of address space, without which the library aborts; SmolLM2's file takes 20 for each byte

_ENCODED_BYTES = (
    512  # for each byte of a text, where every one becomes a token; English takes a third of it
)


class Tokenizer:
    """A model's tokenizer and chat templates: text to ids and back, and messages to a prompt. Immutable."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        templates: Mapping[str, str],
        eos_ids: Sequence[int],
        response_template: object = None,
    ) -> None:
        """Wraps a loaded tokenizer; `from_files` is the usual way.

        Args:
            backend: the loaded tokenizer.json.
            special_tokens: text by name, such as {"bos_token": "<s>"}; templates see them.
            templates: Jinja chat templates by name; empty for none.
            eos_ids: tokens that end a reply.
            response_template: that of tokenizer_config.json, not checked yet (see `edgemoe.text.response_template`);
                None for none.
        """
        self._backend = backend
        self.response_template = response_template
        self._special_tokens = dict(special_tokens)
        self._sources = dict(templates)
        self._eos_ids = tuple(sorted(set(eos_ids)))
        self._special_ids = frozenset(
            i for i, token in backend.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Tokenizer:
        """Builds a tokenizer from a checkpoint's files.

        Args:
            files: content by name: tokenizer.json, and where they exist tokenizer_config.json,
                special_tokens_map.json, chat_template.jinja and generation_config.json.

        Raises:
            FormatError: tokenizer.json is missing, or a file is not what its name says.
        """
        if "tokenizer.json" not in files:
            raise FormatError("tokenizer: expected tokenizer.json, which the model does not have")
        backend = _load(files["tokenizer.json"])
        config = _json(files, "tokenizer_config.json")
        _add_declared_tokens(backend, config)
        special_tokens = _special_tokens(_json(files, "special_tokens_map.json") | config)
        templates = _templates(files, config)
        ends = [special_tokens["eos_token"]] if "eos_token" in special_tokens else []
        ends += [t for t in _END_OF_TURN if t in templates.get("default", "")]
        eos_ids = [i for t in ends if (i := backend.token_to_id(t)) is not None]
        eos_ids += _generation_eos(_json(files, "generation_config.json"))
        return cls(
            backend, special_tokens=special_tokens, templates=templates, eos_ids=eos_ids,
            response_template=config.get("response_template"),
        )  # fmt: skip

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; the model's own V may be larger."""
        return self._backend.get_vocab_size()

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply, ascending: those of the tokenizer, generation config and chat template."""
        return self._eos_ids

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The named special tokens, such as {"eos_token": "</s>"}."""
        return self._special_tokens

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that mark something and are not text, such as the end of a turn."""
        return self._special_ids

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template; without one it only continues text."""
        return bool(self._sources)

    @property
    def chat_template(self) -> str:
        """The source of the template for chats, "" for none."""
        return self._sources.get("default", "")

    @property
    def knows_tools(self) -> bool:
        """Whether a template of the model's writes tools into the prompt."""
        return "tool_use" in self._sources or "tools" in self.chat_template

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Returns the ids of `text`; special tokens that are written in it are recognised.

        Args:
            text: any text.
            add_special: add what the model expects around a text, such as the first token `<s>`.
                Rendered chats have it already.

        Raises:
            ValueError: it is not a string, or holds half of a surrogate pair, which has no UTF-8.
            FormatError: the tokenizer itself fails.
        """
        if not isinstance(text, str):
            raise ValueError(f"encode: expected a text, got {quoted(text)}")
        try:
            with panics_blamed():
                return list(self._backend.encode(text, add_special_tokens=add_special).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise ValueError(f"encode: the text is not valid Unicode; {error}") from None

    @staticmethod
    def most_bytes(text: str) -> int:
        """Returns the memory that encoding a text may take."""
        return _ENCODED_BYTES * len(text.encode(errors="surrogatepass"))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of `ids`; unknown ids are left out, broken UTF-8 becomes U+FFFD.

        Raises:
            ValueError: `ids` are no list of whole numbers from 0.
        """
        checked = wholes("ids", ids, 0)
        with panics_blamed():
            return self._backend.decode(list(checked), skip_special_tokens=skip_special)

    def stream(
        self,
        *,
        skip_special: bool = True,
        continues: bool = False,
        shown: Collection[int] = (),
    ) -> TextStream:
        """Returns a decoder for ids that come one at a time.

        Args:
            skip_special: leave out special tokens.
            continues: the ids go on in the middle of a text, so that a leading space counts.
            shown: special tokens that are not left out.
        """
        skip = self._special_ids.difference(shown) if skip_special else frozenset()
        return TextStream(self._backend, self._bytes, skip=skip, continues=continues)

    def token_id(self, text: str) -> int | None:
        """Returns the token with this text; None if there is none."""
        return self._backend.token_to_id(text)

    def token_text(self, token: int) -> str:
        """Returns a token's own text, special or not; U+FFFD for bytes that are not a whole character."""
        return self.decode([token], skip_special=False)

    def to_json(self) -> str:
        """Returns the tokenizer as the text of a tokenizer.json."""
        return self._backend.to_str()

    def special_text(self, token: int) -> str:
        """Returns the text of a special token, "" for any other token."""
        return (self._backend.id_to_token(token) or "") if token in self._special_ids else ""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        most_characters: int | None = None,
        **kwargs: Any,
    ) -> str:
        """Returns the prompt for a conversation, as transformers' `apply_chat_template` does.

        Without a template the prompt is the messages' text, joined: the model goes on from there.

        Args:
            messages: {"role": "system" | "user" | "assistant" | ..., "content": text}, ...
            add_generation_prompt: end with the words that open the assistant's reply.
            most_characters: longer prompts are refused; None for the limit of any template.
            kwargs: further variables of the template, such as `tools` or `enable_thinking`.

        Raises:
            ValueError: the template refuses the messages (its words, in one line), or takes too many
                steps or too much memory.
            FormatError: the template itself is broken.
        """
        if not self._sources:
            return "".join(str(m.get("content") or "") for m in messages)
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            most_characters=most_characters,
            **kwargs,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        most_characters: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Returns the ids of `render_chat`'s prompt; arguments and errors are the same."""
        text = self.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            most_characters=most_characters,
            **kwargs,
        )
        return self.encode(text, add_special=not self._sources)

    def check_vocabulary(self, size: int) -> None:
        """Checks that every id of the tokenizer is below the model's vocabulary of `size` tokens.

        Raises:
            FormatError: one is not; names the token.
        """
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        token, largest = max(vocabulary.items(), key=lambda entry: entry[1], default=("", -1))
        if largest >= size:
            raise FormatError(
                f"tokenizer.json: token {quoted(token)} has id {largest}; the embedding has {size} rows (vocab_size)"
            )

    def read_templates(self) -> None:
        """Parses the chat templates, which otherwise happens when the first chat is rendered.

        Raises:
            FormatError: a template is broken; says which and where.
        """
        if self._sources:
            _ = self._template

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        from edgemoe.text.template import ChatTemplate  # costs 50 ms, and only chats need it

        return ChatTemplate(self._sources, self._special_tokens)

    @functools.cached_property
    def _bytes(self) -> TokenBytes | None:
        return token_bytes(self._backend)


def _load(content: bytes) -> tokenizers.Tokenizer:
    expect_space(_SPACE + _SPACE_PER_BYTE * len(content), "tokenizer.json")
    import tokenizers  # the largest import of a chat's start; only those who use text pay it

    try:
        with panics_blamed():
            backend = tokenizers.Tokenizer.from_buffer(content)
            backend.no_truncation()  # a training script's settings may be baked in
            backend.no_padding()
            return backend
    except FormatError:
        raise
    except Exception as error:  # the library raises plain Exceptions
        raise FormatError(f"tokenizer.json: {' '.join(str(error).split())}") from None


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Returns the object in a JSON file, empty where the file does not exist."""
    return parse_object(files[name], name) if name in files else {}


def _text(token: object) -> str | None:
    """Returns the text of a special token, which a file gives as it is or as {"content": text}; None for neither."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named = {name: _text(v) for name, v in config.items() if name.endswith("_token")}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, Mapping):
        named |= {name: _text(v) for name, v in extra.items()}
    return {name: text for name, text in named.items() if text is not None}


def _add_declared_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Adds tokens that only tokenizer_config.json declares; where both files have one, its flags win, as in
    transformers."""
    import tokenizers

    declared = config.get("added_tokens_decoder", {})
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    try:
        known = backend.get_added_tokens_decoder()
        tokens = []
        for i, entry in sorted((int(i), entry) for i, entry in declared.items()):
            token = tokenizers.AddedToken(
                entry["content"], **{f: bool(entry[f]) for f in flags if f in entry}
            )
            old = known.get(i)
            same = old is not None and old.content == token.content
            if not same or any(getattr(old, f) != getattr(token, f) for f in flags):
                tokens.append(token)
        if tokens:
            backend.add_tokens(tokens)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"tokenizer_config.json: added_tokens_decoder is malformed; {quoted(error)}"
        ) from None


def _templates(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the chat templates by name; chat_template.jinja wins over tokenizer_config.json."""
    if "chat_template.jinja" in files:
        try:
            return {"default": files["chat_template.jinja"].decode()}
        except UnicodeDecodeError as error:
            raise FormatError(f"chat_template.jinja: not UTF-8; {error}") from None
    found = config.get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    try:
        named = {entry["name"]: entry["template"] for entry in found}
    except (TypeError, KeyError):
        named = {}
    if not named or not all(isinstance(t, str) for pair in named.items() for t in pair):
        raise FormatError(
            "tokenizer_config.json: chat_template must be text or a list of name and template"
        )
    return named


def _generation_eos(config: Mapping[str, Any]) -> list[int]:
    found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise FormatError(f"generation_config.json: eos_token_id must be ids, got {quoted(found)}")
    return ids

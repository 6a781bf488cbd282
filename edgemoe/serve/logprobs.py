"""Log-probabilities in OpenAI's formats: that of chats, and that of completions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgemoe.serve.ask import Ask
from edgemoe.text.logprobs import TokenLogprob
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["chat_logprob", "text_logprobs"]


def chat_logprob(tokenizer: Tokenizer, one: TokenLogprob) -> dict[str, Any]:
    """Returns a token's log-probabilities as chats have them."""

    def token(i: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.token_text(i)
        return {
            "token": text,
            "id": i,
            "logprob": _finite(logprob),
            "bytes": list(text.encode()),
        }

    return {**token(one.token, one.logprob), "top_logprobs": [token(i, p) for i, p in one.top]}


def text_logprobs(
    tokenizer: Tokenizer,
    ask: Ask,
    before: list[TokenLogprob],
    said: list[TokenLogprob],
    at: int = 0,
) -> dict[str, Any]:
    """Returns log-probabilities as completions have them: parallel lists, with an entry for each token.

    Args:
        tokenizer: the model's.
        ask: with `echo`, the prompt's tokens come first; the first of them has no log-probability.
        before: those of the prompt's other tokens.
        said: those of the reply's tokens.
        at: the offset of the first token in the text, in characters.
    """
    text: Callable[[int], str] = tokenizer.token_text
    tokens, values, tops = [], [], []
    if ask.echo:
        tokens, values, tops = [text(ask.ids[0])], [None], [None]
    for one in [*before, *said]:
        tokens.append(text(one.token))
        values.append(_finite(one.logprob))  # type: ignore[arg-type]
        tops.append({text(i): _finite(p) for i, p in one.top})  # type: ignore[arg-type]
    offsets = []
    for token in tokens:
        offsets.append(at)
        at += len(token)
    return {
        "tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets,
    }  # fmt: skip


def _finite(value: float) -> float:
    """Returns a log-probability that JSON can represent: -9999 in place of minus infinity."""
    return max(value, -9999.0)

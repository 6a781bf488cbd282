"""Log-probabilities in OpenAI's formats: that of chats, and that of completions."""

from __future__ import annotations

from typing import Any

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
    tokenizer: Tokenizer, said: list[TokenLogprob], at: int = 0, *, first: int | None = None
) -> dict[str, Any]:
    """Returns log-probabilities as completions have them: parallel lists, with an entry for each token.

    Args:
        tokenizer: the model's.
        said: the log-probabilities of the tokens.
        at: the offset of the first token in the text, in characters.
        first: a token that comes before these and has no log-probability, as the first of a prompt; None for none.
    """
    text, tokens = tokenizer.token_text, list[str]()
    values, tops = list[float | None](), list[dict[str, float] | None]()
    if first is not None:
        tokens, values, tops = [text(first)], [None], [None]
    for one in said:
        tokens.append(text(one.token))
        values.append(_finite(one.logprob))
        tops.append({text(i): _finite(p) for i, p in one.top})
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

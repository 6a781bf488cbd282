"""Errors of requests, and how each dialect reports them."""

from __future__ import annotations

from typing import Any

__all__ = ["Problem", "too_long", "wrong"]

_TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit", "rate_limit_error"),
    500: ("server_error", "api_error"),
    501: ("not_supported", "invalid_request_error"),
    503: ("overloaded", "overloaded_error"),
}
"""The types of errors by status: OpenAI's, and Anthropic's."""


class Problem(Exception):
    """The reason why a request gets no answer. It becomes the HTTP response, or the last event of a stream.

    The message names the field that is wrong; `param` repeats the name for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.extra = retry_after, extra

    def body(self, *, is_messages: bool) -> dict[str, Any]:
        """Returns the body of the response: Anthropic's format with `is_messages`, else OpenAI's."""
        ours, theirs = _TYPES.get(self.status, _TYPES[500])
        if is_messages:
            text = self.extra.get("messages_text", self.message)
            return {"type": "error", "error": {"type": theirs, "message": text}}
        extra = {k: v for k, v in self.extra.items() if k != "messages_text"}
        error = {"message": self.message, "type": ours, "param": self.param, "code": self.code}
        return {"error": {**error, **extra}}


def wrong(param: str, message: str) -> Problem:
    """Returns the error of a field that is wrong."""
    return Problem(400, f"{param}: {message}", param=param)


def too_long(param: str, tokens: int, context: int, *, is_estimate: bool = False) -> Problem:
    """Returns the error of a prompt that does not fit, in words that clients recognise."""
    about = "about " if is_estimate else ""
    return Problem(
        400,
        f"This model's maximum context length is {context} tokens; the prompt has {about}{tokens}. "
        "Start with -c for a larger one, where the model and the memory allow it",
        param=param, code="context_length_exceeded", n_prompt_tokens=tokens, n_ctx=context,
        messages_text=f"prompt is too long: {tokens} tokens > {context} maximum",
    )  # fmt: skip

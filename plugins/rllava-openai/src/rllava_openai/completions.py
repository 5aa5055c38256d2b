"""What an endpoint answers, read strictly: an answer that is not one is named and never guessed at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class MalformedError(Exception):
    """An answer that cannot be read; the message says what it is instead."""


@dataclass(frozen=True)
class Completion:
    """One answer.

    text: what the model wrote; empty where it wrote nothing, such as a reasoning model that ran out of tokens.
    finish_reason: `stop` where the model ended its answer itself.
    input_tokens, output_tokens: what the endpoint says that it read and wrote; 0 where it does not say.
    """

    text: str
    finish_reason: str
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def ended(self) -> bool:
        """Whether the model ended its answer itself."""
        return self.finish_reason == "stop"


def read_completion(body: Any) -> Completion:
    """The first choice of a chat completion. Raises MalformedError."""
    if not isinstance(body, dict):
        raise MalformedError(f"the answer is a {type(body).__name__}, not an object")
    if body.get("error"):
        raise MalformedError(f"status 200 with an error: {error_text(body)}")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise MalformedError("the answer has no choices")
    message, reason = choices[0].get("message"), choices[0].get("finish_reason")
    if not isinstance(message, dict):
        raise MalformedError("the answer has no message")
    if not isinstance(reason, str):
        raise MalformedError("the answer has no finish_reason")
    text = message.get("content", message.get("refusal", _MISSING))
    if text is None:
        text = message.get("refusal") or ""
    if not isinstance(text, str):
        raise MalformedError("the answer's message has no content that is text")
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Completion(text, reason, _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


def error_text(body: Any) -> str:
    """What an error body says, in whichever form servers say it."""
    if isinstance(body, dict):
        for key in ("error", "message", "detail"):
            if body.get(key):
                return error_text(body[key])
    return str(body)


def error_code(body: Any) -> str:
    """The code of an error body, such as `insufficient_quota`; empty if it has none."""
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""


_MISSING = object()


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0

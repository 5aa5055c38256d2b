"""Options of the engine and of the judge: the endpoint that both have, and what is each one's own. Imports no torch."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rllava_core.config import Options

RESERVED = ("messages", "model", "n", "response_format", "seed", "stream", "structured_outputs")
"""Fields of a request that `extra_body` may not set: they are what this package fills in and reads answers by."""


class EndpointOptions(Options):
    """Which model is asked where, how fast, and where its answers are kept."""

    base_url: str = Field(description="of the endpoint, as clients take it: https://api.openai.com/v1")
    model: str = Field(min_length=1, description="the endpoint's name of the model")
    api_key_env: str | None = Field(
        default=None, description="NAME of the environment variable that holds the key; null: no key is sent"
    )
    concurrency: int = Field(default=8, ge=1, le=1024, description="requests under way at once")
    requests_per_minute: float | None = Field(default=None, gt=0, description="no more than these; null: no limit")
    timeout: float = Field(default=120.0, gt=0, description="seconds that one request may take")
    retries: int = Field(
        default=6,
        ge=0,
        description="further tries after a time-out, a lost connection or the statuses 408, 409, 429 and 5xx (after an "
        "answer that cannot be read: 2 at most)",
    )
    longest_wait: float = Field(
        default=300.0, ge=0, description="seconds between two tries; a server that asks for more is given up"
    )
    cache: str | None = Field(
        default="cache/answers",
        min_length=1,
        description="folder in which every answer is kept, found again by what was asked; null: none is kept",
    )
    revision: str = Field(
        default="",
        description="which weights `model` means, where its name does not say: answers are kept apart by it",
    )
    image_detail: Literal["auto", "low", "high"] | None = Field(
        default=None, description="`detail` of every image; null: the endpoint's default"
    )
    extra_body: dict[str, Any] = Field(
        default={}, description="further fields of every request; null takes one away that is sent otherwise"
    )
    price_per_million_input: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="of a million tokens read; null: no cost is reported"
    )
    price_per_million_output: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="of a million tokens written; null: no cost is reported"
    )

    @model_validator(mode="after")
    def _hold_no_secret(self) -> EndpointOptions:
        # Validators of the whole: a message about one field would show its value, and that may be the secret.
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env):
            raise ValueError(
                "api_key_env must be the name of an environment variable, in capitals, such as OPENAI_API_KEY; the key "
                "itself never stands in a config"
            )
        try:
            url = urlsplit(self.base_url)
            hidden = bool(url.username or url.password or url.query or url.fragment)
            usable = url.scheme in ("http", "https") and bool(url.hostname)
            _ = url.port
        except ValueError:
            hidden, usable = False, False
        if hidden:
            raise ValueError(
                "base_url must hold neither a user, a password, a query nor a fragment, for configs are written to "
                "files; name the variable that holds the key in api_key_env"
            )
        if not usable:
            raise ValueError("base_url must be a whole address, such as https://api.openai.com/v1")
        if (self.price_per_million_input is None) != (self.price_per_million_output is None):
            raise ValueError("set both of price_per_million_input and price_per_million_output, or none")
        return self

    @field_validator("extra_body")
    @classmethod
    def _leaves_the_rest(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(set(RESERVED) & set(value))
        if taken:
            raise ValueError(f"may not set {', '.join(taken)}, which every request has already or may need")
        return value


class EngineConfig(EndpointOptions):
    """`engine: {rollout: {name: openai, …}}`"""

    choices_by: Literal["json_schema", "guided", "text"] = Field(
        default="json_schema",
        description="how a choice is asked for. json_schema: the answer is an object that a schema allows; guided: "
        "vLLM's `structured_outputs`, the answer is the choice itself; text: nothing holds the model to the choices",
    )


RUBRIC = """\
Question:
{question}

Right answer:
{reference}

Answer to be scored:
{answer}

Score how well the answer agrees with the right answer. Wording and form do not count, only what it says."""


class JudgeConfig(EndpointOptions):
    """`task: {rewards: [{name: judge, …}]}`"""

    rubric: str = Field(
        default=RUBRIC,
        description="what the judge is told, with `{question}`, `{answer}`, `{reference}` (the example's answer) and "
        "fields of the example; `{image}` says where the next image goes (otherwise all come first); `{{` is a brace",
    )
    scale: tuple[float, float] = Field(
        default=(0.0, 10.0), description="lowest and highest score of the judge, which become 0 and 1"
    )
    images: bool = Field(default=True, description="show the judge the images of the first observation")
    max_tokens: int = Field(default=512, ge=1, description="limit of the judge's answer, reason included")
    on_failure: Literal["stop"] | float = Field(
        default="stop",
        description="what an answer gets that the judge gives no readable score in all tries. stop: an error that "
        "names the example; a number: that reward",
    )

    @field_validator("rubric")
    @classmethod
    def _shows_the_answer(cls, value: str) -> str:
        if "answer" not in re.findall(r"\{\{|\}\}|\{([^{}]*)\}", value):
            raise ValueError("must have {answer}, where the answer to be scored is put")
        return value

    @field_validator("scale")
    @classmethod
    def _goes_up(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not -1e9 < value[0] < value[1] < 1e9:
            raise ValueError("must be two numbers, the lower one first")
        return value

    @field_validator("on_failure")
    @classmethod
    def _is_finite(cls, value: Literal["stop"] | float) -> Literal["stop"] | float:
        if value != "stop" and not -1e9 < float(value) < 1e9:
            raise ValueError("must be stop or a finite number")
        return value

"""What vLLM is asked, and what it says, whichever way it is reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from rllava_core.errors import ConfigError, ModelError
from rllava_core.policy.policy import Policy
from rllava_vllm.prompts import Prompt

NEVER = -1e30
"""What is added to the logit of a forbidden token: its share is exactly 0, and JSON has no infinity."""

SCORED = 127
"""Tokens whose log-probs one question may ask for: vLLM's limit, less the one that `rllava_vllm.wire` adds."""

FORBIDDEN = 1024
"""Tokens whose logits one question may change, which is vLLM's limit on GPUs."""

TEMPERATURES = (0.01, 2.0)
"""What vLLM takes for a temperature."""


@dataclass(frozen=True)
class Terms:
    """The policy's distribution, as far as it is not in the weights.

    forbidden: tokens that are never sampled; ends: tokens that end a turn.
    """

    temperature: float
    forbidden: tuple[int, ...]
    ends: tuple[int, ...]


def terms_of(policy: Policy) -> Terms:
    """Raises ConfigError or ModelError for a policy that vLLM would sample from another distribution than its own."""
    low, high = TEMPERATURES
    if not low <= policy.temperature <= high:
        raise ConfigError(
            f"training.temperature is {policy.temperature:g}, and vLLM samples at {low:g} to {high:g} only; "
            "use engine.rollout: local"
        )
    adapter = policy.adapter
    if len(adapter.forbidden_tokens) > FORBIDDEN:
        raise ModelError(
            f"the model has {len(adapter.forbidden_tokens)} tokens that must not be sampled, and vLLM rules out "
            f"{FORBIDDEN} at most; use engine.rollout: local"
        )
    return Terms(policy.temperature, tuple(adapter.forbidden_tokens), tuple(adapter.end_of_turn))


@dataclass(frozen=True)
class Ask:
    """A question.

    count: of answers; those after the first are drawn by the seeds that follow the first one's.
    max_tokens: of an answer.
    seed: None for the most probable answer.
    scored: what is asked for is no answer but the log-probs of these tokens in the first place.
    """

    prompt: Prompt
    count: int = 1
    max_tokens: int = 1
    seed: int | None = None
    scored: tuple[int, ...] = ()

    def parameters(self, terms: Terms) -> dict[str, Any]:
        """vLLM's sampling parameters. No other may be left to a default of the model's generation config."""
        draws = self.seed is not None or self.scored
        parameters: dict[str, Any] = {
            "n": self.count,
            "max_tokens": self.max_tokens,
            "temperature": terms.temperature if draws else 0.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "logit_bias": dict.fromkeys(terms.forbidden, NEVER),
            "stop_token_ids": list(terms.ends),
            "ignore_eos": True,  # of the config: the policy's own ends are the ones that count
            "detokenize": False,
            "logprobs": len(self.scored),
        }
        if self.seed is not None:
            parameters["seed"] = self.seed
        if self.scored:
            parameters["logprob_token_ids"] = list(self.scored)
        return parameters


@dataclass(frozen=True)
class Said:
    """One answer.

    logprobs: of each of its tokens, under the policy's distribution.
    scores: log-probs of the tokens that were to be scored.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    scores: Mapping[int, float]


class Host(Protocol):
    """Where vLLM is."""

    def answer(self, asks: Sequence[Ask], terms: Terms) -> list[list[Said]]:
        """`count` answers to each question."""
        ...

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Answer from these weights from now on, and keep nothing that older ones have read."""
        ...

    def rest(self) -> None:
        """Nothing will be asked for a while."""
        ...

    def close(self) -> None:
        """Nothing will be asked any more."""
        ...


def first_seed(seed: int) -> int:
    """The seed of episode number 0; that of any other is as much more as its number. Those of two calls are as good as
    never the same."""
    return int(np.random.SeedSequence([seed, 0]).generate_state(1, np.uint64)[0] >> np.uint64(2))


def runs(numbers: Sequence[int], longest: int) -> list[tuple[int, int]]:
    """Numbers as runs of numbers that follow each other: the first of each, and how many, `longest` at most."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == sum(found[-1]) and found[-1][1] < longest:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found

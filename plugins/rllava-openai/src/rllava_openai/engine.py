"""The rollout engine: actions are what the model behind an endpoint answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rllava_core.engines.protocol import AnswerSetup
from rllava_core.errors import ConfigError
from rllava_core.mdp.messages import Message
from rllava_core.mdp.trajectory import ActionSegment
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.draws import uniforms
from rllava_core.policy.policy import Policy
from rllava_core.policy.sampling import Request, numbered
from rllava_core.training.seeds import derive
from rllava_openai.asking import Asking, Question
from rllava_openai.chat import conversation
from rllava_openai.completions import Completion
from rllava_openai.config import EngineConfig

UNKNOWN = np.zeros(0, np.float32)
"""Log-probs of what a hosted model says."""


class OpenAIEngine:
    """Asks the model of an endpoint for every action. It has no weights that could be trained.

    A greedy action is asked for with temperature 0, a drawn one with the run's temperature and a seed that follows from
    the run's and from the number of its episode. An answer that is none of the choices offered stays what it is: an
    action without a choice, which the episode ends with.

    Raises ConfigError for a key that is missing, or a cache that cannot be written to.
    """

    def __init__(self, config: EngineConfig, setup: AnswerSetup) -> None:
        self.config = config
        self._temperature = setup.temperature
        self._asking = Asking(config)

    def generate(
        self, requests: Sequence[Request], seed: int | None, behaviour: Behaviour | None = None
    ) -> list[list[ActionSegment]]:
        behaviour = behaviour or Behaviour()
        if behaviour.action_values is not None:
            raise ConfigError("engine openai: acts by what its model says, and has no heads to act by the values of")
        requests = numbered(requests)
        places: dict[tuple[int, int], Question] = {}
        actions: dict[tuple[int, int], ActionSegment] = {}
        for place, request in enumerate(requests):
            messages = conversation(request.context)
            for member, number in enumerate(request.numbers):
                drawn = self._at_random(request, number, seed, behaviour.epsilon)
                if drawn is None:
                    places[place, member] = self._question(request, messages, number, seed)
                else:
                    actions[place, member] = drawn
        answers = self._asking.ask(list(places.values()))
        for (place, member), answer in zip(places, answers, strict=True):
            actions[place, member] = self._action(requests[place], answer)
        return [[actions[place, member] for member in range(request.count)] for place, request in enumerate(requests)]

    def forget(self) -> None:
        """Nothing is kept of a conversation: each turn is asked for with all that came before it."""

    def sync(self, policy: Policy) -> None:
        """Never called, since nothing is trained: there are no weights to take over."""
        raise ConfigError("engine openai: its model is behind an endpoint, and cannot be given weights")

    def report(self) -> dict[str, float]:
        """What was spent since the last report."""
        return self._asking.report()

    def _at_random(self, request: Request, number: int, seed: int | None, epsilon: float) -> ActionSegment | None:
        """A choice drawn uniformly, with probability epsilon; None where the model is to be asked."""
        if seed is None or epsilon == 0.0:
            return None
        if request.choices is None:
            raise ConfigError(
                f"{request.name}: the environment asks for free text, and there is no acting at random where no "
                "choices are offered"
            )
        [[whether, which]] = uniforms(seed, [number], 2)
        return _chosen(request, int(which * len(request.choices))) if whether < epsilon else None

    def _question(self, request: Request, messages: tuple[Message, ...], number: int, seed: int | None) -> Question:
        how: dict[str, Any] = {"temperature": 0.0}
        if seed is not None:
            how = {"temperature": self._temperature, "seed": derive(seed, number) % 2**31}
        return Question(messages, {**how, **self._form(request)}, request.name)

    def _form(self, request: Request) -> Mapping[str, Any]:
        """The fields of a request that say what form the answer has, and how long it may be."""
        if request.choices is None or self.config.choices_by == "text":
            return {"max_tokens": request.max_tokens}
        texts = request.choice_texts
        if self.config.choices_by == "guided":
            return {"max_tokens": _room(texts), "structured_outputs": {"choice": list(texts)}}
        schema = {
            "type": "object",
            "properties": {"choice": {"type": "string", "enum": list(texts)}},
            "required": ["choice"],
            "additionalProperties": False,
        }
        form = {"type": "json_schema", "json_schema": {"name": "choice", "strict": True, "schema": schema}}
        return {"max_tokens": _room([json.dumps({"choice": text}) for text in texts]), "response_format": form}

    def _action(self, request: Request, answer: Completion) -> ActionSegment:
        if request.choices is None:
            return ActionSegment((), UNKNOWN, answer.text, answer.ended)
        said = _choice_in(answer.text) if self.config.choices_by == "json_schema" else answer.text
        if said not in request.choice_texts and self.config.choices_by == "text":
            said = answer.text.strip()  # nothing kept the model from a space or a line more
        if said not in request.choice_texts:
            return ActionSegment((), UNKNOWN, answer.text, ended=False)
        return _chosen(request, request.choice_texts.index(said))


def _chosen(request: Request, index: int) -> ActionSegment:
    assert request.choices is not None
    text = request.choice_texts[index]
    return ActionSegment(request.choices[index], UNKNOWN, text, choice=index, choices=request.choices)


def _room(answers: Sequence[str]) -> int:
    """Tokens that the longest answer may take, whatever the tokenizer: one a byte, and some for white space."""
    return max(len(answer.encode("utf-8", "surrogatepass")) for answer in answers) + 16


def _choice_in(text: str) -> str | None:
    """The choice of an answer that is an object as the schema says; None for any other."""
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    said = answer.get("choice") if isinstance(answer, dict) and set(answer) == {"choice"} else None
    return said if isinstance(said, str) else None

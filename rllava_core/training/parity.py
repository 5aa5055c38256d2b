"""Are the log-probs that are trained on those of the model? Three ways to compute each of them, side by side.

*Sampled*: by the rollout engine, while the answer was written. *Recomputed*: by the train engine, packed with others.
*Plain*: by the model's own `forward` on one whole sequence at a time, with what the family's own processor makes of its
images, without cache, padding, sharing or positions of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from rllava_core.errors import ConfigError
from rllava_core.mdp.environment import Failure, Start
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, Message, Observation, Transition
from rllava_core.mdp.pool import LocalEnvironments
from rllava_core.mdp.trajectory import ContextSegment, Segment, Trajectory, Turn
from rllava_core.policy.adapter import OwnProcessor
from rllava_core.policy.policy import Policy
from rllava_core.policy.sampling import Request
from rllava_core.training.build import Parts
from rllava_core.training.conversations import Renderer
from rllava_core.training.episodes import Episodes, Limits
from rllava_core.training.seeds import derive

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
"""Nats. Half precision rounds every layer differently in every order of computation."""

GROUP = 4
"""Answers to every prompt about pictures."""


@dataclass(frozen=True)
class Decision:
    """One token, or one choice, and its log-prob computed in three ways.

    episode, turn, place: where it is; `place` counts the decisions of the turn.
    plain: None where the adapter has no processor of the family's own.
    """

    episode: str
    turn: int
    place: int
    text: str
    sampled: float
    recomputed: float
    plain: float | None

    @property
    def gap(self) -> float:
        """The largest difference between two of them."""
        found = [self.sampled, self.recomputed, *([] if self.plain is None else [self.plain])]
        return max(found) - min(found) if all(map(math.isfinite, found)) else math.inf


@dataclass(frozen=True)
class Prompt:
    """A prompt: whether its ids are those of the family's own processor, and its greedy answer that of `generate`.

    None where the adapter has no processor of the family's own.
    """

    episode: str
    same_tokens: bool | None
    same_answer: bool | None


@dataclass(frozen=True)
class Parity:
    """What was compared, and the verdict."""

    decisions: tuple[Decision, ...]
    prompts: tuple[Prompt, ...]
    tolerance: float

    @property
    def problems(self) -> list[str]:
        """What is not as it should be, in words; empty if all is."""
        found = []
        worst = max(self.decisions, key=lambda decision: decision.gap)
        if not worst.gap <= self.tolerance:
            found.append(f"log-probs differ by {worst.gap:.2g} nats in {worst.episode}; allowed are {self.tolerance:g}")
        other = [prompt.episode for prompt in self.prompts if prompt.same_tokens is False]
        if other:
            found.append(
                f"the prompt of {other[0]} ({len(other)} in all) is not what the family's processor makes of it"
            )
        other = [prompt.episode for prompt in self.prompts if prompt.same_answer is False]
        if other:
            found.append(f"the greedy answer to {other[0]} ({len(other)} in all) is not that of `generate`")
        return found

    def gaps(self, one: Callable[[Decision], float | None], other: Callable[[Decision], float | None]) -> list[float]:
        """|difference| of two of the ways, for each decision that has both."""
        pairs = [(one(decision), other(decision)) for decision in self.decisions]
        return [abs(a - b) for a, b in pairs if a is not None and b is not None]


class Gallery:
    """Two turns of free text about pictures of several sizes: none, one, several in a row, between words.

    unit: pixels that all sides are multiples of.
    """

    COUNT = 4

    def __init__(self, unit: int) -> None:
        self._unit = unit

    def reset(self, *, seed: int, example: Example | None) -> Observation:
        self._turn = 0
        self._number = seed % self.COUNT
        shapes = [[(6, 4)], [], [(4, 8), (5, 5), (12, 4)], [(8, 8), (3, 9)]][self._number]
        pictures = [self._noise(height, width, seed + place) for place, (height, width) in enumerate(shapes)]
        if self._number == 3:
            return Observation((Message.user("Is ", pictures[0], " like ", pictures[1], "?"),))
        return Observation((Message.user(*pictures, "What is to be seen?"),))

    def step(self, action: Action) -> Transition:
        self._turn += 1
        later = Message.user("And now?", self._noise(7, 5 + self._number, 100 + self._number))
        return Transition(0.0, Observation((later,)), terminated=self._turn == 2)

    def _noise(self, height: int, width: int, seed: int) -> Image:
        shape = (height * self._unit, width * self._unit, 3)
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        return Image.from_array(pixels, f"picture of {shape[0]}×{shape[1]}")


def tolerance_of(parts: Parts, temperature: float) -> float:
    """Rounding of the precision that is computed in, which a low temperature magnifies."""
    device = parts.policy.device.type
    with parts.trainer.autocast():
        lowered = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if lowered else parts.policy.model.dtype
    return TOLERANCE[str(dtype).removeprefix("torch.")] / min(1.0, temperature)


def measure(parts: Parts, starts: Sequence[Start], seed: int, tolerance: float) -> Parity:
    """Compare on episodes of the task that begin at `starts`, and on a few conversations about pictures."""
    limits = parts.episodes.limits
    context = parts.adapter.context_length

    def pictured() -> Gallery:
        """With pictures as large as the model can read several of."""
        return Gallery(4 if context < 1024 else 8 if context < 8192 else 32)

    gallery = Episodes(
        parts.adapter,
        parts.media,
        parts.sampler,
        LocalEnvironments(pictured),
        Limits(min(limits.max_new_tokens, 16), 2, None, limits.history),
    )
    pictures = [Start(None, number) for number in range(Gallery.COUNT)]
    # Groups, whose answers stand beside each other in the rows of a batch.
    played = [*parts.episodes.play(starts, 1, derive(seed, 0)), *gallery.play(pictures, GROUP, derive(seed, 1))]
    shown = [f"pictures {number}" for number in range(Gallery.COUNT)]
    names = [start.name for start in starts]
    if len(played) != len(names) + GROUP * len(shown):
        raise ConfigError("an environment failed before its first turn was done; `rllava eval` says which")
    with parts.trainer.autocast():
        decisions = _decisions(parts, played, [*names, *(name for name in shown for _ in range(GROUP))])
        observations = [
            *_observations(parts, starts),
            *(pictured().reset(seed=n, example=None) for n in range(Gallery.COUNT)),
        ]
        prompts = [
            _prompt(parts, name, observation, min(limits.max_new_tokens, 16))
            for name, observation in zip([*names, *shown], observations, strict=True)
        ]
    return Parity(tuple(decisions), tuple(prompts), tolerance)


def _decisions(parts: Parts, played: Sequence[Trajectory], names: Sequence[str]) -> list[Decision]:
    recomputed = iter(parts.trainer.evaluate(played).logprobs.tolist())
    found = []
    for name, trajectory in zip(names, played, strict=True):
        for number, turn in enumerate(trajectory.turns):
            plain = _plain(parts.policy, turn) if isinstance(parts.adapter, OwnProcessor) else None
            for place, sampled in enumerate(turn.action.logprobs.tolist()):
                text = turn.action.text if turn.action.choice is not None else _text(parts, turn.action.tokens[place])
                value = None if plain is None else float(plain[place])
                found.append(Decision(name, number + 1, place + 1, text, sampled, next(recomputed), value))
    return found


@torch.inference_mode()
def _plain(policy: Policy, turn: Turn) -> Tensor:
    """[decisions of the turn]: log-probs of what was decided, by the model's own forward."""
    tokens = [token for segment in turn.context for token in segment.tokens]
    images = _images(turn.context)
    action = turn.action
    if action.choices is None or action.choice is None:
        return _sequence(policy, tokens, action.tokens, images)
    scores = torch.stack([_sequence(policy, tokens, choice, images).sum() for choice in action.choices])
    return torch.log_softmax(scores, dim=0)[action.choice][None]


def _sequence(policy: Policy, tokens: Sequence[int], answer: Sequence[int], images: Sequence[Image]) -> Tensor:
    """[len(answer)] log-probs of the tokens of an answer."""
    adapter = policy.adapter
    assert isinstance(adapter, OwnProcessor)
    inputs = {name: values.to(policy.device) for name, values in adapter.own_inputs([*tokens, *answer], images).items()}
    logits = policy.model(**inputs).logits[0].float()
    logits[:, policy.forbidden] = -torch.inf
    table = torch.log_softmax(logits / policy.temperature, dim=-1)
    places = torch.arange(len(tokens) - 1, len(tokens) + len(answer) - 1, device=table.device)
    return table[places, torch.tensor(answer, device=table.device)].cpu()


def _prompt(parts: Parts, name: str, observation: Observation, max_tokens: int) -> Prompt:
    adapter, policy = parts.adapter, parts.policy
    if not isinstance(adapter, OwnProcessor):
        return Prompt(name, None, None)
    segment = Renderer(adapter, parts.media).opening(observation.messages, name)
    [[action]] = parts.sampler.generate([Request((segment,), 1, max_tokens, name)], None)
    parts.sampler.forget()
    return Prompt(
        name,
        adapter.own_tokens(observation.messages) == segment.tokens,
        _generated(policy, segment, max_tokens) == list(action.tokens),
    )


@torch.inference_mode()
def _generated(policy: Policy, prompt: ContextSegment, max_tokens: int) -> list[int]:
    adapter = policy.adapter
    assert isinstance(adapter, OwnProcessor)
    inputs = {
        name: values.to(policy.device) for name, values in adapter.own_inputs(prompt.tokens, prompt.images).items()
    }
    generate = cast("Callable[..., Tensor]", policy.model.generate)
    found = generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_tokens,
        eos_token_id=list(adapter.end_of_turn),
        pad_token_id=adapter.pad_token,
        suppress_tokens=list(adapter.forbidden_tokens),
        repetition_penalty=1.0,
    )
    tokens: list[int] = found[0, len(prompt.tokens) :].tolist()
    return tokens


def _observations(parts: Parts, starts: Sequence[Start]) -> list[Observation]:
    found = []
    for observation in parts.task.environments.reset(list(starts)):
        if isinstance(observation, Failure):
            raise ConfigError(f"an environment that had begun once did not begin again: it {observation.what}")
        found.append(observation)
    return found


def _images(context: Sequence[Segment]) -> list[Image]:
    return [image for segment in context if isinstance(segment, ContextSegment) for image in segment.images]


def _text(parts: Parts, token: int) -> str:
    return parts.adapter.decode([token]) or f"<{token}>"
